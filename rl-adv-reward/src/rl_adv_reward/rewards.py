"""Adversarial rewards: pure functions of one transition of the clean game, batched on the device.

Signature of all rewards, built in or the user's own:
`reward(obs, action, reward, terminated, next_obs, info) -> (N,) float32`, with obs and next_obs (N, C, H, W) uint8,
action (N,) int64, reward (N,) the game's own unclipped reward, terminated (N,) bool, info the environment's
dictionary. None has memory, so the end of an episode needs no special treatment.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rl_adv_reward.envs import pixels

Position = Callable[..., Tensor]

CROSSING: dict[str, Position] = {"minipong": pixels.minipong_crossing, "pong": pixels.pong_crossing}
PADDLE: dict[str, Position] = {
    "minipong": pixels.minipong_paddle,
    "pong": pixels.pong_paddle,
    "breakout": pixels.breakout_paddle,
}
GOAL: dict[str, Position] = {"pong": pixels.pong_goal, "minipong": pixels.minipong_crossing}


class AdversarialReward(Protocol):
    """The signature of a reward; see the module's docstring."""

    def __call__(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict
    ) -> Tensor: ...


@dataclass(frozen=True)
class Zone:
    """+1 when the ball reaches the enemy's line within [low, high] of the field, returned or not; -penalty per miss."""

    position: Position
    low: float
    high: float
    miss_penalty: float = 1.0

    def __call__(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict
    ) -> Tensor:
        return inside(self.position(obs, next_obs, info), self) - self.miss_penalty * (reward < 0)


@dataclass(frozen=True)
class GoalZone:
    """+1 when the victim scores within [low, high] of the enemy's line; -penalty per miss."""

    position: Position
    low: float
    high: float
    miss_penalty: float = 1.0

    def __call__(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict
    ) -> Tensor:
        hit = inside(self.position(obs, next_obs, info), self) * (reward > 0)
        return hit - self.miss_penalty * (reward < 0)


@dataclass(frozen=True)
class PaddleZone:
    """`bonus` for every step in which the victim's paddle (its centre) is within [low, high]; -penalty per miss."""

    position: Position
    low: float
    high: float
    miss_penalty: float = 1.0
    bonus: float = 0.1

    def __call__(
        self, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict
    ) -> Tensor:
        return self.bonus * inside(self.position(next_obs, info), self) - self.miss_penalty * (reward < 0)


def lose(obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """The victim's reward, negated."""
    return -reward.float()


def inside(position: Tensor, zone: Zone | GoalZone | PaddleZone) -> Tensor:
    """1.0 within the zone, otherwise (and for NaN) 0.0."""
    return ((position >= zone.low) & (position <= zone.high)).float()


THIRD = 1 / 3
PARK = 0.22  # includes the paddle's centre at the very edge: row 0 in MiniPong, 0.2
KINDS: dict[str, tuple[type[Zone | GoalZone | PaddleZone], dict[str, Position], dict[str, float]]] = {
    "zone": (Zone, CROSSING, {}),
    "aim_top": (Zone, CROSSING, {"low": 0.0, "high": THIRD}),
    "aim_bottom": (Zone, CROSSING, {"low": 2 * THIRD, "high": 1.0}),
    "centre_line": (Zone, CROSSING, {"low": THIRD, "high": 2 * THIRD}),
    "centre_line_paper": (Zone, CROSSING, {"low": 0.375, "high": 0.625, "miss_penalty": 0.0}),
    "centre_goal": (GoalZone, GOAL, {"low": THIRD, "high": 2 * THIRD}),
    "paddle_zone": (PaddleZone, PADDLE, {}),
    "park": (PaddleZone, PADDLE, {"low": 0.0, "high": PARK}),
}
REWARDS = (*KINDS, "lose")


def make_reward(name: str, env: str, **options: float) -> AdversarialReward:
    """A reward by name, or the user's own function as "module:function".

    Args:
        name: one of REWARDS. "centre_line_paper" is closest to the paper's drawing: 1 in the middle quarter of the
            enemy's line, no penalty; "zone" and "paddle_zone" need low and high.
        env: minipong, pong or breakout; determines how positions are read.
        **options: low, high, miss_penalty, and bonus (paddle zones); replace the preset's.

    Raises:
        ValueError: an unknown name or option, an environment without that position, or not 0 <= low <= high <= 1.
    """
    if ":" in name:
        return _imported(name)
    if name == "lose":
        return lose
    if name not in KINDS:
        raise ValueError(f"goal must be one of {', '.join(REWARDS)} or module:function, got {name!r}")
    kind, positions, preset = KINDS[name]
    if env not in positions:
        raise ValueError(f"goal {name!r} is defined for {', '.join(positions)}, not for {env!r}")
    try:
        reward = kind(positions[env], **(preset | options))
    except TypeError as error:
        raise ValueError(f"goal {name!r}: {error}") from error
    if not 0 <= reward.low <= reward.high <= 1:
        raise ValueError(f"goal {name!r}: expected 0 <= low <= high <= 1, got {reward.low} and {reward.high}")
    return reward


def _imported(name: str) -> AdversarialReward:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"goal {name!r} cannot be imported: {error}") from error


def crossing(env: str, obs: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """Landing positions (N,) on the enemy's line in this step, NaN if the ball did not reach it."""
    if env not in CROSSING:
        return torch.full((len(obs),), torch.nan, device=obs.device)
    return CROSSING[env](obs, next_obs, info)
