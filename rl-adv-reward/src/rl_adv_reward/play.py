"""Many environments stepped together as clean transitions; used by training and evaluation."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from rl_adv_reward.envs import make_envs
from rl_adv_reward.envs.minipong import MiniPongVec
from rl_adv_reward.rewards import AdversarialReward


class Play:
    """Environments in NEXT_STEP mode, with clean observations on the device and their age."""

    def __init__(self, env: str, num_envs: int, seed: int, device: torch.device, episode_steps: int = 0):
        self.envs = make_envs(env, num_envs, episode_steps)
        self.device = device
        self.obs = self._upload(self.envs.reset(seed=seed)[0])  # (N, C, H, W) uint8
        self.age = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.over = torch.zeros(num_envs, dtype=torch.bool, device=device)

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array).to(self.device, copy=True)

    def step(self, action: Tensor, goal: AdversarialReward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict]:
        """Step: adversarial reward, game's reward, terminated, truncated, valid (all (N,)), and info; updates `obs`.

        If an episode ended in the step before, this step only resets it: valid is False.
        """
        array, own, terminated, truncated, info = self.envs.step(action.cpu().numpy())
        next_obs, own = self._upload(array), self._upload(own).float()
        terminated, truncated = self._upload(terminated), self._upload(truncated)
        adversarial = goal(self.obs, action, own, terminated, next_obs, info)
        valid = ~self.over
        self.age = torch.where(self.over, 0, self.age + 1)
        self.over = terminated | truncated
        self.last_obs, self.obs = self.obs, next_obs
        return adversarial, own, terminated, truncated, valid, info

    def state(self) -> dict | None:
        """State for a checkpoint; None if the environments cannot save theirs."""
        if not hasattr(self.envs, "state"):
            return None
        envs = {k: torch.from_numpy(v) if hasattr(v, "dtype") else v for k, v in self.envs.state().items()}
        return {"envs": envs, "obs": self.obs.cpu(), "age": self.age.cpu(), "over": self.over.cpu()}

    def restore(self, state: dict) -> None:
        """Restore a `state`."""
        envs = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in state["envs"].items()}
        cast(MiniPongVec, self.envs).restore(envs)
        self.obs, self.age, self.over = (state[name].to(self.device) for name in ("obs", "age", "over"))
