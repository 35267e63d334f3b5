"""Speed against the usual forms, equality checked where both compute the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import nn
from torch.nn.functional import huber_loss

from rl_adv_reward.atn import ATN
from rl_adv_reward.attacks import ATNAttack, Attack, fgsm
from rl_adv_reward.envs import ENVIRONMENTS
from rl_adv_reward.experiments import PACKAGES, PROJECT
from rl_adv_reward.learners import QLearner
from rl_adv_reward.models import Victim, mlp, nature_cnn
from rl_adv_reward.settings import PRESETS, Loop
from rl_adv_reward.train import fit, make_fabric, own_reward
from shared_utils.benchmark import Timing, in_turn, report

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STEPS = 100  # agent steps of every environment per measurement
NUM_ENVS = 8  # of the vector environment


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    fabric = make_fabric()
    timings = chain(_environments(repeats), _training(fabric, repeats), _attacks(fabric.device, repeats))
    packages = (*PACKAGES, "opencv-python-headless")
    report("rl-adv-reward", timings, PROJECT, packages, {"repeats": repeats, "num_envs": NUM_ENVS})


# ---- ALE ------------------------------------------------------------


def _environments(repeats: int) -> Iterator[Timing]:
    """ale-py's vector environment against gymnasium's wrappers around one game; CPU time, also on a CUDA machine."""
    vector, single = _vector(NUM_ENVS), _single()
    _same_frames(_vector(1), single)
    for game in (vector, single):
        game.reset(seed=0)  # an emulator's start, a tenth of a second, is not measured
    many, one = in_turn(partial(_play_vector, vector), partial(_play_single, single), repeats, torch.device("cpu"))
    per_step = [ms / (STEPS * NUM_ENVS) for ms in many], [ms / STEPS for ms in one]
    what = f"an agent step of ALE/Pong, vector environment of {NUM_ENVS}"
    yield Timing(what, "gymnasium's wrappers", *per_step, target=">= 1.4")


def _vector(num_envs: int) -> VectorEnv:
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv("pong", num_envs, num_threads=1, noop_max=0, reward_clipping=False, use_fire_reset=False)


def _single() -> gym.Env:
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make("PongNoFrameskip-v4")
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


def _same_frames(vector: VectorEnv, single: gym.Env) -> None:
    """Both stacks of frames are equal over 60 steps. RuntimeError where they are not."""
    rng = np.random.default_rng(0)
    (a, _), (b, _) = vector.reset(seed=0), single.reset(seed=0)
    for _ in range(60):
        if not np.array_equal(a[0], np.asarray(b)):
            raise RuntimeError("the vector environment and gymnasium's wrappers give different frames")
        action = int(rng.integers(6))
        a, b = vector.step(np.array([action]))[0], single.step(action)[0]


def _play_vector(envs: VectorEnv) -> None:
    for actions in np.random.default_rng(0).integers(6, size=(STEPS, NUM_ENVS)):
        envs.step(actions)


def _play_single(env: gym.Env) -> None:
    for action in np.random.default_rng(0).integers(6, size=STEPS):
        _, _, terminated, truncated, _ = env.step(int(action))
        if terminated or truncated:
            env.reset()


# ---- DQN ------------------------------------------------------------


def _training(fabric: Fabric, repeats: int) -> Iterator[Timing]:
    """Environment steps of training, ours against a plain loop: one environment, an update per 4 steps."""
    on_minipong = partial(mlp, (2, 10, 10), 3, ENVIRONMENTS["minipong"].background)
    games: list[tuple[str, Loop, Callable[[], nn.Module], Callable[[], gym.Env], str]]
    games = [("MiniPong", PRESETS["minipong"].loop("victim"), on_minipong, partial(gym.make, "MiniPong-v0"), "")]
    if fabric.device.type == "cuda":
        loop = replace(PRESETS["pong"].loop("victim"), starts=20, capacity=20_000)
        games.append(("ALE/Pong", loop, partial(nature_cnn, (4, 84, 84), 6), _single, ">= 10"))
    for game, loop, network, make, target in games:
        loop, steps = replace(loop, iterations=200), 1200
        ours, plain = in_turn(
            partial(_ours, loop, network, fabric),
            partial(_plain, make, network, fabric.device, steps),
            repeats,
            fabric.device,
        )
        per_step = [ms / (loop.iterations * loop.num_envs) for ms in ours], [ms / steps for ms in plain]
        yield Timing(f"DQN training, one environment step of {game}", "a plain loop", *per_step, target=target)


def _ours(loop: Loop, network: Callable[[], nn.Module], fabric: Fabric) -> None:
    fit(QLearner(network(), loop, fabric), own_reward, loop, 0, fabric)


def _plain(make: Callable[[], gym.Env], network: Callable[[], nn.Module], device: torch.device, steps: int) -> None:
    """The loop as usually written: one environment, a replay in host memory, batches of 32."""
    env, q, target = make(), network().to(device), network().to(device)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-4)
    memory: deque[tuple] = deque(maxlen=10_000)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for step in range(steps):
        with torch.no_grad():
            values = q(torch.as_tensor(np.array(obs), device=device).float()[None] / 255)
        action = int(rng.integers(values.shape[1])) if rng.random() < 0.1 else int(values.argmax())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        memory.append((np.array(obs), action, np.sign(float(reward)), np.array(next_obs), terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step >= 64 and step % 4 == 0:
            chosen = [memory[i] for i in rng.integers(len(memory), size=32)]
            a, act, rew, b, end = (torch.as_tensor(np.array(part), device=device) for part in zip(*chosen, strict=True))
            with torch.no_grad():
                y = rew.float() + 0.99 * (~end).float() * target(b.float() / 255).amax(1)
            loss = huber_loss(q(a.float() / 255).gather(1, act[:, None]).squeeze(1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    env.close()


# ---- attacks ------------------------------------------------------------


def _attacks(device: torch.device, repeats: int) -> Iterator[Timing]:
    """One ATN forward against one FGSM (forward and backward through the victim); the victim's action is in both."""
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
