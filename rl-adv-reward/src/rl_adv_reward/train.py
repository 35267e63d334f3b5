"""The training loop: any learner, many environments, a replay on the device; it can be killed and resumed at any time.

An iteration steps all environments once, then updates the learner. On the CPU a killed and resumed MiniPong training
gives bit-equal results to an uninterrupted one. ALE's vector environment cannot save its state: a resumed training
starts new episodes there and keeps everything else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from rl_adv_reward.envs import ENVIRONMENTS
from rl_adv_reward.learners import Learner
from rl_adv_reward.models import to_unit
from rl_adv_reward.play import Play
from rl_adv_reward.replay import Replay
from rl_adv_reward.rewards import AdversarialReward
from rl_adv_reward.settings import Loop
from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state, seed_everything

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = get_logger("rl-adv-reward")


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric on one device; several devices run different runs, not ranks of one.

    Args:
        device: auto (CUDA if available), cpu or cuda.
        precision: auto (bf16-mixed on CUDA from Ampere on, else 32-true) or a precision of Fabric.
    """
    from lightning.fabric import Fabric  # takes seconds, which reading tables should not

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # Fabric makes torch query NVML for GPUs, and Adam queries at every step
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    if precision == "auto":
        modern = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16-mixed" if modern else "32-true"
    return Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]  # any of Fabric's


def own_reward(obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, next_obs: Tensor, info: dict) -> Tensor:
    """The game's reward, clipped to its sign, on which victims are trained."""
    return reward.sign()


class State(TypedDict):
    """The state of a training."""

    iteration: int
    curve: list[dict]
    count: int  # updates since the last evaluation
    finished: bool


class Trained(NamedTuple):
    """Results of a training besides the learner's weights."""

    curve: list[dict]
    iterations: int


def fit(
    learner: Learner,
    goal: AdversarialReward,
    loop: Loop,
    seed: int,
    fabric: Fabric,
    *,
    evaluate: Callable[[int], tuple[dict, bool]] | None = None,
    evaluate_every: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    identity: dict | None = None,
    before: Callable[[int], None] = lambda iteration: None,
    compile: bool = False,
) -> Trained:
    """Train; the same arguments give the same weights on a CPU (MiniPong), even if it was killed and restarted.

    Args:
        learner: see learners.py; not yet trained.
        goal: the reward to learn.
        loop: sizes and rates.
        seed: seed of all random numbers here.
        fabric: device and precision.
        evaluate: called with the number of iterations done; returns its measurements, and whether training may end.
        evaluate_every: iterations between calls; 0: never.
        checkpoint: file to resume from and to save to; a checkpoint of another run is an error.
        checkpoint_every: iterations between saves; the end of training also saves.
        identity: what identifies this run's checkpoint, in addition to loop and seed.
        before: called before each iteration with the number of iterations done.
        compile: torch.compile the loss.

    Returns:
        The curve, one point per evaluation with the mean loss since the last, and the iterations done.

    Raises:
        ValueError: a checkpoint that is damaged or from another run.
        RuntimeError: the loss became NaN or infinite.
    """
    run = json.loads(json.dumps({"loop": asdict(loop), "seed": seed, **(identity or {})}))
    saved = _open(checkpoint, run, learner) if checkpoint is not None and checkpoint.exists() else None
    if saved and saved["state"]["finished"]:
        return Trained(saved["state"]["curve"], saved["state"]["iteration"])
    seed_everything(seed)
    play = Play(loop.env, loop.num_envs, seed, fabric.device, loop.episode_steps)
    shape = cast(tuple[int, int, int], play.envs.single_observation_space.shape)
    replay = Replay(loop.capacity, loop.num_envs, shape, ENVIRONMENTS[loop.env].padding, fabric.device)
    state: State = {"iteration": 0, "curve": [], "count": 0, "finished": False}
    loss = torch.zeros((), dtype=torch.float64, device=fabric.device)  # summed since the last evaluation
    if saved and checkpoint is not None:
        state, loss = saved["state"], saved["loss"].to(fabric.device)
        _restore(saved, learner, replay, play, loop)
        logger.info("resuming at iteration %d from %s", state["iteration"], checkpoint.name)
    compute_loss = torch.compile(learner.loss) if compile else learner.loss

    while not state["finished"]:
        before(state["iteration"])
        obs, age = play.obs, play.age
        action = learner.act(to_unit(obs), state["iteration"])
        reward, _, terminated, truncated, valid, _ = play.step(action, goal)
        replay.add(obs, age, action, reward, terminated, truncated, valid)
        state["iteration"] += 1
        if state["iteration"] > loop.starts:
            for _ in range(loop.updates):
                batch = replay.sample(loop.batch_size, loop.n_step, loop.gamma)
                loss += _update(learner.optimizer, compute_loss(batch))
                state["count"] += 1
        learner.after(state["iteration"])
        state["finished"] = state["iteration"] == loop.iterations
        if evaluate and evaluate_every and (state["finished"] or state["iteration"] % evaluate_every == 0):
            point, enough = evaluate(state["iteration"])
            point |= {"iteration": state["iteration"], "loss": _finite(loss, state) / max(1, state["count"])}
            state["curve"], state["count"] = [*state["curve"], point], 0
            state["finished"] = state["finished"] or enough
            loss = torch.zeros_like(loss)
        if state["finished"] or state["iteration"] % checkpoint_every == 0:
            _finite(loss, state)
            if checkpoint is not None:
                _save(checkpoint, run, state, loss, learner, replay, play)
    play.envs.close()
    return Trained(state["curve"], state["iteration"])


def _finite(loss: Tensor, state: State) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"iteration {state['iteration']}: the loss is NaN or infinite")
    return value


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---- checkpoints ------------------------------------------------------------


def _save(path: Path, run: dict, state: State, loss: Tensor, learner: Learner, replay: Replay, play: Play) -> None:
    """Write to a temporary name, then rename: a killed process leaves the old checkpoint or the new one.

    A finished training keeps no replay: it is large and no longer needed.
    """
    content: dict[str, Any] = {"run": run, "state": state, "loss": loss.cpu()}
    content["modules"] = {name: module.state_dict() for name, module in learner.modules.items()}
    if not state["finished"]:
        content |= {"optimizer": learner.optimizer.state_dict(), "rng": rng_state()}
        content |= {"replay": replay.state(), "play": play.state()}
    write_atomically(path, content)


def write_atomically(path: Path, content: dict) -> None:
    """torch.save that writes the file completely or not at all. OSError if it cannot be written."""
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def read(path: Path) -> dict:
    """Load a file of `write_atomically` to the CPU. FileNotFoundError, or ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["run"], content["modules"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a checkpoint of this project ({reason}); name another file") from error
    return content


def _open(path: Path, run: dict, learner: Learner) -> dict:
    """Load a checkpoint of this run, with its weights. ValueError if it is from another run."""
    content = read(path)
    if content["run"] != run:
        parts = {key for key in run | content["run"] if run.get(key) != content["run"].get(key)}
        raise ValueError(f"{path}: checkpoint of another run (different {', '.join(sorted(parts))}); name another file")
    for name, module in learner.modules.items():
        module.load_state_dict(content["modules"][name])
    return content


def _restore(content: dict, learner: Learner, replay: Replay, play: Play, loop: Loop) -> None:
    """Random and other state that determines the rest of the training."""
    learner.optimizer.load_state_dict(content["optimizer"])
    replay.restore(content["replay"])
    if content["play"] is None:
        replay.cut(loop.n_step)
    else:
        play.restore(content["play"])
    restore_rng_state(content["rng"])
