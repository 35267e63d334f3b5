"""Policies that learn nothing: targets of targeted attacks and references, which an attacker would try first.

A goal that a constant action reaches needs no sequential attack. So every table includes each constant action and a
hand-written policy for the goal, both as the target of an attack and under full control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_adv_reward.envs import pixels
from rl_adv_reward.envs.minipong import BALL, PADDLE, SIZE, VICTIM

Policy = Callable[[Tensor], Tensor]
"""maps (N, C, H, W) in [0, 1] to actions (N,) int64"""


@dataclass(frozen=True)
class Constant:
    """Always the same action."""

    action: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.action, dtype=torch.int64, device=x.device)


@dataclass(frozen=True)
class MiniPongAim:
    """Hits each ball so that it flies to a given row of the enemy's line; hand-written, reads clean frames.

    The angle depends on where the ball hits the paddle: with `offset` half the distance between ball and paddle's
    centre, the ball leaves with offset / 2 rows per step and flies SIZE - 3 steps.
    """

    target: float
    """position on the enemy's line as a share of it, 0 at its top"""

    def __call__(self, x: Tensor) -> Tensor:
        frames = (255 * x).round()
        weight = (frames == BALL).float()  # (N, 2, 10, 10)
        index = torch.arange(SIZE, dtype=torch.float32, device=x.device)
        seen = weight.sum((2, 3)).clamp_min(1)
        row, column = (weight.sum(3) @ index / seen), (weight.sum(2) @ index / seen)  # (N, 2)
        top = ((frames[:, -1, :, -1] == VICTIM).float() * torch.arange(SIZE, 0, -1, device=x.device)).argmax(1)

        speed = row[:, 1] - row[:, 0]
        arrival = reflected(row[:, 1] + speed * (SIZE - 2 - column[:, 1]))
        tops = torch.arange(SIZE - PADDLE + 1, dtype=torch.float32, device=x.device)
        offset = (arrival[:, None] - (tops + (PADDLE - 1) / 2)) / 2  # (N, 7)
        landing = reflected(arrival[:, None] + offset / 2 * (SIZE - 3))
        wanted = self.target * SIZE - 0.5
        best = ((landing - wanted).abs() + 100 * (offset.abs() > 0.75)).argmin(1)
        approaching = column[:, 1] > column[:, 0]
        best = torch.where(approaching, best, (SIZE - PADDLE) // 2)
        return (best - top).sign() + 1


@dataclass(frozen=True)
class PongAim:
    """Hits each ball with the end of the paddle that sends it towards the target; hand-written, reads clean frames."""

    target: float
    """position on the enemy's line as a share of it, 0 at its top"""
    noop: int = 0
    up: int = 2
    down: int = 3

    def __call__(self, x: Tensor) -> Tensor:
        frames = (255 * x).round().to(torch.uint8)
        row, column = pixels.pong_ball(frames[:, -2:])
        paddle = pixels.pong_paddle(frames, {})
        ball = (row[:, 1] - pixels.PONG_TOP) / pixels.PONG_HEIGHT
        approaching = column[:, 1] > column[:, 0]
        wanted = torch.where(approaching, ball - 0.08 * (self.target - 0.5), torch.full_like(ball, 0.5))
        away = wanted - paddle
        action = torch.where(away < -0.03, self.up, torch.where(away > 0.03, self.down, self.noop))
        return action.masked_fill(away.isnan(), self.noop)


def reflected(row: Tensor) -> Tensor:
    """Reflect rows beyond the walls (at 0 and SIZE - 1) back into the field."""
    return (SIZE - 1) - ((row % (2 * (SIZE - 1))) - (SIZE - 1)).abs()


SCRIPTED: dict[str, Callable[[float], Policy]] = {"minipong": MiniPongAim, "pong": PongAim}


def make_policy(name: str, env: str, zone: tuple[float, float] | None, n_actions: int) -> Policy:
    """A policy that learns nothing, by name.

    Args:
        name: an action's number, or "scripted".
        env: minipong, pong or breakout.
        zone: ends of the goal's zone on the enemy's line; "scripted" aims at its middle.
        n_actions: number of actions of the environment.

    Raises:
        ValueError: an unknown name, an action that the environment does not have, or no script for this goal.
    """
    if name.isdigit():
        if int(name) >= n_actions:
            raise ValueError(f"target {name}: {env} has actions 0 to {n_actions - 1}")
        return Constant(int(name))
    if name != "scripted":
        raise ValueError(f"target must be an action's number, scripted or critic, got {name!r}")
    if env not in SCRIPTED or zone is None:
        raise ValueError(f"target scripted: scripts exist only for goals on the enemy's line of {', '.join(SCRIPTED)}")
    return SCRIPTED[env](sum(zone) / 2)
