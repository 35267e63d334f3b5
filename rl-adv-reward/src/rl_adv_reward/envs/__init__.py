"""The environments, by name; importing this registers MiniPong with gymnasium."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from rl_adv_reward.envs.minipong import BACKGROUND, MiniPongVec

if "MiniPong-v0" not in gym.registry:
    gym.register(
        "MiniPong-v0",
        entry_point="rl_adv_reward.envs.minipong:MiniPong",
        vector_entry_point="rl_adv_reward.envs.minipong:MiniPongVec",
    )


@dataclass(frozen=True)
class Environment:
    """What training and evaluation must know about an environment."""

    make: Callable[..., VectorEnv]
    """makes a vector environment from the number of environments and, optionally, the maximal steps of an episode"""
    network: str
    """the victim's network"""
    background: float
    """grey value of most pixels, in [0, 1]; networks subtract it"""
    padding: str
    """fills a stack before an episode's first frame: "first" (that frame, repeated) or "zero" """
    gate: str
    """evaluation metric that decides whether a victim is good enough to be attacked ..."""
    bounds: tuple[float, float]
    """... which must be between these values"""

    def short_of(self, value: float) -> float:
        """Distance of a victim's metric from the gate's bounds; 0: it may be attacked."""
        return max(self.bounds[0] - value, value - self.bounds[1], 0.0)


def atari(game: str) -> Callable[..., VectorEnv]:
    """Maker of ale-py's vector environment: 84 x 84 grey, stack of 4, skip of 4 with the maximum over the last two.

    Sticky actions (the last action is repeated with probability 0.25, Machado et al. 2018): without them a greedy
    victim plays only a few different episodes. Up to 30 no-ops at reset, unclipped reward, NEXT_STEP.
    """

    def make(num_envs: int, episode_steps: int = 27_000) -> VectorEnv:
        from ale_py.vector_env import AtariVectorEnv

        return AtariVectorEnv(
            game,
            num_envs,
            frameskip=4,
            max_num_frames_per_episode=4 * episode_steps,
            stack_num=4,
            noop_max=30,
            repeat_action_probability=0.25,
            reward_clipping=False,
            use_fire_reset=True,
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )

    return make


ENVIRONMENTS = {
    "minipong": Environment(MiniPongVec, "mlp", BACKGROUND / 255, "first", "miss_rate", (0, 5)),
    "pong": Environment(atari("pong"), "nature", 0.0, "zero", "victim_return", (10, math.inf)),
    "breakout": Environment(atari("breakout"), "nature", 0.0, "zero", "victim_return", (30, math.inf)),
}


def make_envs(name: str, num_envs: int, episode_steps: int = 0) -> VectorEnv:
    """Make and check a vector environment; episodes are cut off after `episode_steps`, 0: the game's default.

    ValueError for an unknown name or as in `check_envs`.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"env must be one of {', '.join(ENVIRONMENTS)}, got {name!r}")
    envs = ENVIRONMENTS[name].make(num_envs, *([episode_steps] if episode_steps else []))
    check_envs(envs)
    return envs


def sizes(name: str) -> tuple[tuple[int, int, int], int]:
    """Shape (C, H, W) of an environment's observations, and its number of actions."""
    envs = make_envs(name, 1)
    channels, height, side = cast(gym.spaces.Box, envs.single_observation_space).shape
    n_actions = int(cast(gym.spaces.Discrete, envs.single_action_space).n)
    envs.close()
    return (channels, height, side), n_actions


def check_envs(envs: VectorEnv) -> None:
    """Training and evaluation need image stacks in uint8, discrete actions and NEXT_STEP.

    Raises:
        ValueError: says what was expected and what it got.
    """
    check_image_space(envs.single_observation_space)
    if envs.single_observation_space.dtype != np.uint8:
        raise ValueError(f"observations must be uint8 for the replay, got {envs.single_observation_space.dtype}")
    if not isinstance(envs.single_action_space, gym.spaces.Discrete):
        raise ValueError(f"actions must be Discrete, got {envs.single_action_space}")
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise ValueError(f"autoreset_mode must be {AutoresetMode.NEXT_STEP}, got {mode}")


def check_image_space(space: gym.Space) -> None:
    """ValueError unless the space is Box(0, 255, (C, H, W), uint8) or Box(0, 1, (C, H, W), float32)."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 3:
        raise ValueError(f"observations must be a Box of shape (C, H, W), got {space}")
    high = {np.dtype(np.uint8): 255, np.dtype(np.float32): 1}.get(space.dtype)
    if high is None:
        raise ValueError(f"observations must be uint8 or float32, got {space.dtype}")
    if space.low.min() != 0 or space.high.max() != high:
        raise ValueError(
            f"{space.dtype} observations must lie in [0, {high}], got [{space.low.min()}, {space.high.max()}]"
        )


def inventory() -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    import importlib.resources

    import ale_py

    rows: list[tuple[str, ...]] = [("MiniPong", "smoke, embedded", "", "MIT", "yes", "made by the project", "")]
    for game, scales in (("pong", "atari-short, paper"), ("breakout", "paper")):
        rom = importlib.resources.files("ale_py") / "roms" / f"{game}.bin"
        found, mend = ("yes", "") if rom.is_file() else ("no", "pip install --force-reinstall ale-py")
        rows.append((f"ALE/{game}", scales, "2 kB", "", found, f"inside ale-py {ale_py.__version__}", mend))
    return rows
