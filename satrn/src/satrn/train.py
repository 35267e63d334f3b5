"""The training loop: one or many processes, it can be killed at any time and resumed.

Every random draw of a step (words, rotations, dropout) depends only on seed, step and rank, so the step number is
the whole random state.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from satrn.charset import IGNORED
from satrn.data.streams import RenderedWords, normalise, seed_of
from satrn.data.words_lmdb import LmdbMixture
from satrn.models import SATRN
from satrn.pretrained import read_checkpoint
from satrn.rotation import draw_angles, rotate_words
from satrn.settings import Settings
from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state, seed_everything

logger = get_logger("satrn")


class State(TypedDict):
    """The state of a training, stored in its checkpoint."""

    step: int
    curve: list[dict]
    total: float  # loss since the last point


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


def learning_rate(s: Settings, step: int) -> float:
    """Learning rate of a step, counted from 0.

    triangle: from lr/10 to lr over the first 45 % of the steps, back over the next 45 %, then down to lr/1000 (the
    official code's 112,500, 225,000 and 250,001 steps). onecycle: lr/25 to lr over 10 %, cosine down to 0.
    """
    if s.schedule == "triangle":
        knots = [(0.0, 0.1), (0.45, 1.0), (0.9, 0.1), (1.0, 0.001)]
        place = step / s.steps
        for (x0, y0), (x1, y1) in zip(knots, knots[1:], strict=False):
            if place <= x1:
                return s.lr * (y0 + (y1 - y0) * (place - x0) / (x1 - x0))
    warm_up = max(1, round(0.1 * s.steps))
    if step < warm_up:
        return s.lr * (0.04 + 0.96 * step / warm_up)
    return s.lr * (1 + math.cos(math.pi * (step - warm_up) / (s.steps - warm_up))) / 2


def build_model(s: Settings, seed: int, fabric: Fabric) -> SATRN:
    """A new network from a seed, on Fabric's device."""
    seed_everything(seed)
    model = SATRN(s.network())
    if model.encoder is not None:
        model.encoder.recompute = s.recompute
    return model.to(fabric.device).to(memory_format=torch.channels_last)


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in float32, summed over a word and its end, mean over words (so that ranks average exactly).

    Args:
        logits: [B, L, K].
        targets: [B, L], `IGNORED` after a word's end.
    """
    by_class = logits.float().transpose(1, 2)  # (B, K, L)
    return F.cross_entropy(by_class, targets, ignore_index=IGNORED, reduction="sum") / len(targets)


def ctc_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """CTC in float32, mean over words; class 0 is the blank; words longer than the columns contribute nothing.

    Args:
        logits: [B, W', K].
        targets: [B, L] as for `text_loss`; the end is not a symbol here.
    """
    lengths = (targets > 0).sum(dim=1)
    columns = torch.full_like(lengths, logits.shape[1])
    log_probabilities = logits.float().log_softmax(dim=-1).transpose(0, 1)
    losses = F.ctc_loss(log_probabilities, targets.clamp(min=0), columns, lengths, reduction="none", zero_infinity=True)
    return losses.mean()


class _Losses(torch.nn.Module):
    """One forward pass for DDP and compile: images and targets to the loss."""

    def __init__(self, model: SATRN, ctc_weight: float):
        super().__init__()
        self.model, self.ctc_weight = model, ctc_weight

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        encoded = self.model.encode(images)
        loss = text_loss(self.model.decode(encoded, targets), targets)
        if self.ctc_weight:
            loss = loss + self.ctc_weight * ctc_loss(self.model.ctc_logits(encoded), targets)
        return loss


def fit(
    model: SATRN,
    data: RenderedWords | LmdbMixture,
    s: Settings,
    seed: int,
    fabric: Fabric,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    start: Mapping[str, str] | None = None,
    compile: bool = False,
    before_step: Callable[[int], None] = lambda step: None,
    on_point: Callable[[dict], None] = lambda point: None,
) -> list[dict]:
    """Train; the same arguments give the same weights on a CPU, even if it was killed and restarted.

    Args:
        model: a network from `build_model`.
        data: a training set of this package.
        s: settings.
        seed: seed of the order of the words, rotations and dropout.
        fabric: device, precision, ranks.
        checkpoint: file to resume from and to save to; refused if it is from another run.
        checkpoint_every: steps between saves; the end of training saves as well.
        start: name and SHA-256 of the weights that `model` comes with, if they are not new ones.
        compile: through torch.compile.
        before_step: called with the number of steps done.
        on_point: called with every point of the curve.

    Returns:
        Ten points of the training curve: step and mean loss since the last point.

    Raises:
        ValueError: a batch that the ranks and parts cannot share; a checkpoint that is damaged or from another run.
        RuntimeError: the loss became NaN or infinite.
    """
    parts = fabric.world_size * s.accumulate
    if s.batch_size % parts:
        raise ValueError(f"batch_size {s.batch_size} cannot be shared by {fabric.world_size} ranks x {s.accumulate}")
    # Adam as in the paper (weight decay 0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=s.lr, betas=s.betas, fused=True)
    losses = _Losses(model, s.ctc_weight)
    module, optimizer = fabric.setup(cast(torch.nn.Module, torch.compile(losses)) if compile else losses, optimizer)
    run = {"settings": json.loads(json.dumps(asdict(s))), "seed": seed, "data": data.identity()}
    run |= {"start": dict(start)} if start else {}
    state: State = {"step": 0, "curve": [], "total": 0.0}
    if checkpoint is not None and checkpoint.exists():
        state = _resume(checkpoint, run, model, optimizer, fabric)
        logger.info("continuing at step %d from %s", state["step"], checkpoint.name)
    model.train()
    every, total = max(1, s.steps // 10), torch.zeros((), device=fabric.device)
    total += state["total"]
    stream = data.steps(s, seed, state["step"], slice(fabric.global_rank, None, fabric.world_size))
    for step, (images, targets) in enumerate(stream, state["step"]):
        before_step(step)
        torch.manual_seed(seed_of(seed, step, fabric.global_rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        images, targets = _prepare(images, s, seed, step, fabric), targets.to(fabric.device, non_blocking=True)
        for part in range(s.accumulate):
            share = slice(part, None, s.accumulate)
            with fabric.no_backward_sync(module, enabled=part < s.accumulate - 1):
                loss = module(images[share], targets[share]) / s.accumulate
                fabric.backward(loss)
            total += loss.detach()
        fabric.clip_gradients(module, optimizer, max_norm=s.clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0:
            state["curve"].append(_point(step + 1, cast(Tensor, fabric.all_reduce(total / every))))
            on_point(state["curve"][-1])
            total.zero_()
        if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == s.steps):
            state |= {"step": step + 1, "total": total.item()}
            _save(checkpoint, run, state, model, optimizer, fabric)
    return state["curve"]


def _prepare(images: Tensor, s: Settings, seed: int, step: int, fabric: Fabric) -> Tensor:
    """Rotate (real words) and normalise this rank's images; the angles are drawn for the whole batch."""
    images = images.to(fabric.device, non_blocking=True)
    if s.dataset == "lmdb" and s.rotation != "none":
        generator = torch.Generator().manual_seed(seed_of(seed, step))
        angles = draw_angles(s.rotation, s.batch_size, generator)[fabric.global_rank :: fabric.world_size]
        images = rotate_words(images, angles.to(fabric.device, non_blocking=True))
    return normalise(images, s).contiguous(memory_format=torch.channels_last)


def _point(step: int, loss: Tensor) -> dict:
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"step {step}: the loss is NaN or infinite")
    return {"step": step, "loss": round(value, 5)}


def report_point(s: Settings) -> Callable[[dict], None]:
    """An `on_point` that logs the loss, with a remark while it stays near its first value.

    That is usual: SATRN learns character frequencies at once, and learns to read only much later.
    """
    first: list[float] = []

    def report(point: dict) -> None:
        first.append(point["loss"])
        logger.info("step %d of %d: loss per word %.3f", point["step"], s.steps, point["loss"])
        if len(first) > 1 and point["loss"] > 0.7 * first[0]:
            logger.info("still on the first plateau; if this lasts, `satrn check` tests the set-up")

    return report


def _save(path: Path, run: dict, state: State, model: SATRN, optimizer: Optimizer, fabric: Fabric) -> None:
    if fabric.global_rank == 0:
        content = {"run": run, "state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"rng": rng_state(), "precision": fabric.strategy.precision.state_dict()}
        with whole_file(path) as temporary:
            torch.save(content, temporary)
    fabric.barrier()


def _resume(path: Path, run: dict, model: SATRN, optimizer: Optimizer, fabric: Fabric) -> State:
    content = read_checkpoint(path)
    other = content.get("run", {"settings": {}})
    if other != run:
        differing = [name for name in run["settings"] if run["settings"][name] != other["settings"].get(name)]
        differing += [name for name in ("seed", "data", "start") if run.get(name) != other.get(name)]
        raise ValueError(f"{path}: checkpoint of another run (different {', '.join(differing)}); give another --output")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    fabric.strategy.precision.load_state_dict(content["precision"])
    restore_rng_state(content["rng"])
    return content["state"]
