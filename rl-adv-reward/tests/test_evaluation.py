"""Evaluation: counts, the bound, eps = 0, the bootstrap."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import nn

from rl_adv_reward.atn import ATN
from rl_adv_reward.attacks import ATNAttack, make_attack, none
from rl_adv_reward.evaluation import (
    Evaluation,
    Frames,
    _Tally,
    bootstrap_rate,
    evaluate,
    landing_shift,
    lead,
    pack,
    success_share,
    unpack,
)
from rl_adv_reward.models import Victim
from rl_adv_reward.rewards import lose, make_reward

SHAPE = (2, 10, 10)


class Follower(nn.Module):
    """Plays perfectly: moves towards the row of the ball; values that no small perturbation reverses."""

    def forward(self, x):
        frame = x[:, 1]
        rows = torch.arange(10.0)
        ball = (frame[:, :, :9] > 0.7).float().sum(2).argmax(1).float()
        paddle = (frame[:, :, 9] > 0.5).float() @ rows / 4
        wanted = torch.stack([ball < paddle - 0.5, (ball - paddle).abs() <= 0.5, ball > paddle + 0.5], 1)
        return wanted.float() + 0 * self.one

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))


def test_counts_of_a_perfect_player():
    found = evaluate(Victim(Follower()), none, make_reward("aim_top", "minipong"), "minipong", 6, 0, eps=0.0)
    e = found.episodes
    assert len(e["steps"]) == 6 and (e["steps"] <= 300).all() and e["misses"].sum() == 0
    assert (e["victim_return"][e["steps"] < 300] == 5).all()
    assert found.landings.sum() == e["crossings"].sum() and e["hits"].sum() == e["adv_return"].sum()
    assert abs(found.metrics()["hit_fraction"] - e["hits"].sum() / e["crossings"].sum()) < 1e-12
    assert abs(found.rate() - 1000 * e["adv_return"].sum() / e["steps"].sum()) < 1e-12


def test_balls_after_a_game_s_last_episode_do_not_count(victim):
    found = evaluate(victim, none, make_reward("aim_top", "minipong"), "minipong", 5, 0)
    lengths = found.episodes["steps"]
    assert lengths.max() > lengths.min() + 30, "no game played on"
    assert 0 < found.landings.sum() == found.episodes["crossings"].sum()


def test_eps_0_repeats_the_trajectory_and_an_attack_does_not(victim):
    def play(attack, seed=0):
        return evaluate(victim, attack, lose, "minipong", 4, seed).trajectory

    assert play(none) == play(none) == play(make_attack("fgsm", eps=0.0)) == play(ATNAttack(ATN(SHAPE, 0.0)))
    assert play(none) != play(make_attack("fgsm", eps=0.1)) and play(none) != play(none, seed=1)


def test_every_action_is_the_victim_s_on_what_it_was_shown(victim):
    shown, acted = [], []

    def attack(x, victim):
        shown.append(make_attack("fgsm", eps=0.1)(x, victim))
        return shown[-1]

    def goal(obs, action, reward, *rest):
        acted.append(action)
        return -reward

    evaluate(victim, attack, goal, "minipong", 2, 0, eps=0.1)
    assert all(torch.equal(victim.q(x).argmax(1), action) for x, action in zip(shown, acted, strict=True))


def test_a_broken_bound_and_a_changed_victim_are_errors(victim):
    with pytest.raises(RuntimeError, match="the bound is violated"):
        evaluate(victim, lambda x, v: (x + 0.2).clamp(0, 1), lose, "minipong", 2, 0, eps=0.1)
    with pytest.raises(RuntimeError, match="outside .0, 1."):
        evaluate(victim, lambda x, v: x + 0.2, lose, "minipong", 2, 0, eps=1.0)
    with pytest.raises(RuntimeError, match="the bound is violated: nan"):
        evaluate(victim, lambda x, v: x * float("nan"), lose, "minipong", 2, 0, eps=1.0)

    def vandal(x, victim):
        victim.module[-1].bias.data += 1e-3
        return x

    with pytest.raises(RuntimeError, match="weights changed"):
        evaluate(victim, vandal, lose, "minipong", 2, 0)


def test_frames_perturbs_the_newest_frame_only():
    memory, fresh = Frames(), torch.tensor([True, True])
    a, b, c = (torch.rand(2, 3, 4, 4) for _ in range(3))
    assert torch.equal(memory(a, fresh), a)
    second = memory(b, torch.tensor([False, True]))
    assert torch.equal(second[0], torch.cat([a[0, 1:], b[0, -1:]])) and torch.equal(second[1], b[1])
    third = memory(c, torch.tensor([False, False]))
    assert torch.equal(third[0], torch.stack([a[0, 2], b[0, 2], c[0, 2]]))


def made_up(returns, steps):
    episodes = {
        name: np.zeros(len(steps)) for name in ("victim_return", "misses", "flips", "crossings", "hits", "l2", "l0")
    }
    episodes |= {"adv_return": np.array(returns, float), "steps": np.array(steps, float)}
    return Evaluation(episodes, 0.0, 0.0, np.zeros(20, int), float("nan"), "", 1, {})


def test_rates_are_ratios_of_sums_and_the_lead_covers_the_truth():
    uneven = made_up([10, 0], [100, 900])
    assert uneven.rate() == 10 and "hit_fraction" not in uneven.metrics()
    rng = np.random.default_rng(0)
    strong, weak = (made_up(rng.normal(m, 1, 200), [100] * 200) for m in (3, 1))
    draws = bootstrap_rate(strong, 500, rng)
    assert abs(draws.mean() - strong.rate()) < 0.5 and 0.3 < draws.std() < 1.1
    found = lead(strong, {"weak": weak, "weaker": made_up([0] * 200, [100] * 200)})
    assert 0 < found["lead_low"] < found["lead"] == strong.rate() - weak.rate() < found["lead_high"]
    assert lead(weak, {"weak": weak})["lead_low"] < 0


def landed(counts):
    return replace(
        made_up([0], [1]), landings=np.array(counts), landing_mean=float(np.average(range(3), weights=counts))
    )


def test_landings_are_compared_by_rank():
    found = landing_shift(landed([60, 30, 10]), landed([10, 30, 60]))
    expected = mannwhitneyu([0] * 60 + [1] * 30 + [2] * 10, [0] * 10 + [1] * 30 + [2] * 60).pvalue
    assert found == {"landing_shift": -1.0, "landing_p": expected} and expected < 1e-9
    assert landing_shift(landed([10, 10, 10]), landed([20, 20, 20]))["landing_p"] > 0.99


def test_packed_frames_come_back():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    assert np.array_equal(unpack(json.loads(json.dumps(pack(frames)))), frames)


def test_the_sums_of_two_games():
    """One episode is counted of each; the first ends after two steps, the second after three, then both play on."""
    tally, device = _Tally(2, 1, torch.device("cpu")), torch.device("cpu")
    nan = float("nan")
    steps = [  # adversarial, own, flipped, position, l2, l0, valid, over
        ([1, 0], [0, 0], [1, 0], [0.04, nan], [0.1, 0.2], [0.5, 0.1], [1, 1], [0, 0]),
        ([-1, 1], [-1, 0], [0, 1], [nan, 0.96], [0.3, 0.0], [0.1, 0.0], [1, 1], [1, 0]),
        ([9, 0], [9, 1], [1, 1], [0.5, 1.0], [9, 0.5], [9, 0.2], [0, 1], [0, 1]),  # a dummy step of the first
        ([9, 9], [-9, -9], [1, 1], [0.5, 0.5], [9, 9], [9, 9], [1, 0], [1, 1]),  # both are done
    ]
    for number, (adversarial, own, flipped, position, l2, l0, valid, over) in enumerate(steps):
        frames = np.full((2, 1, 1, 1), number, np.uint8)
        tally.see(torch.from_numpy(frames))
        tally.add(
            torch.tensor(adversarial, dtype=torch.float32), torch.tensor(own, dtype=torch.float32),
            torch.tensor(flipped, dtype=torch.bool), torch.tensor(position), torch.tensor(l2), torch.tensor(l0),
            valid=torch.tensor(valid, dtype=torch.bool, device=device), over=torch.tensor(over, dtype=torch.bool),
        )  # fmt: skip
        assert tally.complete == (number >= 2)
    found = tally.evaluation("hash", {})
    expected = {
        "adv_return": [0, 1], "victim_return": [-1, 1], "steps": [2, 3], "misses": [1, 0], "flips": [1, 2],
        "crossings": [1, 2], "hits": [1, 1], "l2": [0.4, 0.7], "l0": [0.6, 0.3],
    }  # fmt: skip
    assert {name: pytest.approx(each.tolist()) for name, each in found.episodes.items()} == expected
    assert np.flatnonzero(found.landings).tolist() == [0, 19] and found.landings.tolist()[19] == 2
    assert found.landing_mean == pytest.approx(2 / 3) and found.distinct == 2 and found.trajectory == "hash"
    metrics = found.metrics()
    assert metrics == {
        "adv_rate": pytest.approx(200), "adv_return": 0.5, "victim_return": 0, "miss_rate": pytest.approx(200),
        "flip_rate": pytest.approx(0.6), "linf": 0, "excess": 0, "l2": pytest.approx(1.1 / 5),
        "l0_share": pytest.approx(0.9 / 5), "episode_steps": 2.5, "landing_mean": pytest.approx(2 / 3),
        "hit_fraction": pytest.approx(2 / 3),
    }  # fmt: skip


def test_the_worst_step_of_all_is_kept():
    tally = _Tally(1, 1, torch.device("cpu"))
    x = torch.tensor([[[[0.5, 0.5, 0.5, 0.5]]]])
    l2, share = tally.bounded(torch.tensor([[[[0.8, 0.9, 0.5, 0.5]]]]), x, 0.5, "linf")
    assert (l2.item(), share.item()) == (pytest.approx(0.5), 0.5)
    tally.bounded(x + 0.1, x, 0.5, "linf")
    tally.check()
    assert tally.worst.tolist() == [pytest.approx(0.4), 0, 0]
    tally.bounded(torch.tensor([[[[0.8, 0.9, 0.5, 0.5]]]]), x, 0.45, "l2")
    assert tally.worst[1].item() == pytest.approx(0.05)
    with pytest.raises(RuntimeError, match="the bound is violated: 0.05 above eps, 0 outside"):
        tally.check()
    free = _Tally(1, 1, torch.device("cpu"))
    free.bounded(x + 0.4, x, None, "linf")
    free.check()
    free.bounded(x + 0.6, x, None, "linf")
    with pytest.raises(RuntimeError, match=r"0 above eps, 0.1 outside \[0, 1\]"):
        free.check()


def test_a_lead_s_interval_is_that_of_its_draws():
    rng = np.random.default_rng(5)
    attack, rival, other = (made_up(rng.normal(m, 1, 30), rng.integers(50, 150, 30)) for m in (2, 1, 0.9))
    found = lead(attack, {"rival": rival, "other": other}, draws=100, seed=3)
    rng = np.random.default_rng(3)
    best = np.maximum(bootstrap_rate(rival, 100, rng), bootstrap_rate(other, 100, rng))
    draws = bootstrap_rate(attack, 100, rng) - best
    assert (found["lead_low"], found["lead_high"]) == tuple(np.quantile(draws, [0.025, 0.975]))
    assert found["lead"] == attack.rate() - max(rival.rate(), other.rate())
    resampled = bootstrap_rate(made_up([3, 0], [100, 300]), 1000, np.random.default_rng(0))
    assert set(np.round(resampled, 3)) == {30.0, 7.5, 0.0}
    misses = bootstrap_rate(attack, 5, np.random.default_rng(0), "misses")
    assert misses.tolist() == [0] * 5


def test_success_is_strictly_above_the_bar():
    nothing = made_up(range(101), [1] * 101)  # its 95th percentile is 95
    assert success_share(made_up([95, 96, 200, 0], [1] * 4), nothing) == 0.5
