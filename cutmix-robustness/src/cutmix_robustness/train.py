"""The training loop: any recipe, any data set, one or many processes; it can be killed at any time and resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor

from cutmix_robustness.cutmix import MixedBatch
from cutmix_robustness.data.sources import ImageFiles, ResidentImages
from cutmix_robustness.draws import generator_for
from cutmix_robustness.networks import Classifier
from cutmix_robustness.recipe import Recipe
from cutmix_robustness.settings import Settings
from shared_utils.cuda_graph import StepGraph, load_optimizer, set_learning_rate
from shared_utils.files import whole_file
from shared_utils.logging import get_logger, progress

logger = get_logger("cutmix-robustness")


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric on one process, or on all that torchrun or Slurm started (DDP, batch statistics per GPU as in the paper).

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


def build_optimizer(settings: Settings, model: Classifier) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum 0.9, or Adam, weight decay on all parameters; fused on CUDA."""
    head = list(model.network.fc.parameters())
    ids = {id(parameter) for parameter in head}
    body = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": body, "base_lr": settings.lr}, {"params": head, "base_lr": settings.head_lr or settings.lr}]
    fused = head[0].is_cuda
    for group in groups if fused else []:
        group["lr"] = torch.tensor(settings.lr, device=head[0].device)  # where a CUDA graph reads it
    if settings.optimizer == "adam":
        return torch.optim.Adam(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused, capturable=fused
        )
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay, fused=fused
    )


def fit(
    model: Classifier,
    settings: Settings,
    data: ResidentImages | ImageFiles,
    seed: int,
    fabric: Fabric,
    *,
    outliers: ResidentImages | None = None,
    measure: Callable[[Classifier], dict[str, float]] = lambda model: {},
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    compile: bool = False,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[dict]:
    """Train in place; the same arguments give the same weights on a CPU, even if it was killed and restarted.

    Args:
        model: on the CPU or on the fabric's device.
        settings: settings of the run.
        data: training set.
        seed: seed of order, augmentation and mixing.
        fabric: device, precision and processes.
        outliers: see `Recipe`.
        measure: returns values to add to the curve; called every `settings.eval_every` epochs and after the last.
        checkpoint: file to resume from and to save to; refused if it is from another run. If `measure` gives a
            `validation_error`, the epoch with the lowest one is kept in `best_of(checkpoint)`.
        checkpoint_every: steps between saves; the end of training saves as well.
        compile: torch.compile the classifier.
        before_step: called with the number of steps done.

    Returns:
        The training curve: per epoch the means of `loss` and `mixed_accuracy`, and what `measure` returned.

    Raises:
        ValueError: no full batch, a batch that the ranks cannot share, a checkpoint that is damaged or from another
            run.
        RuntimeError: the loss became NaN or infinite.
    """
    s, rank, world = settings, fabric.global_rank, fabric.world_size
    if s.batch_size % world:
        raise ValueError(f"a global batch of {s.batch_size} cannot be shared by {world} ranks")
    model.to(fabric.device).to(memory_format=torch.channels_last)
    if compile:
        model.compile()
    optimizer = build_optimizer(s, model)
    run = {"settings": json.loads(json.dumps(asdict(s))), "seed": seed, "data": data.record()}
    state: dict[str, Any] = {"epoch": 0, "step": 0, "total": 0, "curve": [], "sums": {}}
    if checkpoint is not None and checkpoint.exists():
        state = _resume(checkpoint, run, model, optimizer, fabric)
        logger.info("resuming at epoch %d, step %d from %s", state["epoch"], state["step"], checkpoint.name)
    wrapped, optimizer = fabric.setup(model, optimizer)
    recipe = Recipe(s, model, wrapped, outliers)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()

    def learn(*parts: Tensor) -> dict[str, Tensor]:
        loss, statistics = recipe.mixed_loss(MixedBatch(*parts))
        descend(loss)
        return statistics

    graphed = recipe.graphed and fabric.device.type == "cuda" and world == 1 and _scaler(fabric) is None
    graph = StepGraph(learn) if graphed else None
    share, own = ((rank, world), ()) if data.whole_batches else ((0, 1), (rank,))  # own: each rank mixes its share
    steps = len(data) // s.batch_size

    with progress() as bar:
        task = bar.add_task(s.network, total=s.epochs * steps, completed=state["total"])
        for epoch in range(state["epoch"], s.epochs):
            for group in optimizer.param_groups:
                decay = 0.1 ** sum(epoch >= milestone for milestone in s.milestones)
                set_learning_rate(group, group["base_lr"] * decay)
            model.train()
            for number, images, labels in data.train_batches(s.batch_size, seed, epoch, state["step"], rank, world):
                before_step(state["total"])
                torch.manual_seed(generator_for(seed, epoch, number, 3, rank).initial_seed())
                share_done = epoch / max(1, s.epochs - 1)
                draw = (seed, epoch, number, *own)
                if graph:
                    statistics = graph(*vars(recipe.mixed(images, labels, draw, share_done)).values())
                else:
                    loss, statistics = recipe.loss(images, labels, draw, share_done, share)
                    descend(loss)
                for name, value in statistics.items():
                    state["sums"][name] = state["sums"].get(name, 0) + value.double()
                state |= {"step": number + 1, "total": state["total"] + 1}
                bar.advance(task)
                if checkpoint is not None and state["total"] % checkpoint_every == 0:
                    _save(checkpoint, run, state, model, optimizer, fabric)
            point = {
                name: (cast(Tensor, fabric.all_reduce(total)) / steps).item() for name, total in state["sums"].items()
            }
            if not all(math.isfinite(value) for value in point.values()):
                raise RuntimeError(f"epoch {epoch + 1}: the loss is NaN or infinite: {point}")
            last = epoch + 1 == s.epochs
            if last or (s.eval_every and (epoch + 1) % s.eval_every == 0):
                point |= measure(model)
            bar.update(task, description=", ".join(f"{name} {value:.4g}" for name, value in point.items()))
            state |= {
                "epoch": epoch + 1,
                "step": 0,
                "curve": [*state["curve"], {"epoch": epoch + 1} | point],
                "sums": {},
            }
            if checkpoint is not None and _is_best(state["curve"]):
                _save(best_of(checkpoint), run, state, model, optimizer, fabric)
    if checkpoint is not None:
        _save(checkpoint, run, state, model, optimizer, fabric)
    return state["curve"]


def best_of(checkpoint: Path) -> Path:
    """Where the epoch of the lowest validation error is kept: c.pt -> c-best.pt."""
    return checkpoint.with_stem(f"{checkpoint.stem}-best")


def _is_best(curve: list[dict]) -> bool:
    """Whether the last epoch has a validation error, and the lowest one so far."""
    earlier = [point["validation_error"] for point in curve[:-1] if "validation_error" in point]
    return curve[-1].get("validation_error", math.inf) < min(earlier, default=math.inf)


def _save(
    path: Path, run: dict, state: dict, model: Classifier, optimizer: torch.optim.Optimizer, fabric: Fabric
) -> None:
    if fabric.global_rank == 0:
        content = {"run": run, "state": state, "network": model.network.state_dict()}
        scaler = _scaler(fabric)
        content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
        with whole_file(path) as temporary:
            torch.save(content, temporary)
    fabric.barrier()


def _resume(path: Path, run: dict, model: Classifier, optimizer: torch.optim.Optimizer, fabric: Fabric) -> dict:
    content = load_checkpoint(path)
    if content["run"] != run:
        theirs = content["run"]
        differing = [name for name in run["settings"] if run["settings"][name] != theirs["settings"].get(name)]
        differing += [name for name in ("seed", "data") if run[name] != theirs[name]]
        raise ValueError(f"{path}: checkpoint of another run (different {', '.join(differing)}); name another file")
    model.network.load_state_dict(content["network"])
    load_optimizer(optimizer, content["optimizer"])
    scaler = _scaler(fabric)
    if scaler and content["scaler"]:
        scaler.load_state_dict(content["scaler"])
    device = next(model.parameters()).device
    sums = {name: value.to(device) for name, value in content["state"]["sums"].items()}
    return content["state"] | {"sums": sums}


def _scaler(fabric: Fabric) -> torch.amp.GradScaler | None:
    return getattr(fabric.strategy.precision, "scaler", None)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint written by `fit`, on the CPU and with weights_only. ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["run"]["settings"], content["network"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({reason}); another kind of model needs `eval --data`"
        ) from error
    return content


def load_network(model: Classifier, weights: dict[str, Tensor], where: str, keep_head: bool = True) -> None:
    """Load a network's state dict; a leading `module.` in its names is dropped.

    Args:
        model: the model whose network is filled.
        weights: names to tensors.
        where: file name for the message.
        keep_head: also load the linear layer; else it stays as initialised.

    Raises:
        ValueError: names or shapes of another network; names the first that differs.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = model.network.state_dict()
    if not keep_head:
        weights = weights | {name: value for name, value in own.items() if name.startswith("fc.")}
    for name in sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"{where}: weights of another network: {name} is {'missing' if name in own else 'unknown'}")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise ValueError(f"{where}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}")
    model.network.load_state_dict(weights)
