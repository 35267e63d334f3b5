"""Pixel positions and rewards against the RAM of the recorded Pong game, and by hand on MiniPong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rl_adv_reward.envs import pixels
from rl_adv_reward.rewards import REWARDS, make_reward

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def trace():
    with np.load(GOLDEN / "pong_trace.npz") as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def stacks(trace):
    """(T, 4, 84, 84) after every step, and before it."""
    frames = torch.from_numpy(np.concatenate([trace["obs0"][None]] * 4 + [trace["obs"]]))
    windows = frames.unfold(0, 4, 1).permute(0, 3, 1, 2)  # window t ends at frame t + 3
    return windows[:-1], windows[1:]


def test_the_ball_is_within_a_pixel_of_the_ram(trace):
    row, column = pixels.pong_ball(torch.from_numpy(trace["obs"]))
    true_row, true_column = trace["ball_row84"], trace["ball_col84"]
    clear = trace["ball_in_play"] & (true_column > 12) & (true_column < 71) & (true_row > 15) & (true_row < 75)
    assert clear.sum() > 1000
    assert np.abs(row.numpy()[clear] - true_row[clear]).max() < 1
    assert np.abs(column.numpy()[clear] - true_column[clear]).max() < 1
    assert row.isnan().numpy()[~trace["ball_in_play"]][1:].mean() > 0.98  # at most the step in which it goes out


def test_zero_padding_is_no_ball():
    assert pixels.pong_ball(torch.zeros(2, 84, 84, dtype=torch.uint8))[0].isnan().all()


def test_crossings_of_the_enemy_line_agree_with_the_ram(trace, stacks):
    position = pixels.pong_crossing(*stacks, {})
    found = np.flatnonzero(~position.isnan().numpy())
    used = set()
    for step, y in zip(trace["enemy_line_step"], trace["enemy_line_ram_y"], strict=True):
        near = [t for t in found if abs(t - step) <= 1]
        assert len(near) == 1, step
        used.add(near[0])
        assert abs(float(position[near[0]]) - (y - 46.5) / 160) < 0.04, step  # field: RAM y 46.5 .. 206.5
    x = trace["ram"][:, 0].astype(int)
    for t in set(found) - used:  # the others: balls that the enemy returned up to two pixels before that line
        assert x[t - 2 : t + 3].min() <= 70


def test_goals_in_the_centre_third_agree_with_the_ram(trace, stacks):
    obs, next_obs = stacks
    steps = trace["goal_step"]
    reward = torch.from_numpy(trace["reward"])[steps]
    centre = make_reward("centre_goal", "pong")(obs[steps], None, reward, None, next_obs[steps], {})
    expected = trace["goal_in_centre_third"] * 1.0 - (trace["goal_sign"] < 0)
    assert np.array_equal(centre.numpy(), expected)
    assert trace["goal_in_centre_third"].any() and not trace["goal_in_centre_third"].all()


def test_the_agent_s_paddle_follows_the_ram(trace, stacks):
    position = pixels.pong_paddle(stacks[1], {}).numpy()
    ram = trace["ram"][:, 3].astype(float)  # top = ram - 15 + 0 .. 15 pixels, from raw row 34
    clear = (ram > 50) & (ram < 190)
    fit = np.polyfit(ram[clear], position[clear], 1)
    assert np.abs(np.polyval(fit, ram[clear]) - position[clear]).max() < 0.05 and abs(fit[0] - 1 / 160) < 2e-4


def minipong_step(crossing=(-1.0,), top=(3,), reward=(0.0,)):
    n = len(crossing)
    obs = torch.zeros(n, 2, 10, 10, dtype=torch.uint8)
    info = {"crossing_y": np.array(crossing), "top": np.array(top)}
    return obs, torch.zeros(n), torch.tensor(reward), torch.zeros(n, dtype=torch.bool), obs, info


def test_minipong_goals_by_hand():
    step = minipong_step(crossing=(2.8, 2.9, -1.0, -1.0), top=(0, 1, 0, 3), reward=(0.0, 0.0, -1.0, -1.0))
    assert make_reward("aim_top", "minipong")(*step).tolist() == [1, 0, -1, -1]
    torch.testing.assert_close(make_reward("park", "minipong")(*step), torch.tensor([0.1, 0.0, -0.9, -1.0]))
    assert make_reward("aim_top", "minipong", miss_penalty=0.0)(*step).tolist() == [1, 0, 0, 0]
    assert make_reward("lose", "minipong")(*step).tolist() == [0, 0, 1, 1]
    bottom = minipong_step(crossing=(6.1, 6.2), top=(3, 3), reward=(0.0, 0.0))
    assert make_reward("aim_bottom", "minipong")(*bottom).tolist() == [0, 1]
    assert make_reward("centre_line", "minipong")(*bottom).tolist() == [1, 0]


def test_the_user_s_own_reward_is_imported():
    assert make_reward("rl_adv_reward.rewards:lose", "pong")(*minipong_step()).tolist() == [0]


@pytest.mark.parametrize(
    "name, env, options, message",
    [
        ("prak", "pong", {}, "goal must be one of"),
        ("aim_top", "breakout", {}, "is defined for minipong, pong"),
        ("zone", "pong", {}, "low"),
        ("zone", "pong", {"low": 0.6, "high": 0.4}, "0 <= low <= high <= 1"),
        ("aim_top", "pong", {"bonus": 1.0}, "bonus"),
        ("nowhere:nothing", "pong", {}, "cannot be imported"),
    ],
)
def test_wrong_goals(name, env, options, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, env, **options)


def test_every_name_is_a_reward():
    for name in REWARDS:
        options = {"low": 0.1, "high": 0.2} if name in ("zone", "paddle_zone") else {}
        assert make_reward(name, "minipong", **options)(*minipong_step()).shape == (1,)
