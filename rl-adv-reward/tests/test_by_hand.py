"""Few steps and numbers with the answer that a pencil gives: attacks, replay, learners."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rl_adv_reward import attacks
from rl_adv_reward.atn import ATN, perturbation_size, project
from rl_adv_reward.dqn import dqn_targets, nstep_returns, tabular_attack
from rl_adv_reward.evaluation import evaluate
from rl_adv_reward.learners import Distiller, QLearner
from rl_adv_reward.models import Victim, mlp
from rl_adv_reward.replay import Replay
from rl_adv_reward.rewards import GoalZone, Zone, crossing, make_reward
from rl_adv_reward.train import make_fabric

SHAPE = (2, 10, 10)
CPU = make_fabric("cpu")


class Linear:
    """Values of two actions: x . w and -x . w."""

    def __init__(self, weights):
        self.weights, self.calls = torch.tensor(weights), 0

    def q(self, x):
        self.calls += 1
        value = x.flatten(1) @ self.weights
        return torch.stack([value, -value], 1)


# ---- attacks ---------------------------------------------------------------------------------------------

X = torch.tensor([[[[0.5, 0.5, 0.5, 0.5]]], [[[0.1, 0.2, 0.9, 0.5]]]])
WEIGHTS = [0.3, 0.1, -0.2, 0.0]


def test_fgsm_lowers_the_greedy_action_s_value():
    """Action 0 in the first observation (0.1), 1 in the second (-0.13): w decides, where it is zero nothing moves."""
    moved = attacks.fgsm(X, Linear(WEIGHTS), eps=0.25) - X
    expected = torch.tensor([[-0.25, -0.25, 0.25, 0], [0.25, 0.25, -0.25, 0]])
    torch.testing.assert_close(moved.flatten(1), expected)
    target = attacks.targeted_fgsm(X, Linear(WEIGHTS), target=lambda x: torch.tensor([1, 0]), eps=0.05) - X
    torch.testing.assert_close(target.flatten(1), expected / 5)
    away = attacks.fgsm(X, Linear(WEIGHTS), eps=0.1, norm="l2") - X
    direction = torch.tensor(WEIGHTS) / math.sqrt(0.14)
    torch.testing.assert_close(away.flatten(1), 0.1 * torch.stack([-direction, direction]))


def test_pgd_takes_steps_of_two_and_a_half_times_its_share():
    """In four steps of 0.08 from x the bound of 0.13 is reached after the second, and not left."""
    for steps in (1, 4, 30):
        moved = attacks.pgd(X, Linear(WEIGHTS), eps=0.13, steps=steps) - X
        assert moved.abs().amax().item() == pytest.approx(0.13, abs=1e-6)
    victim = Linear(WEIGHTS)
    attacks.pgd(X, victim, eps=0.1, steps=7)
    assert victim.calls == 8  # the greedy action, then a gradient per step
    victim = Linear(WEIGHTS)
    attacks.pgd(X, victim, eps=0.1)
    assert victim.calls == 11
    two = attacks.pgd(X[:1], Turning(), eps=1.0, steps=25) - X[:1]
    assert two.flatten()[0].item() == pytest.approx(-0.3, abs=0.051)


class Turning(Linear):
    """The greedy action's value is lowest where the first pixel is 0.2."""

    def __init__(self):
        super().__init__([0.0])

    def q(self, x):
        value = 1 + (x.flatten(1)[:, 0] - 0.2) ** 2
        return torch.stack([value, -value], 1)


def test_mad_starts_at_random_and_moves_away_from_the_clean_policy():
    victim, generator = Linear(WEIGHTS), torch.Generator().manual_seed(0)
    moved = attacks.mad(X, victim, eps=0.1, steps=3, generator=generator) - X
    assert victim.calls == 4
    signs = moved.flatten(1)[:, :3].sign() * torch.tensor(WEIGHTS[:3]).sign()
    assert moved.flatten(1)[:, :3].abs().amin().item() == pytest.approx(0.1, abs=1e-6)
    assert (signs == signs[:, :1]).all()  # all pixels push the value the same way
    start = attacks.random_uniform(X, victim, eps=0.1, generator=torch.Generator().manual_seed(0)) - X
    torch.testing.assert_close(moved.flatten(1)[:, 3], start.flatten(1)[:, 3])  # a pixel that nothing depends on
    victim = Linear(WEIGHTS)
    attacks.mad(X, victim, eps=0.1, generator=generator)
    assert victim.calls == 11


def test_mad_climbs_the_divergence_from_the_clean_policy(victim):
    """One step from the random start: the sign of the gradient of sum p log(p / q), p the clean softmax."""
    x = 0.3 + 0.4 * torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = attacks.mad(x, victim, eps=0.05, steps=1, generator=torch.Generator().manual_seed(0))
    start = attacks.random_uniform(x, victim, eps=0.05, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clean = victim.q(x).softmax(1)
    (clean * (clean.log() - victim.q(start).log_softmax(1))).sum().backward()
    torch.testing.assert_close(found, project(start + 0.125 * start.grad.sign(), x, 0.05).detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_comes_from_its_generator(norm):
    def draw(attack, seed):
        return attack(X, None, eps=0.1, norm=norm, generator=torch.Generator().manual_seed(seed))

    for attack in (attacks.random_uniform, attacks.random_sign):
        assert torch.equal(draw(attack, 3), draw(attack, 3)) and not torch.equal(draw(attack, 3), draw(attack, 4))


def test_noise_is_uniform_or_of_both_signs():
    x = torch.full((400, 1, 4, 4), 0.5)
    uniform = attacks.random_uniform(x, None, eps=0.2, generator=torch.Generator().manual_seed(0)) - x
    assert -0.2 <= uniform.min() < -0.199 and 0.199 < uniform.max() <= 0.2 and uniform.mean().abs() < 0.005
    assert uniform.square().mean().item() == pytest.approx(0.04 / 3, rel=0.05)
    sign = attacks.random_sign(x, None, eps=0.2, generator=torch.Generator().manual_seed(0)) - x
    torch.testing.assert_close(sign.abs(), torch.full_like(sign, 0.2))
    assert (sign > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    sphere = attacks.random_uniform(x, None, eps=0.2, norm="l2", generator=torch.Generator().manual_seed(0)) - x
    torch.testing.assert_close(sphere.flatten(1).norm(dim=1), torch.full((400,), 0.2))


def test_a_preference_is_the_spread_of_the_softmax():
    spread = attacks.preference(X, Linear(WEIGHTS), temperature=0.5)
    values = X.flatten(1) @ torch.tensor(WEIGHTS)
    torch.testing.assert_close(spread, torch.tanh(values.abs() / 0.5))
    quiet = attacks.strategically_timed(X, Linear(WEIGHTS), attack=lambda x, v: x + 1, threshold=spread[0].item(),
                                        temperature=0.5)  # fmt: skip
    assert torch.equal(quiet[0], X[0]) and torch.equal(quiet[1], X[1] + 1)  # strictly above


def test_the_gradient_of_a_rounding_error_is_zero():
    gradient = attacks.gradient(X, Linear([1.0, 1e-7, 1e-4, 0.0]), torch.tensor([0, 0]))
    assert (gradient.flatten(1)[:, [1, 3]] == 0).all() and (gradient.flatten(1)[:, [0, 2]] < 0).all()


@pytest.mark.parametrize(
    "name, options", [("pgd", {"steps": 3}), ("mad", {"steps": 3}), ("targeted-pgd", {"steps": 3})]
)
def test_an_attack_by_name_has_its_steps(name, options):
    victim = Linear(WEIGHTS)
    extras = {"generator": torch.Generator(), "target": lambda x: torch.tensor([0, 1])}
    attacks.make_attack(name, eps=0.1, **options, **extras)(X, victim)
    assert victim.calls == (3 if name == "targeted-pgd" else 4)
    attacks.make_attack(name, eps=0.1, **extras)(X, victim)
    assert victim.calls == (13 if name == "targeted-pgd" else 15)


def test_eight_bit_projection_by_hand():
    x = torch.tensor([[10.0, 10, 10, 250]]) / 255
    proposed = torch.tensor([[12.4, 12.6, 20, 300]]) / 255
    pixels = 255 * project(proposed, x, 3 / 255, quantize=True)
    torch.testing.assert_close(pixels, torch.tensor([[12.0, 13, 13, 253]]))
    ball = 255 * project(
        torch.tensor([[13.0, 14.0]]) / 255, torch.tensor([[10.0, 10]]) / 255, 4 / 255, "l2", quantize=True
    )
    torch.testing.assert_close(ball, torch.tensor([[12.0, 13]]))  # 4 x (3, 4) / 5 = (2.4, 3.2), towards x
    linf, l2, l0 = perturbation_size(torch.tensor([[0.1, 0.5, 0.4]]), torch.tensor([[0.1, 0.1, 0.7]]))
    assert (linf.item(), l2.item(), l0.item()) == (pytest.approx(0.4), pytest.approx(0.5), 2)
    limited = project(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]]), 0.3, low=0.3, high=0.7)
    torch.testing.assert_close(limited, torch.tensor([[0.7, 0.3]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_transformer_s_equation(norm):
    """x + eps tanh(f(x)), or f(x) shortened to eps, of the centred observation."""
    torch.manual_seed(0)
    atn = ATN(SHAPE, 0.05, norm, width=4, background=0.3)
    nn.init.normal_(atn.body[-2].weight)
    x = 0.2 + 0.6 * torch.rand(3, *SHAPE)
    raw = nn.Sequential(*list(atn.body)[1:])(3 * (x - 0.3))
    step = 0.05 * raw.tanh()
    if norm == "l2":
        step = raw * 0.05 / raw.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(atn(x), x + step)
    torch.testing.assert_close(atn.perturbation(x), step, rtol=1e-4, atol=1e-6)
    assert atn.arguments == {"obs_shape": [2, 10, 10], "eps": 0.05, "norm": norm, "width": 4, "background": 0.3}
    assert ATN((1, 35, 35), 0.1).body[2].out_features == 96 and hasattr(ATN((1, 36, 36), 0.1).body, "scene")


def test_the_transformer_of_large_frames_layer_by_layer():
    body = ATN((4, 84, 84), 0.05, width=8).body
    assert [type(layer) for layer in body.detail] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.ConvTranspose2d]
    assert [type(layer) for layer in body.scene[0]] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    rest = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.Unflatten, nn.Upsample]
    assert [type(layer) for layer in body.scene[1:]] == rest
    assert body.scene[2].in_features == 8 * 9 * 9 and body.scene[2].out_features == 64
    assert body.scene[4].out_features == 4 * 21 * 21 and body.detail[0].out_channels == body.detail[2].out_channels == 4


def test_a_zone_reads_the_ball_before_and_after_the_step_and_includes_its_ends():
    seen = []

    def position(*given):
        seen.append(given)
        return torch.tensor([0.2, 0.5, 0.51, math.nan])

    obs, then, info = torch.zeros(4), torch.ones(4), {}
    assert Zone(position, 0.2, 0.5)(obs, None, torch.zeros(4), None, then, info).tolist() == [1, 1, 0, 0]
    assert GoalZone(position, 0.2, 0.5)(obs, None, torch.ones(4), None, then, info).tolist() == [1, 1, 0, 0]
    assert all(each[0] is obs and each[1] is then and each[2] is info for each in seen) and len(seen) == 2


def test_a_zone_may_be_a_point_and_lies_on_the_line():
    zone = make_reward("zone", "minipong", low=0.5, high=0.5)
    assert (zone.low, zone.high) == (0.5, 0.5)
    for low, high in ((0.5, 1.1), (-0.1, 0.5)):
        with pytest.raises(ValueError, match=f"expected 0 <= low <= high <= 1, got {low} and {high}"):
            make_reward("zone", "minipong", low=low, high=high)
    nowhere = crossing("breakout", torch.zeros(3, 4, 84, 84), torch.zeros(3, 4, 84, 84), {})
    assert nowhere.shape == (3,) and nowhere.isnan().all()


def test_zones_by_hand():
    step = [None, None, torch.tensor([0.0, 1, -1, 1]), None, None]
    info = {"crossing_y": np.array([3.0, 6.0, -1.0, 9.0]), "top": np.array([3, 3, 3, 3])}
    obs = torch.zeros(4, 2, 10, 10, dtype=torch.uint8)
    step[0] = step[4] = obs
    assert make_reward("centre_goal", "minipong")(*step, info).tolist() == [0, 1, -1, 0]
    assert make_reward("zone", "minipong", low=0.0, high=1.0)(*step, info).tolist() == [1, 1, -1, 1]
    assert make_reward("centre_line_paper", "minipong")(*step, info).tolist() == [0, 0, 0, 0]
    info["crossing_y"] = np.array([4.5, 4.0, 5.0, -1.0])
    assert make_reward("centre_line_paper", "minipong")(*step, info).tolist() == [1, 1, 1, 0]


# ---- replay ----------------------------------------------------------------------------------------------


def filled(rows=8, steps=8, envs=2, padding="zero", age=5):
    replay = Replay(rows * envs, envs, (2, 1, 1), padding, "cpu")
    no, yes = torch.zeros(envs, dtype=torch.bool), torch.ones(envs, dtype=torch.bool)
    for step in range(steps):
        obs = (10 * step + torch.arange(envs)).reshape(envs, 1, 1, 1).repeat(1, 2, 1, 1).to(torch.uint8)
        ages = torch.full((envs,), min(step, age))
        replay.add(obs, ages, torch.full((envs,), step), torch.full((envs,), float(step)), no, no, yes)
    return replay


@pytest.mark.parametrize("steps, expected", [(6, range(1, 4)), (8, range(1, 6)), (11, range(4, 9))])
def test_every_step_with_a_whole_return_is_drawn_and_no_other(steps, expected):
    """Eight rows, returns of two steps: also where the ring has gone round, from its oldest step but the first."""
    torch.manual_seed(0)
    batch = filled(steps=steps).sample(400, n_step=2, gamma=0.5)
    assert sorted(set(batch.action.tolist())) == list(expected)
    torch.testing.assert_close(batch.returns, batch.action + 0.5 * (batch.action + 1))
    assert (batch.discount == 0.25).all() and not batch.terminated.any() and (batch.weight == 1).all()
    newest, then = batch.obs[:, 1, 0, 0].long(), batch.next_obs[:, 1, 0, 0].long()
    assert torch.equal(newest // 10, batch.action) and torch.equal(then, newest + 20)
    assert torch.equal(batch.obs[:, 0, 0, 0].long(), newest - 10) and set((newest % 10).tolist()) == {0, 1}


def test_a_single_step_is_the_default():
    batch = filled().sample(50)
    assert torch.equal(batch.returns, batch.action.float()) and (batch.discount == 1).all()
    assert torch.equal(batch.next_obs[:, 1, 0, 0], batch.obs[:, 1, 0, 0] + 10)


@pytest.mark.parametrize("padding, before", [("zero", 0), ("first", 40)])
def test_stacks_begin_with_the_episode(padding, before):
    replay = filled(padding=padding)
    replay.age[4] = 0
    row, env = torch.tensor([4, 5]), torch.tensor([0, 1])
    assert replay.stacked(row, env).flatten().tolist() == [before, 40, 41, 51]


def test_a_replay_comes_back_from_its_state():
    replay, again = filled(steps=11), Replay(16, 2, (2, 1, 1), "zero", "cpu")
    again.restore(replay.state())
    assert (again.head, again.size) == (replay.head, replay.size) == (3, 8)
    assert all(torch.equal(getattr(again, name), getattr(replay, name)) for name in Replay.NAMES)
    half = filled(steps=3)
    assert len(half.state()["frames"]) == 3 and half.head == 3
    with pytest.raises(ValueError, match="3 stored steps hold no return of 2 steps after a stack of 2"):
        half.sample(4, n_step=2)
    half.cut(5)
    assert not half.valid[:3].any()


# ---- learners --------------------------------------------------------------------------------------------


def test_a_learner_explores_at_its_rate_and_copies_its_target_when_due(small):
    loop = replace(small(), victim_iterations=100, victim_explore=(0.4, 0.4, 0.5)).loop("victim")
    torch.manual_seed(0)
    learner = QLearner(mlp(SHAPE, 3), loop, CPU)
    x = torch.rand(3000, *SHAPE)
    same = (learner.act(x, 0) == learner.q(x).argmax(1)).double().mean()
    assert same.item() == pytest.approx(0.6 + 0.4 / 3, abs=0.03)
    (group,) = learner.optimizer.param_groups
    assert (group["lr"], group["eps"]) == (loop.lr, loop.adam_eps) and set(learner.modules) == {"q", "target"}
    assert not any(p.requires_grad for p in learner.target.parameters())
    learner.q[-1].bias.data += 1
    learner.after(loop.sync_every + 1)
    assert not torch.equal(learner.q[-1].bias, learner.target[-1].bias)
    learner.after(2 * loop.sync_every)
    assert torch.equal(learner.q[-1].bias, learner.target[-1].bias)


def test_a_distiller_plays_as_the_critic_and_then_as_itself(victim, small):
    torch.manual_seed(0)
    critic, atn = mlp(SHAPE, 3), ATN(SHAPE, 0.3)
    nn.init.normal_(atn.body[-2].weight)
    learner = Distiller(atn, victim, critic, 0.05, 10, small().distill_loop(), CPU)
    x = torch.rand(200, *SHAPE)
    own = victim.q(atn(x)).argmax(1)
    assert torch.equal(learner.act(x, 9), critic(x).argmax(1)) and torch.equal(learner.act(x, 10), own)
    assert not torch.equal(own, critic(x).argmax(1)) and list(learner.modules) == ["q"]
    assert not critic.training and not any(p.requires_grad for p in critic.parameters())


def test_wrong_ends_shapes_and_discounts_are_refused():
    ended, values = torch.tensor([1, 0]), torch.ones(2, 3)
    with pytest.raises(TypeError, match="terminated must be bool, got torch.int64"):
        dqn_targets(torch.ones(2), ended, values, 0.9)
    segment, never = torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.bool)
    for wrong in ({"terminated": never[:4]}, {"truncated": never[:4]}, {"final_value": segment[:4]}):
        parts = {"reward": segment, "terminated": never, "truncated": never, "final_value": segment} | wrong
        with pytest.raises(ValueError, match="must have one shape"):
            nstep_returns(**parts, bootstrap_value=torch.zeros(6, 3), n=2, gamma=0.9)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\), got 1"):
        tabular_attack(torch.full((1, 1, 1), 1.0), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 1.0)


@pytest.mark.parametrize(
    "wrong, message", [({"temporal": "foo"}, "temporal must be one of"), ({"norm": "foo"}, "norm must")]
)
def test_an_evaluation_of_another_kind_is_refused(wrong, message):
    class NoParameters(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3]

    goal, victim = make_reward("aim_top", "minipong"), Victim(NoParameters())
    with pytest.raises(ValueError, match=message):
        evaluate(victim, attacks.none, goal, "minipong", 1, 0, **wrong)
    assert len(evaluate(victim, attacks.none, goal, "minipong", 1, 0, episode_steps=3).episodes["steps"]) == 1
