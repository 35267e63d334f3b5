"""A replay on the device: stores single uint8 frames in order; sampling rebuilds stacks and n-step returns.

A row holds one step of all environments. In NEXT_STEP mode the row after an end holds the true final frame and the
dummy action that resets, so the observation after any step is the stack at the next row; the dummy step is marked
as invalid and has weight 0 when it is drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl_adv_reward.dqn import window_returns


class Batch(NamedTuple):
    """B n-step transitions."""

    obs: Tensor  # (B, C, H, W) uint8
    action: Tensor  # (B,) int64
    returns: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: no bootstrap
    discount: Tensor  # (B,) float32, for the bootstrap
    next_obs: Tensor  # (B, C, H, W) uint8, after up to n steps
    weight: Tensor  # (B,) float32: 0 for dummy steps


class Replay:
    """Ring of `capacity // num_envs` rows.

    Args:
        capacity: number of transitions.
        num_envs: environments per row.
        obs_shape: (C, H, W), C frames of a stack, oldest first.
        padding: fills stacks before an episode's first frame: "first" (that frame, repeated) or "zero".
        device: device of the replay.

    Raises:
        ValueError: the capacity is too small for a stack and a return.
    """

    def __init__(
        self, capacity: int, num_envs: int, obs_shape: tuple[int, int, int], padding: str, device: torch.device | str
    ):
        self.stack, self.padding = obs_shape[0], padding
        self.rows, self.num_envs, self.device = capacity // num_envs, num_envs, device
        if self.rows <= self.stack + 1:
            raise ValueError(f"capacity must be above {(self.stack + 1) * num_envs}, got {capacity}")
        row = (self.rows, num_envs)
        self.frames = torch.zeros(*row, *obs_shape[1:], dtype=torch.uint8, device=device)
        self.age = torch.zeros(row, dtype=torch.int64, device=device)
        self.action = torch.zeros(row, dtype=torch.int64, device=device)
        self.reward = torch.zeros(row, device=device)
        self.terminated, self.truncated, self.valid = (
            torch.zeros(row, dtype=torch.bool, device=device) for _ in range(3)
        )
        self.head = self.size = 0

    def add(
        self,
        obs: Tensor,
        age: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        valid: Tensor,
    ) -> None:
        """Add one step of all environments: obs (N, C, H, W) uint8 is the clean one before it, `age` steps old."""
        row = self.head
        self.frames[row] = obs[:, -1]
        for name, value in (("age", age), ("action", action), ("reward", reward), ("valid", valid)):
            getattr(self, name)[row] = value
        self.terminated[row], self.truncated[row] = terminated, truncated
        self.head = (row + 1) % self.rows
        self.size = min(self.size + 1, self.rows)

    def sample(self, batch_size: int, n_step: int = 1, gamma: float = 1.0) -> Batch:
        """Draw transitions uniformly among those whose whole return is stored. ValueError if there are too few rows."""
        first, last = self.stack - 1, self.size - n_step
        if last <= first:
            raise ValueError(f"{self.size} stored steps hold no return of {n_step} steps after a stack of {self.stack}")
        row = torch.randint(first, last, (batch_size,), device=self.device)
        env = torch.randint(self.num_envs, (batch_size,), device=self.device)
        if self.size == self.rows:
            row = row + self.head
        window = (row + torch.arange(n_step, device=self.device)[:, None]) % self.rows  # (n, B)
        returns, terminated, discount, steps = window_returns(
            self.reward[window, env], self.terminated[window, env], self.truncated[window, env], gamma
        )
        now = row % self.rows
        both = self.stacked(torch.cat([now, (row + steps) % self.rows]), torch.cat([env, env]))
        obs, next_obs = both.split(batch_size)
        weight = self.valid[now, env].float()
        return Batch(obs, self.action[now, env], returns, terminated, discount, next_obs, weight)

    def stacked(self, row: Tensor, env: Tensor) -> Tensor:
        """The original observation (B, C, H, W) at rows (B,) of environments (B,)."""
        back = torch.arange(self.stack - 1, -1, -1, device=self.device)  # oldest first
        age = self.age[row, env][:, None]
        frames = self.frames[(row[:, None] - torch.minimum(back, age)) % self.rows, env[:, None]]
        if self.padding == "zero":
            frames = frames.masked_fill((back > age)[..., None, None], 0)
        return frames

    def cut(self, n_step: int) -> None:
        """Mark a break in the stream (environments that could not be restored): no return may span it."""
        rows = (self.head - 1 - torch.arange(min(n_step, self.size), device=self.device)) % self.rows
        self.valid[rows] = False

    NAMES = ("frames", "age", "action", "reward", "terminated", "truncated", "valid")

    def state(self) -> dict:
        """The used part, for a checkpoint."""
        return {name: getattr(self, name)[: self.size].cpu() for name in self.NAMES} | {"head": self.head}

    def restore(self, state: dict) -> None:
        """Restore a `state`."""
        self.head, self.size = state["head"], len(state["action"])
        for name in self.NAMES:
            getattr(self, name)[: self.size] = state[name].to(self.device)
