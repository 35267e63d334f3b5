"""The training loop: any of the 24, one or many processes, killed at any instant and continued bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from shared_utils.files import whole_file
from shared_utils.logging import get_logger, progress
from shared_utils.seeding import restore_rng_state, rng_state
from str_benchmark.data.mixture import TrainingData
from str_benchmark.models import Recognizer
from str_benchmark.settings import Settings

logger = get_logger("str-benchmark")

LOG_EVERY = 250


class Best(TypedDict):
    """The weights of the best validation."""

    accuracy: float
    step: int
    weights: dict[str, Tensor]


class State(TypedDict):
    """The state of a training, stored in its checkpoint."""

    step: int
    curve: list[dict[str, float]]
    loss: Tensor  # sum since the last point
    best: Best | None
    broken: int


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
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world)))
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]  # any string; Fabric refuses what it does not know
    )
    fabric.launch()
    return fabric


def loss_of(model: Callable, pred: str, images: Tensor, ids: Tensor, lengths: Tensor, fabric: Fabric) -> Tensor:
    """Loss of a batch (section 3.4), float32, such that its mean over ranks is the loss of the whole batch.

    CTC: mean over words of the negative log-likelihood divided by the label's length. Attention: cross entropy over
    the characters and [s] of all words, teacher-forced; steps after the longest label have no target and are skipped.

    Args:
        model: images and targets to logits.
        pred: "CTC" or "Attn".
        images: (B, C, H, W).
        ids: class indices from the tokenizer, (B, ...) int64.
        lengths: lengths of the labels, (B,) int64 on the CPU.
        fabric: world size and reduction.
    """
    if pred == "CTC":
        log_probs = model(images).float().log_softmax(2).transpose(0, 1)  # (T, B, K)
        columns = torch.full((len(images),), len(log_probs), dtype=torch.int64)
        return F.ctc_loss(log_probs, ids, columns, lengths, zero_infinity=True)
    steps = int(lengths.max())
    logits = model(images, ids[:, :steps]).float()
    total = F.cross_entropy(logits.flatten(0, 1), ids[:, 1 : steps + 1].flatten(), ignore_index=0, reduction="sum")
    count = torch.as_tensor(float(lengths.sum()), device=total.device)
    return total / cast(Tensor, fabric.all_reduce(count, reduce_op="mean"))


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: constant, or linear warm-up over a tenth and a cosine to 0."""
    if settings.schedule == "constant":
        return settings.lr
    warm = max(1, steps // 10)
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def make_optimizer(settings: Settings, model: Recognizer) -> Optimizer:
    """AdaDelta as in the paper, or AdamW; fused on CUDA if PyTorch has it."""
    cuda = next(model.parameters()).is_cuda
    if settings.optimizer == "adadelta":
        return torch.optim.Adadelta(model.parameters(), lr=settings.lr, rho=0.95, eps=1e-8, foreach=cuda)
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=cuda)


def fit(
    model: Recognizer,
    data: TrainingData,
    settings: Settings,
    fabric: Fabric,
    *,
    run: dict,
    steps: int | None = None,
    validate: Callable[[Recognizer], float] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    compile: bool = False,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Train in place; the model ends with the weights of the best validation, or the last ones without any.

    Args:
        model: on the fabric's device.
        data: batches by step number.
        settings: optimizer and schedule.
        fabric: device, precision, ranks.
        run: what the checkpoint belongs to; a checkpoint of another run is refused.
        steps: number of steps, instead of the settings'.
        validate: accuracy of the model, called every `val_every` steps and at the end.
        checkpoint: file to resume from and to save to. At the end it holds only the kept weights and the curve; a
            call that finds such a file returns at once.
        checkpoint_every: steps between saves.
        compile: torch.compile the network.
        before_step: called with the number of the step.

    Returns:
        The curve: points with step, mean loss since the last point, and accuracy after a validation.

    Raises:
        ValueError: a checkpoint that is damaged or from another run.
        RuntimeError: the loss became NaN or infinite.
    """
    steps = steps or settings.steps
    if compile:
        model.compile()
    wrapped, optimizer = fabric.setup(model, make_optimizer(settings, model))
    state: State = {"step": 0, "curve": [], "loss": torch.zeros((), device=fabric.device), "best": None, "broken": 0}
    if checkpoint is not None and checkpoint.exists():
        state = _resume(checkpoint, run, model, optimizer, data, fabric)
        logger.info("continuing at step %d from %s", state["step"], checkpoint.name)
    wrapped.train()
    with progress() as bar:
        task = bar.add_task(settings.model, total=steps, completed=state["step"])
        for images, ids, lengths in data.batches(state["step"], steps):
            before_step(state["step"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, state["step"], steps)
            loss = loss_of(wrapped, model.config.pred, images, ids, lengths, fabric)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=settings.grad_clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            state["loss"] += loss.detach()
            state["step"] += 1
            bar.advance(task)
            _observe(state, steps, settings, model, validate)
            if checkpoint is not None and state["step"] % checkpoint_every == 0:
                _save(checkpoint, run, state, model, data, fabric, optimizer)
    if state["best"] is not None:
        model.load_state_dict(state["best"]["weights"])
        state["best"] = None
    if checkpoint is not None:
        _save(checkpoint, run, state, model, data, fabric)
    return state["curve"]


def _observe(
    state: State, steps: int, settings: Settings, model: Recognizer, validate: Callable[[Recognizer], float] | None
) -> None:
    """Add a point to the curve every LOG_EVERY steps; validate and remember the best weights."""
    step = state["step"]
    due = validate if step % settings.val_every == 0 or step == steps else None
    if step % LOG_EVERY and step != steps and due is None:
        return
    since = step - (state["curve"][-1]["step"] if state["curve"] else 0)
    point: dict[str, float] = {"step": step, "loss": float(state["loss"]) / since}
    if not math.isfinite(point["loss"]):
        raise RuntimeError(f"step {step}: the loss is NaN or infinite; a lower --lr may help")
    state["loss"].zero_()
    said = f"step {step:,} of {steps:,}: loss {point['loss']:.4g}"
    if due is not None:
        point["accuracy"] = due(model)
        if state["best"] is None or point["accuracy"] >= state["best"]["accuracy"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            state["best"] = {"accuracy": point["accuracy"], "step": step, "weights": weights}
        said += f", validation accuracy {100 * point['accuracy']:.2f} %"
    logger.info(said)
    state["curve"].append(point)


def _save(
    path: Path,
    run: dict,
    state: State,
    model: Recognizer,
    data: TrainingData,
    fabric: Fabric,
    optimizer: Optimizer | None = None,
) -> None:
    """Save a checkpoint; without an optimizer it is the file of a finished training."""
    if fabric.global_rank == 0:
        content = {"run": run, "state": state | {"broken": data.broken}, "model": model.state_dict()}
        if optimizer is not None:
            scaler = _scaler(fabric)
            content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
            content |= {"sampler": _position(data, state), "rng": rng_state()}
        with whole_file(path) as temporary:
            torch.save(content, temporary)
    fabric.barrier()


def _scaler(fabric: Fabric) -> torch.amp.GradScaler | None:
    """The loss scaler of 16-mixed; other precisions have none."""
    return getattr(fabric.strategy.precision, "scaler", None)


def _position(data: TrainingData, state: State) -> dict:
    """Workers draw in advance: the position counts the steps taken, not the batches drawn."""
    return data.sampler.state_dict() | {"step": state["step"]}


def _resume(
    path: Path, run: dict, model: Recognizer, optimizer: Optimizer, data: TrainingData, fabric: Fabric
) -> State:
    content = load_checkpoint(path)
    if content["run"] != run:
        mine, its = (_flat(each) for each in (run, content["run"]))
        other = sorted(name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name))
        raise ValueError(f"{path}: checkpoint of another run (different {', '.join(other)}); name another file")
    model.load_state_dict(content["model"])
    if "optimizer" in content:
        data.sampler.load_state_dict(content["sampler"])
        optimizer.load_state_dict(content["optimizer"])
        scaler = _scaler(fabric)
        if scaler and content["scaler"]:
            scaler.load_state_dict(content["scaler"])
        restore_rng_state(content["rng"])
    data.broken = content["state"]["broken"]
    content["state"]["loss"] = content["state"]["loss"].to(fabric.device)
    return content["state"]


def _flat(run: dict) -> dict:
    return {name: value for name, value in run.items() if name != "settings"} | run["settings"]


def load_checkpoint(path: Path) -> dict:
    """A checkpoint written by `fit`, on the CPU and with weights_only. ValueError if it is damaged or foreign."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["run"]["settings"], content["model"], content["state"]["step"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a training checkpoint ({reason}); name another file") from error
    return content
