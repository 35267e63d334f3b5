"""What an attacker tries first: constant actions and scripts; and that the goal of the headline needs more."""

import numpy as np
import pytest
import torch

from rl_adv_reward.attacks import make_attack, none
from rl_adv_reward.envs import make_envs
from rl_adv_reward.envs.minipong import BACKGROUND, BALL, VICTIM
from rl_adv_reward.evaluation import evaluate
from rl_adv_reward.experiments import SEEDS, seed_of
from rl_adv_reward.models import Victim, mlp
from rl_adv_reward.policies import Constant, MiniPongAim, PongAim, make_policy, reflected
from rl_adv_reward.rewards import make_reward


def test_reflected_rows_are_those_of_a_ball_between_walls():
    row, speed, rows = 3.0, 0.7, []
    for _ in range(40):
        row += speed
        if row < 0 or row > 9:
            row, speed = (-row if row < 0 else 18 - row), -speed
        rows.append(row)
    unfolded = 3.0 + 0.7 * torch.arange(1, 41)
    torch.testing.assert_close(reflected(unfolded), torch.tensor(rows), atol=1e-4, rtol=0)


def board(ball_before, ball_now, top):
    frames = torch.full((1, 2, 10, 10), BACKGROUND, dtype=torch.uint8)
    for number, (row, column) in enumerate((ball_before, ball_now)):
        frames[0, number, top : top + 4, 9] = VICTIM
        frames[0, number, row, column] = BALL
    return frames / 255


@pytest.mark.parametrize(
    "before, now, top, target, action",
    [
        ((5, 3), (5, 4), 3, 0.0, 2),  # a flat ball at row 5: met above the paddle's centre, it leaves upwards
        ((5, 3), (5, 4), 3, 1.0, 0),
        ((5, 6), (5, 5), 0, 0.0, 2),  # flying away: back to the middle
        ((5, 6), (5, 5), 3, 0.0, 1),
    ],
)
def test_the_script_of_minipong_meets_the_ball_on_the_right_side(before, now, top, target, action):
    assert MiniPongAim(target)(board(before, now, top)).tolist() == [action]


def rate(goal, policy, episodes=32):
    victim = Victim(mlp((2, 10, 10), 3))
    found = evaluate(victim, none, make_reward(goal, "minipong"), "minipong", episodes, 77, policy=policy)
    return found.rate()


def test_no_constant_action_earns_anything_on_the_headlines_goals_and_the_script_does():
    for goal, zone in (("aim_top", (0, 1 / 3)), ("aim_bottom", (2 / 3, 1))):
        assert max(rate(goal, Constant(action)) for action in range(3)) < 0
        assert rate(goal, make_policy("scripted", "minipong", zone, 3)) > 25
    assert rate("park", Constant(0)) > 25  # which is why park is no headline


def test_the_script_of_pong_returns_balls():
    envs = make_envs("pong", 2)
    try:
        obs, _ = envs.reset(seed=3)
        policy, scored = PongAim(1 / 6), np.zeros(2)
        for _ in range(500):
            obs, reward, *_ = envs.step(policy(torch.from_numpy(obs) / 255).numpy())
            scored += reward
    finally:
        envs.close()
    assert scored.mean() > -5, scored  # standing still loses ten points in that time


def test_targets_are_named_or_refused():
    assert make_policy("2", "minipong", None, 3)(torch.zeros(4, 2, 10, 10)).tolist() == [2] * 4
    for name, env, zone, message in (
        ("3", "minipong", None, "actions 0 to 2"),
        ("up", "minipong", None, "an action's number, scripted or critic"),
        ("scripted", "breakout", (0, 1), "of minipong, pong"),
        ("scripted", "minipong", None, "goals on the enemy's line"),
    ):
        with pytest.raises(ValueError, match=message):
            make_policy(name, env, zone, 3)


def test_mad_moves_the_whole_policy_further_than_a_random_sign():
    torch.manual_seed(0)
    victim = Victim(mlp((2, 10, 10), 3))
    x = torch.rand(16, 2, 10, 10)
    clean = victim.q(x).log_softmax(1)

    def divergence(name):
        attack = make_attack(name, eps=0.05, generator=torch.Generator().manual_seed(0))
        moved = victim.q(attack(x, victim)).log_softmax(1)
        return float((clean.exp() * (clean - moved)).sum())

    assert divergence("mad") > 3 * divergence("random-sign") > 0


def test_no_two_pieces_of_work_share_a_start():
    spans = sorted((seed_of(kind, seed), seed_of(kind, seed) + 63) for kind in SEEDS for seed in range(30))
    assert all(end < begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


def test_an_evaluation_counts_the_episodes_that_differ():
    victim = Victim(mlp((2, 10, 10), 3))
    found = evaluate(victim, none, make_reward("aim_top", "minipong"), "minipong", 32, 5)
    assert found.distinct == len(found.episodes["steps"]) == 32


def test_only_a_zone_on_the_enemys_line_has_a_hit_fraction():
    victim = Victim(mlp((2, 10, 10), 3))
    policy = make_policy("scripted", "minipong", (0, 1 / 3), 3)
    for goal, has in (("aim_top", True), ("park", False)):
        found = evaluate(victim, none, make_reward(goal, "minipong"), "minipong", 8, 5, policy=policy)
        assert ("hit_fraction" in found.metrics()) == has


def test_sticky_actions_make_every_episode_of_pong_another_one():
    """Thirty no-ops at most and a deterministic game gave 16 different episodes of 30."""
    envs = make_envs("pong", 12)
    try:
        obs, _ = envs.reset(seed=1)
        sums = [0] * 12
        for action in np.random.default_rng(0).integers(0, 6, 150):
            obs, *_ = envs.step(np.full(12, action))
            sums = [hash((before, frame.tobytes())) for before, frame in zip(sums, obs[:, -1], strict=True)]
    finally:
        envs.close()
    assert len(set(sums)) == 12
