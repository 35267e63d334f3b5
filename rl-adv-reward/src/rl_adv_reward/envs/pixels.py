"""Positions of ball and paddle, read from clean frames on their device. Pure functions.

Positions are shares of the field's length, 0 at its top (Breakout: left) and 1 at its bottom (right); NaN if
nothing was seen. Pong at 84 x 84: background 87, ball and walls 236, paddles 147 and 148; the enemy's paddle covers
columns 8 to 10, the agent's 73 to 75. Against RAM: row = (y - 12) * 0.4 - 0.5, column = (x - 48) * 0.525 - 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

PONG_BACKGROUND, CONTRAST = 87, 20
PONG_TOP, PONG_HEIGHT = 13.3, 64.0  # rows of an 84 x 84 frame: the field's 160 pixels
PONG_BALL_ROWS = slice(15, 76)
PONG_BALL_COLUMNS = (slice(0, 7), slice(12, 72))  # right and left of the enemy's paddle
PONG_LINE = 10.0  # column of the enemy's line (RAM x = 68)
PONG_AGENT = slice(73, 76)
PONG_FASTEST = 4.5  # columns per step
BALL_PIXELS = 16  # more are not a ball but the zero padding before an episode's first frame
BREAKOUT_ROW, BREAKOUT_FIELD = 75, slice(4, 80)


def pong_ball(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the ball.

    Args:
        frames: (..., 84, 84) uint8.

    Returns:
        row and column (...,) float32, within a pixel of the RAM's; NaN if the ball is out of play or hidden in the
        columns of a paddle.
    """
    contrast = (frames.float() - PONG_BACKGROUND).abs()
    contrast = contrast * (contrast > CONTRAST)
    weight = torch.zeros_like(contrast)
    for columns in PONG_BALL_COLUMNS:
        weight[..., PONG_BALL_ROWS, columns] = contrast[..., PONG_BALL_ROWS, columns]
    total = weight.sum((-2, -1))
    total = total.masked_fill((total == 0) | ((weight > 0).sum((-2, -1)) > BALL_PIXELS), torch.nan)
    index = torch.arange(84, dtype=torch.float32, device=frames.device)
    return weight.sum(-1) @ index / total, weight.sum(-2) @ index / total


def pong_crossing(obs: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """Where the ball reached the enemy's line in this step, returned or not: extrapolated from its last two positions.

    It counts if the ball flew left close to the line in the two previous frames and is now hidden, past the line, or
    on its way back. Accurate to one step of the crossing in RAM.

    Args:
        obs: (N, 4, 84, 84) uint8 before the step.
        next_obs: (N, 4, 84, 84) uint8 after it.
        info: not used.

    Returns:
        (N,) positions, NaN if it did not.
    """
    row, column = pong_ball(torch.cat([obs[:, -2:], next_obs[:, -1:]], 1))  # (N, 3)
    speed = column[:, 1] - column[:, 0]
    near = (speed < 0) & (column[:, 1] > PONG_LINE) & (column[:, 1] < PONG_LINE + 2 + PONG_FASTEST)
    gone = column[:, 2].isnan() | (column[:, 2] < PONG_LINE) | (column[:, 2] > column[:, 1])
    landing = row[:, 1] + (row[:, 1] - row[:, 0]) * (PONG_LINE - column[:, 1]) / speed
    position = ((landing - PONG_TOP) / PONG_HEIGHT).clamp(0, 1)
    return position.masked_fill(~(near & gone), torch.nan)


def pong_goal(obs: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """Where the ball was last seen, newest frame first; for steps with a goal. (N,) positions."""
    row, _ = pong_ball(torch.cat([obs, next_obs[:, -1:]], 1))  # (N, 5), oldest first
    last = torch.full_like(row[:, 0], torch.nan)
    for each in row.unbind(1):
        last = torch.where(each.isnan(), last, each)
    return (last - PONG_TOP) / PONG_HEIGHT


def pong_paddle(next_obs: Tensor, info: dict) -> Tensor:
    """Centre of the agent's paddle in the newest frame, (N,) positions."""
    field = slice(int(PONG_TOP) + 1, int(PONG_TOP + PONG_HEIGHT))
    seen = ((next_obs[:, -1, field, PONG_AGENT].float() - PONG_BACKGROUND).abs() > CONTRAST).float().sum(2)
    rows = torch.arange(field.start, field.stop, dtype=torch.float32, device=seen.device)
    return (seen @ rows / seen.sum(1) - PONG_TOP) / PONG_HEIGHT


def breakout_paddle(next_obs: Tensor, info: dict) -> Tensor:
    """Centre of the paddle in the newest frame, (N,) positions from left to right."""
    seen = (next_obs[:, -1, BREAKOUT_ROW, BREAKOUT_FIELD].float() > CONTRAST).float()
    columns = torch.arange(seen.shape[1], dtype=torch.float32, device=seen.device) + 0.5
    return seen @ columns / seen.sum(1) / seen.shape[1]


def minipong_crossing(obs: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """The simulator's landing row (a frame of 10 rows would round it), (N,) positions."""
    y = torch.as_tensor(info["crossing_y"], dtype=torch.float32, device=obs.device)
    return ((y + 0.5) / 10).masked_fill(y < 0, torch.nan)


def minipong_paddle(next_obs: Tensor, info: dict) -> Tensor:
    """Centre of the victim's paddle, 4 of 10 rows, (N,) positions."""
    return (torch.as_tensor(info["top"], dtype=torch.float32, device=next_obs.device) + 2) / 10
