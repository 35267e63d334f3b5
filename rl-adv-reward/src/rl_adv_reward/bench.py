"""Speed in one process, contenders in turn, equality checked: ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from rich.table import Table as Grid
from torch.nn.functional import huber_loss

from rl_adv_reward.atn import ATN
from rl_adv_reward.attacks import ATNAttack, fgsm
from rl_adv_reward.envs import ENVIRONMENTS
from rl_adv_reward.learners import QLearner
from rl_adv_reward.models import Victim, mlp, nature_cnn
from rl_adv_reward.settings import PRESETS
from rl_adv_reward.train import fit, make_fabric, own_reward
from shared_utils.logging import console

STEPS = 600  # agent steps per measurement of an environment


def run(repeats: int, threads: int) -> None:
    """Print one line per comparison."""
    torch.set_num_threads(threads)
    fabric = make_fabric()
    name = torch.cuda.get_device_name() if fabric.device.type == "cuda" else f"CPU, {threads} threads"
    grid = Grid("what", "ours", "other", "ratio: median (min .. max)", "target", title=f"rl-adv-reward bench, {name}")
    for what, unit, ours, other, target in (*_environments(), *_training(fabric), *_attacks(fabric)):
        ours(), other()
        pairs = [(ours(), other()) for _ in range(repeats)]
        ratios = [a / b for a, b in pairs]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        rates = [f"{statistics.median(side):,.0f} {unit}" for side in zip(*pairs, strict=True)]
        grid.add_row(what, *rates, spread, target)
    console().print(grid)


# ---- ALE ------------------------------------------------------------


def _environments():
    """ale-py's vector environment against gymnasium's wrappers around one game, per second of CPU time."""
    vector, single = _vector(), _single()
    _same_frames(vector, single)
    yield "ALE/Pong, agent steps per CPU second", "steps/s", partial(_rate, vector), partial(_rate, single), ">= 1.4"


def _vector(num_envs: int = 1):
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv("pong", num_envs, num_threads=1, noop_max=0, reward_clipping=False, use_fire_reset=False)


def _single():
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make("PongNoFrameskip-v4")
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


def _same_frames(vector, single) -> None:
    """Both stacks of frames are equal over 60 steps. RuntimeError where they are not."""
    rng = np.random.default_rng(0)
    (a, _), (b, _) = vector.reset(seed=0), single.reset(seed=0)
    for _ in range(60):
        if not np.array_equal(a[0], np.asarray(b)):
            raise RuntimeError("the vector environment and gymnasium's wrappers give different frames")
        action = int(rng.integers(6))
        a, b = vector.step(np.array([action]))[0], single.step(action)[0]


def _rate(env) -> float:
    """Agent steps per second of CPU time, random actions."""
    vector = hasattr(env, "num_envs")
    rng = np.random.default_rng(0)
    actions = rng.integers(6, size=STEPS)
    env.reset(seed=0)
    start = time.process_time()
    for action in actions:
        over = env.step(np.array([action]) if vector else int(action))[2:4]
        if not vector and any(over):
            env.reset()
    return STEPS / (time.process_time() - start)


# ---- DQN ------------------------------------------------------------


def _training(fabric):
    """Environment steps per second of training, ours against a plain loop: one environment, an update per 4 steps."""
    if fabric.device.type == "cuda":
        loop, iterations = replace(PRESETS["pong"].loop("victim"), starts=20, capacity=20_000), 200
        ours = partial(_ours, loop, iterations, partial(nature_cnn, (4, 84, 84), 6), fabric)
        other = partial(_plain, _single, partial(nature_cnn, (4, 84, 84), 6), fabric.device)
        yield "DQN training on ALE/Pong, environment steps", "steps/s", ours, other, ">= 10 on a GPU"
    loop, iterations = PRESETS["minipong"].loop("victim"), 300
    network = partial(mlp, (2, 10, 10), 3, ENVIRONMENTS["minipong"].background)
    ours = partial(_ours, loop, iterations, network, fabric)
    other = partial(_plain, lambda: gym.make("MiniPong-v0"), network, fabric.device)
    yield "DQN training on MiniPong, environment steps", "steps/s", ours, other, ""


def _ours(loop, iterations: int, network: Callable, fabric) -> float:
    learner = QLearner(network(), loop, fabric)
    start = time.perf_counter()
    fit(learner, own_reward, replace(loop, iterations=iterations), 0, fabric)
    return iterations * loop.num_envs / (time.perf_counter() - start)


def _plain(make: Callable, network: Callable, device: torch.device, steps: int = 1200) -> float:
    """The loop as usually written: one environment, a replay in host memory, batches of 32."""
    env, q, target = make(), network().to(device), network().to(device)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-4)
    memory: deque = deque(maxlen=10_000)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    start = time.perf_counter()
    for step in range(steps):
        with torch.no_grad():
            values = q(torch.as_tensor(np.array(obs), device=device).float()[None] / 255)
        action = int(rng.integers(values.shape[1])) if rng.random() < 0.1 else int(values.argmax())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        memory.append((np.array(obs), action, float(np.sign(reward)), np.array(next_obs), terminated))
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
    return steps / (time.perf_counter() - start)


# ---- attacks ------------------------------------------------------------


def _attacks(fabric):
    """One ATN forward against one FGSM (forward and backward through the victim), 32 observations, victim included."""
    for what, shape, network in (
        ("MiniPong", (2, 10, 10), partial(mlp, (2, 10, 10), 3)),
        ("Atari", (4, 84, 84), partial(nature_cnn, (4, 84, 84), 6)),
    ):
        victim, atn = Victim(network()).to(fabric.device), ATN(shape, 8 / 255).to(fabric.device)
        x = torch.rand(32, *shape, device=fabric.device)
        ours, other = ATNAttack(atn), partial(fgsm, eps=8 / 255)
        rounds = 200 if what == "MiniPong" else 5
        measured = (partial(_calls, attack, x, victim, rounds) for attack in (ours, other))
        yield f"one step under attack, 32 observations of {what}: ATN against FGSM", "steps/s", *measured, "> 1"


def _calls(attack, x: torch.Tensor, victim: Victim, rounds: int) -> float:
    def synchronize() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        victim.act(attack(x, victim))
    synchronize()
    return rounds / (time.perf_counter() - start)
