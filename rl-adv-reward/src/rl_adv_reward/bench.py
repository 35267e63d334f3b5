"""Speed against the usual implementations; checks equality where both compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import nn

from rl_adv_reward.atn import ATN
from rl_adv_reward.attacks import ATNAttack, Attack, fgsm
from rl_adv_reward.envs import ENVIRONMENTS
from rl_adv_reward.envs.minipong import MiniPongVec
from rl_adv_reward.experiments import PACKAGES, PROJECT
from rl_adv_reward.learners import QLearner
from rl_adv_reward.models import Victim, mlp, nature_cnn
from rl_adv_reward.settings import PRESETS, Loop
from rl_adv_reward.train import fit, make_fabric, own_reward
from shared_utils.benchmark import Timing, in_turn, report
from shared_utils.logging import get_logger

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from stable_baselines3.common.vec_env import VecEnv

logger = get_logger("rl-adv-reward")

STEPS = 100  # agent steps of every environment per measurement
NUM_ENVS = 8  # environments in the vector environment


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    fabric = make_fabric()
    timings = chain(_environments(repeats), _training(fabric, repeats), _attacks(fabric.device, repeats))
    packages = (
        *PACKAGES,
        "opencv-python-headless",
        "stable-baselines3",
        *(["envpool"] if find_spec("envpool") else []),
    )
    report("rl-adv-reward", timings, PROJECT, packages, {"repeats": repeats, "num_envs": NUM_ENVS})


# ---- ALE ------------------------------------------------------------


def _environments(repeats: int) -> Iterator[Timing]:
    """ale-py's vector environment, used in training, against alternatives; CPU time, also on a CUDA machine."""
    vector, single = _vector(NUM_ENVS), _single()
    _same_frames(_vector(1), single)
    for game in (vector, single):
        game.reset(seed=0)  # starting an emulator takes 0.1 s and is not measured
    rivals: dict[str, tuple[Callable[[], None], int, str]] = {}
    rivals["gymnasium's wrappers"] = partial(_play_single, single), 1, ">= 1.4"
    if find_spec("envpool"):
        rivals["envpool"] = partial(_play_vector, _envpool(NUM_ENVS)), NUM_ENVS, ">= 1"
    else:
        logger.info("envpool is not installed (pip install envpool, 0.8 GB): its row is skipped")
    for peer, (play, games, target) in rivals.items():
        many, theirs = in_turn(partial(_play_vector, vector), play, repeats, torch.device("cpu"))
        per_step = [ms / (STEPS * NUM_ENVS) for ms in many], [ms / (STEPS * games) for ms in theirs]
        what = f"an agent step of ALE/Pong, vector environment of {NUM_ENVS}"
        yield Timing(what, peer, *per_step, target=target)


def _vector(num_envs: int) -> VectorEnv:
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv("pong", num_envs, num_threads=1, noop_max=0, reward_clipping=False, use_fire_reset=False)


def _envpool(num_envs: int) -> Any:
    envs = import_module("envpool").make(
        "Pong-v5", env_type="gymnasium", num_envs=num_envs, num_threads=1, noop_max=1, use_fire_reset=False, seed=0
    )
    envs.reset()
    return envs


def _single() -> gym.Env:
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make("PongNoFrameskip-v4")
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


def _same_frames(vector: VectorEnv, single: gym.Env) -> None:
    """Check that both stacks of frames are equal over 60 steps. RuntimeError if not."""
    rng = np.random.default_rng(0)
    (a, _), (b, _) = vector.reset(seed=0), single.reset(seed=0)
    for _ in range(60):
        if not np.array_equal(a[0], np.asarray(b)):
            raise RuntimeError("the vector environment and gymnasium's wrappers return different frames")
        action = int(rng.integers(6))
        a, b = vector.step(np.array([action]))[0], single.step(action)[0]


def _play_vector(envs: VectorEnv) -> None:
    for actions in np.random.default_rng(0).integers(6, size=(STEPS, NUM_ENVS), dtype=np.int32):
        envs.step(actions)


def _play_single(env: gym.Env) -> None:
    for action in np.random.default_rng(0).integers(6, size=STEPS):
        _, _, terminated, truncated, _ = env.step(int(action))
        if terminated or truncated:
            env.reset()


# ---- DQN ------------------------------------------------------------


def _training(fabric: Fabric, repeats: int) -> Iterator[Timing]:
    """Train a victim with its preset's settings, against stable-baselines3's DQN with the same settings."""
    on_minipong = partial(mlp, (2, 10, 10), 3, ENVIRONMENTS["minipong"].background)
    small = PRESETS["minipong"].loop("victim")
    games: list[tuple[str, Loop, Callable[[], nn.Module], Callable[[int], VecEnv], str, dict]]
    games = [("MiniPong", replace(small, iterations=200), on_minipong, _minipong, "MlpPolicy", {"net_arch": [96, 96]})]
    pong = replace(PRESETS["pong"].loop("victim"), iterations=24, starts=16, capacity=5_000)
    games.append(("ALE/Pong", pong, partial(nature_cnn, (4, 84, 84), 6), _pong, "CnnPolicy", {"net_arch": []}))
    for game, loop, network, make, policy, options in games:
        theirs = partial(_stable_baselines, make, policy, options, loop, fabric.device)
        times = in_turn(partial(_ours, loop, network, fabric), theirs, repeats, fabric.device)
        ours, peers = ([ms / (loop.iterations * loop.num_envs) for ms in each] for each in times)
        what = f"DQN on {game} per environment step, {loop.num_envs} environments, batches of {loop.batch_size}"
        yield Timing(what, "stable-baselines3", ours, peers, target=">= 1")


def _ours(loop: Loop, network: Callable[[], nn.Module], fabric: Fabric) -> None:
    fit(QLearner(network(), loop, fabric), own_reward, loop, 0, fabric)


def _stable_baselines(
    make: Callable[[int], VecEnv], policy: str, options: dict, loop: Loop, device: torch.device
) -> None:
    """The same number of transitions, updates, samples and target copies as `_ours`, with the same layers."""
    from stable_baselines3 import DQN

    envs = make(loop.num_envs)
    first, last, share = loop.explore
    model = DQN(
        policy,
        envs,
        learning_rate=loop.lr,
        buffer_size=loop.capacity,
        learning_starts=loop.starts * loop.num_envs,
        batch_size=loop.batch_size,
        gamma=loop.gamma,
        train_freq=1,
        gradient_steps=loop.updates,
        target_update_interval=loop.sync_every * loop.num_envs,
        exploration_initial_eps=first,
        exploration_final_eps=last,
        exploration_fraction=share,
        policy_kwargs=options,
        seed=0,
        device=device,
    )
    model.learn(loop.iterations * loop.num_envs)
    envs.close()


def _pong(num_envs: int) -> VecEnv:
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    return VecFrameStack(make_atari_env("PongNoFrameskip-v4", num_envs, seed=0), 4)


def _minipong(num_envs: int) -> VecEnv:
    """Our vector environment with stable-baselines3's interface: the step that ends an episode also starts the next."""
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        def __init__(self) -> None:
            self.game = MiniPongVec(num_envs)
            super().__init__(num_envs, self.game.single_observation_space, self.game.single_action_space)

        def reset(self) -> np.ndarray:
            return self.game.reset(seed=0)[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            obs, reward, terminated, truncated, _ = self.game.step(self.actions)
            over = terminated | truncated
            infos: list[dict] = [{} for _ in range(num_envs)]
            for i in np.flatnonzero(over):
                infos[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": bool(truncated[i])}
            self.game._restart(over)
            return self.game.frames.copy(), reward, over, infos

        def close(self) -> None:
            self.game.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list:
            return [None] * num_envs

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * num_envs

        # stable-baselines3 requires these two of every VecEnv; its DQN calls neither

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list:
            raise NotImplementedError

    return Adapter()


# ---- attacks ------------------------------------------------------------


def _attacks(device: torch.device, repeats: int) -> Iterator[Timing]:
    """One ATN forward pass against one FGSM (forward and backward through the victim), with the victim's action."""
    for game, shape, network in (
        ("MiniPong", (2, 10, 10), partial(mlp, (2, 10, 10), 3)),
        ("Atari", (4, 84, 84), partial(nature_cnn, (4, 84, 84), 6)),
    ):
        victim, atn = Victim(network()).to(device), ATN(shape, 8 / 255).to(device)
        x = torch.rand(32, *shape, device=device)
        learned, gradient = ATNAttack(atn), partial(fgsm, eps=8 / 255)
        times = in_turn(partial(_act, learned, x, victim), partial(_act, gradient, x, victim), repeats, device)
        yield Timing(f"one attacked step, 32 observations of {game}: ATN", "FGSM", *times, target=">= 1")


def _act(attack: Attack, x: torch.Tensor, victim: Victim) -> None:
    victim.act(attack(x, victim))
