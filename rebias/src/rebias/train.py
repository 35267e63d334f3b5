"""The training loop: any method, any data set, one or many processes, it can be killed at any time and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from rebias.data.dataset import Dataset
from rebias.methods import Method
from rebias.settings import Settings
from shared_utils.cuda_graph import StepGraph, load_optimizer, set_learning_rate
from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state

logger = get_logger("rebias")


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric on one process, or on all that torchrun or Slurm started (DDP).

    Args:
        device: auto (CUDA if available), cpu or cuda.
        precision: auto (bf16-mixed on CUDA, fp16 with a scaler before Ampere, 32-true on CPU) or one of Fabric's.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "32-true"
        if device == "cuda":
            precision = "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    torch.backends.cudnn.benchmark = True  # shapes do not change: search for the fastest convolution once
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world)))
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]  # Fabric checks the name
    )
    fabric.launch()
    return fabric


def learning_rate(settings: Settings, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0; pre-training (negative epochs) keeps the first one."""
    epoch = max(epoch, 0)
    if settings.schedule == "step":
        return settings.lr * 0.1 ** (epoch // settings.step_epochs)
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
    return settings.lr


def index_batches(n: int, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[Tensor]:
    """This rank's share of every full global batch of an epoch, in an order given by seed and epoch.

    Raises:
        ValueError: no full batch, or a global batch that the ranks cannot share evenly.
    """
    if n < batch_size:
        raise ValueError(f"{n} training images do not fill a batch of {batch_size}")
    if batch_size % world:
        raise ValueError(f"a global batch of {batch_size} cannot be shared by {world} ranks")
    order = torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch))
    return [batch[rank::world] for batch in order.split(batch_size) if len(batch) == batch_size]


def fit(
    method: Method,
    data: Dataset,
    seed: int,
    *,
    on_epoch: Callable[[int, dict[str, float]], dict] = lambda epoch, losses: {},
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[dict]:
    """Train; the same arguments give the same weights on a CPU, even if it was killed and restarted.

    Args:
        method: networks, optimizers and step.
        data: a training set of this package, on the method's device.
        seed: seed of the order of the images.
        on_epoch: called after every epoch with its number from 1 and the means of the losses' parts; what it returns
            is added to the curve's point.
        checkpoint: file to resume from and to save to; refused if its settings differ.
        checkpoint_every: steps between saves; the end of training saves as well.
        before_step: called with the number of steps done.

    Returns:
        The training curve: one point per epoch with the means of the losses' parts.

    Raises:
        ValueError: no full batch; a checkpoint that is damaged or from another run.
        RuntimeError: a loss became NaN or infinite.
    """
    s, fabric = method.settings, method.fabric
    run = {"settings": json.loads(json.dumps(asdict(s))), "seed": seed, "data": _digest(data)}
    state: dict[str, Any] = {"epoch": 0, "step": 0, "total": 0, "curve": [], "sums": {}}
    if checkpoint is not None and checkpoint.exists():
        state = _resume(checkpoint, run, method)
        logger.info("resuming at epoch %d, step %d from %s", state["epoch"], state["step"], checkpoint.name)

    graphed = method.graphed and fabric.device.type == "cuda" and fabric.world_size == 1
    pretrain_step, step_proper = (StepGraph(f) if graphed else f for f in (method.pretrain_step, method.step))
    for epoch in range(state["epoch"], s.pretrain_epochs + s.epochs):
        batches = index_batches(len(data), s.batch_size, seed, epoch, fabric.global_rank, fabric.world_size)
        for optimizer in method.optimizers.values():
            for group in optimizer.param_groups:
                set_learning_rate(group, learning_rate(s, epoch - s.pretrain_epochs))
        if state["step"] == 0:
            share = batches[: math.floor(s.sigma_sampling * len(batches)) + 1]  # as the released code counts
            method.start_epoch(data.batches(share, epoch))
        for module in method.modules.values():
            module.train()
        step = pretrain_step if epoch < s.pretrain_epochs else step_proper
        left = batches[state["step"] :]
        for index, (images, targets) in zip(left, data.batches(left, epoch), strict=True):
            before_step(state["total"])
            index = index.to(fabric.device, non_blocking=True)
            for name, value in step(images, targets, index).items():
                state["sums"][name] = state["sums"].get(name, 0) + value.double()
            state["step"] += 1
            state["total"] += 1
            if checkpoint is not None and state["total"] % checkpoint_every == 0:
                _save(checkpoint, run, state, method)
        point = {name: (total / len(batches)).item() for name, total in state["sums"].items()}
        if not all(math.isfinite(value) for value in point.values()):
            raise RuntimeError(f"epoch {epoch + 1}: a loss is NaN or infinite: {point}")
        point = {"epoch": epoch + 1} | point | on_epoch(epoch + 1, point)
        state |= {"epoch": epoch + 1, "step": 0, "curve": [*state["curve"], point], "sums": {}}
    method.finish()
    if checkpoint is not None:
        _save(checkpoint, run, state, method)
    return state["curve"]


def _digest(data: Dataset) -> str:
    return hashlib.sha256(json.dumps(data.record(), sort_keys=True).encode()).hexdigest()[:16]


def _save(path: Path, run: dict, state: dict, method: Method) -> None:
    if method.fabric.global_rank == 0:
        content = {"run": run, "state": state, "rng": rng_state(), "bandwidths": _bandwidths(method)}
        content["modules"] = {name: module.state_dict() for name, module in method.modules.items()}
        content["optimizers"] = {name: optimizer.state_dict() for name, optimizer in method.optimizers.items()}
        with whole_file(path) as temporary:
            torch.save(content, temporary)
    method.fabric.barrier()


def _resume(path: Path, run: dict, method: Method) -> dict:
    content = load_checkpoint(path)
    if content["run"] != run:
        differing = [name for name in run["settings"] if run["settings"][name] != content["run"]["settings"].get(name)]
        differing += [name for name in ("seed", "data") if run[name] != content["run"][name]]
        raise ValueError(
            f"{path}: checkpoint of another run (different {', '.join(differing)}); "
            "name another file, or use its settings"
        )
    for name, module in method.modules.items():
        module.load_state_dict(content["modules"][name])
    for name, optimizer in method.optimizers.items():
        load_optimizer(optimizer, content["optimizers"][name])
    for name, value in content["bandwidths"].items():
        setattr(method.loss, name, value.to(method.fabric.device) if isinstance(value, Tensor) else value)
    restore_rng_state(content["rng"])
    return content["state"]


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint written by `fit`, on the CPU and with weights_only. ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["run"]["settings"], content["modules"]["f"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a checkpoint ({reason}); name another file") from error
    return content


def _bandwidths(method: Method) -> dict:
    return {} if method.loss is None else {"sigma_f": method.loss.sigma_f, "sigma_g": method.loss.sigma_g}
