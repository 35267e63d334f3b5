"""MiniPong: a 10 x 10 Pong in numpy that steps many environments at once; nothing to download.

The victim plays the right paddle (column 9, 147), the enemy the left one (column 0, 148); paddles are 4 rows high, the
ball is one pixel (236), the background grey (87). An observation is the last two frames, uint8 (2, 10, 10). Actions:
0 up, 1 stay, 2 down, one row per step. Every serve flies from the enemy's line towards the victim, so every later
crossing of the enemy's line results from a stroke of the victim. An episode terminates at 5 goals or 5 misses and
is truncated after 300 steps.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

SIZE, PADDLE = 10, 4
BACKGROUND, BALL, VICTIM, ENEMY = 87, 236, 147, 148
ENEMY_SPEED = 0.25  # rows per step towards an approaching ball; otherwise half as fast, back to the centre
POINTS, MAX_STEPS = 5, 300

_OBSERVATION = Box(0, 255, (2, SIZE, SIZE), np.uint8)
_ACTION = Discrete(3)
_STATE = ("x", "y", "vx", "vy", "top", "enemy", "goals", "misses", "steps", "over", "frames")


def _column(grey: int) -> np.ndarray:
    """(7, 10): pixels of a paddle's column, for each row of its upper end."""
    rows = np.arange(SIZE) - np.arange(SIZE - PADDLE + 1)[:, None]
    return np.where((rows >= 0) & (rows < PADDLE), grey, BACKGROUND).astype(np.uint8)


_VICTIM_COLUMN, _ENEMY_COLUMN = _column(VICTIM), _column(ENEMY)


class MiniPongVec(VectorEnv):
    """MiniPong as a gymnasium vector environment in NEXT_STEP mode: the step after an end only resets.

    `info["crossing_y"]` (N,) float64: the row at which the ball reached the enemy's line in this step, returned or not;
    -1 if it did not (NaN would break the comparison of infos). `info["top"]` (N,): the upper row of the victim's
    paddle.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(self, num_envs: int = 1, episode_steps: int = MAX_STEPS):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs, self.episode_steps = num_envs, episode_steps
        self.single_observation_space, self.single_action_space = _OBSERVATION, _ACTION
        self.observation_space = batch_space(_OBSERVATION, num_envs)
        self.action_space = batch_space(_ACTION, num_envs)
        self._all = np.arange(num_envs)
        self._rng = np.random.default_rng()
        self.x, self.vx = (np.zeros(num_envs, np.int64) for _ in range(2))
        self.y, self.vy, self.top, self.enemy = (np.zeros(num_envs) for _ in range(4))
        self.goals, self.misses, self.steps = (np.zeros(num_envs) for _ in range(3))
        self.over = np.ones(num_envs, bool)
        self.frames = np.zeros((num_envs, 2, SIZE, SIZE), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._restart(np.ones(self.num_envs, bool))
        return self.frames.copy(), self._info(np.full(self.num_envs, -1.0))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions must be ({self.num_envs},), got {actions.shape}")
        dummy = self.over
        live = ~dummy
        self.top = np.clip(self.top + actions - 1, 0, SIZE - PADDLE)
        goal = np.where(self.vx < 0, self.y - (PADDLE - 1) / 2, (SIZE - PADDLE) / 2)
        speed = np.where(self.vx < 0, ENEMY_SPEED, ENEMY_SPEED / 2)
        self.enemy = np.clip(self.enemy + np.clip(goal - self.enemy, -speed, speed), 0, SIZE - PADDLE)

        self.x = self.x + self.vx
        y = self.y + self.vy
        inside = np.where(y < 0, -y, np.where(y > SIZE - 1, 2 * (SIZE - 1) - y, y))
        self.vy = np.where(inside != y, -self.vy, self.vy)
        self.y = inside

        serve = self._rng.random((3, self.num_envs))
        reward = np.zeros(self.num_envs)
        self._at_victim(live, reward)
        crossing = np.where(self._at_enemy(live, reward, serve[2]), self.y, -1.0)
        self._serve(reward != 0, serve)

        self.goals += reward > 0
        self.misses += reward < 0
        self.steps += 1
        terminated = live & ((self.goals >= POINTS) | (self.misses >= POINTS))
        truncated = live & ~terminated & (self.steps >= self.episode_steps)
        self.over = terminated | truncated
        self.frames = np.stack([self.frames[:, 1], self._draw()], 1)
        self._restart(dummy)
        return self.frames.copy(), reward, terminated, truncated, self._info(crossing)

    def _at_victim(self, live: np.ndarray, reward: np.ndarray) -> None:
        """Return the ball or miss it."""
        arrived = live & (self.vx > 0) & (self.x >= SIZE - 2)
        offset = (self.y - (self.top + (PADDLE - 1) / 2)) / 2
        hit = arrived & (np.abs(offset) <= 1)
        self.vx = np.where(hit, -1, self.vx)
        self.vy = np.where(hit, 0.5 * offset, self.vy)
        reward[arrived & ~hit] = -1

    def _at_enemy(self, live: np.ndarray, reward: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """The enemy returns the ball or the victim scores; gives where the ball reached the enemy's line."""
        arrived = live & (self.vx < 0) & (self.x <= 1)
        offset = (self.y - (self.enemy + (PADDLE - 1) / 2)) / 2
        hit = arrived & (np.abs(offset) <= 1)
        self.vx = np.where(hit, 1, self.vx)
        self.vy = np.where(hit, chance - 0.5, self.vy)
        reward[arrived & ~hit] = 1
        return arrived

    def _serve(self, where: np.ndarray, chance: np.ndarray) -> None:
        self.x = np.where(where, 1, self.x)
        self.y = np.where(where, 1 + 7 * chance[0], self.y)
        self.vx = np.where(where, 1, self.vx)
        self.vy = np.where(where, 1.2 * chance[1] - 0.6, self.vy)

    def _restart(self, where: np.ndarray) -> None:
        if not where.any():
            return
        self._serve(where, self._rng.random((2, self.num_envs)))
        self.top = np.where(where, (SIZE - PADDLE) // 2, self.top)
        self.enemy = np.where(where, (SIZE - PADDLE) / 2, self.enemy)
        for name in ("goals", "misses", "steps"):
            setattr(self, name, np.where(where, 0, getattr(self, name)))
        self.over = self.over & ~where
        self.frames[where] = self._draw()[where][:, None]

    def _draw(self) -> np.ndarray:
        frame = np.full((self.num_envs, SIZE, SIZE), BACKGROUND, np.uint8)
        frame[:, :, -1] = _VICTIM_COLUMN[self.top.astype(np.int64)]
        frame[:, :, 0] = _ENEMY_COLUMN[np.rint(self.enemy).astype(np.int64)]
        frame[self._all, np.rint(self.y).astype(np.int64), self.x] = BALL
        return frame

    def _info(self, crossing: np.ndarray) -> dict[str, np.ndarray]:
        return {"crossing_y": crossing, "top": self.top.copy()}

    def state(self) -> dict[str, Any]:
        """Everything that determines the future: arrays and the generator's state, for an exact resume."""
        return {name: getattr(self, name).copy() for name in _STATE} | {"rng": self._rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state`."""
        for name in _STATE:
            setattr(self, name, state[name].copy())
        self._rng.bit_generator.state = state["rng"]


class MiniPong(gym.Env):
    """One MiniPong environment; `gymnasium.make("MiniPong-v0")`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space, action_space = _OBSERVATION, _ACTION

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self._envs = MiniPongVec(1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self._envs.reset(seed=int(self.np_random.integers(2**31)))
        return obs[0], {name: values[0] for name, values in info.items()}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self._envs.step(np.array([action]))
        one = {name: values[0] for name, values in info.items()}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), one

    def render(self) -> np.ndarray | None:
        """The newest frame, 16 x 16 pixels per cell, RGB; None unless render_mode is rgb_array."""
        if self.render_mode != "rgb_array":
            return None
        return np.repeat(self._envs.frames[0, 1].repeat(16, 0).repeat(16, 1)[..., None], 3, 2)
