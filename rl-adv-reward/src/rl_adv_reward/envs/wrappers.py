"""An attack between any gymnasium environment and any policy: only the policy's observations change."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rl_adv_reward.atn import check_bound, perturbation_size, project
from rl_adv_reward.attacks import Attack, HasValues
from rl_adv_reward.envs import check_image_space


class _Seen:
    """Shared by both wrappers: attacks a batch of observations."""

    def __init__(self, space: gym.Space, attack: Attack, victim: HasValues, eps: float, norm: str, device: str):
        check_image_space(space)
        check_bound(eps, norm)
        self.attack, self.victim, self.eps, self.norm, self.device = attack, victim, eps, norm, device
        self.bytes = space.dtype == np.uint8

    def __call__(self, obs: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Attack (N, C, H, W), keeping the dtype; uint8 stays within the bound after rounding."""
        x = torch.as_tensor(obs).to(self.device)
        x = x.float() / 255 if self.bytes else x
        x_adv = project(self.attack(x, self.victim), x, self.eps, self.norm, quantize=self.bytes)
        linf, l2, _ = perturbation_size(x_adv, x)
        if self.bytes:
            x_adv = (255 * x_adv).round().to(torch.uint8)
        return x_adv.cpu().numpy(), {"linf": linf.cpu().numpy(), "l2": l2.cpu().numpy()}


class AttackWrapper(gym.Wrapper):
    """For one environment. `info["attack"]` holds linf and l2 of the perturbation in [0, 1] and the clean observation.

    Args:
        env: has image stacks: Box(0, 255, (C, H, W), uint8) or Box(0, 1, (C, H, W), float32).
        attack: (x in [0, 1], victim) -> x'; see `attacks.make_attack` and `ATNAttack`.
        victim: passed to the attack; any policy may act, for example one of stable-baselines3.
        eps: bound, enforced here again.
        norm: linf or l2.
        device: where the attack is computed.

    Raises:
        ValueError: an unsupported observation space, or a bound out of range.
    """

    def __init__(
        self, env: gym.Env, attack: Attack, victim: HasValues, *, eps: float, norm: str = "linf", device: str = "cpu"
    ):
        super().__init__(env)
        self._seen = _Seen(env.observation_space, attack, victim, eps, norm, device)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._attacked(obs, info)

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs, info = self._attacked(obs, info)
        return obs, reward, terminated, truncated, info

    def _attacked(self, obs: np.ndarray, info: dict) -> tuple[np.ndarray, dict]:
        attacked, size = self._seen(np.asarray(obs)[None])
        told = {name: float(value[0]) for name, value in size.items()} | {"clean_obs": obs}
        return attacked[0], info | {"attack": told}


class AttackVectorWrapper(gym.vector.VectorWrapper):
    """For a vector environment, in any autoreset mode; arguments and errors as for `AttackWrapper`.

    Final observations that SAME_STEP puts into info stay clean: no policy acts on them.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv,
        attack: Attack,
        victim: HasValues,
        *,
        eps: float,
        norm: str = "linf",
        device: str = "cpu",
    ):
        super().__init__(env)
        self._seen = _Seen(env.single_observation_space, attack, victim, eps, norm, device)

    def reset(self, *, seed: Any = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._attacked(obs, info)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        obs, info = self._attacked(obs, info)
        return obs, reward, terminated, truncated, info

    def _attacked(self, obs: np.ndarray, info: dict) -> tuple[np.ndarray, dict]:
        attacked, size = self._seen(obs)
        return attacked, info | {"attack": size | {"clean_obs": obs}}
