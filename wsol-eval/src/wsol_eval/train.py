"""Training of the six methods and of FSL: SGD with Nesterov momentum, on one device or many (Lightning Fabric).

A run that is killed and started again ends with the same weights, bit by bit on the CPU: a checkpoint holds model,
optimizer, position in the epoch and every rank's random state.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import SGD

from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state, seed_everything
from wsol_eval.data import Source, num_batches
from wsol_eval.methods.cutmix import mix
from wsol_eval.methods.has import hide_patches
from wsol_eval.models import Network, build_model, plugin
from wsol_eval.recipe import Recipe

logger = get_logger("wsol-eval")


class Diverged(RuntimeError):
    """The loss is not finite any more."""


def build_network(recipe: Recipe, num_classes: int) -> Network:
    """The network of a recipe, newly initialised from the global random state."""
    if plugin.is_plugin(recipe.method):
        if recipe.pretrained is not None:
            raise ValueError(f"pretrained: {recipe.method} loads its own weights, leave this out")
        return plugin.build(recipe.method, num_classes, recipe.feature_map, dict(recipe.own))
    hp: dict[str, Any] = {"acol_threshold": recipe.acol_threshold, "adl_drop_rate": recipe.adl_drop_rate}
    hp |= {"adl_threshold": recipe.adl_threshold, "spg": tuple(map(tuple, recipe.spg))}
    return build_model(recipe.arch, recipe.method, num_classes, recipe.feature_map, recipe.pretrained, **hp)


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric on one process, or on all that torchrun or Slurm started (DDP).

    Args:
        device: auto (CUDA where there is one), cpu or cuda.
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
        precision=precision,  # type: ignore[arg-type]  # Fabric checks the name
    )
    fabric.launch()
    return fabric


def fit(
    recipe: Recipe,
    source: Source,
    seed: int,
    fabric: Fabric,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    compile_model: bool = False,
) -> Network:
    """Train a model; the last epoch's weights are the result (the reference's authors recommend the last).

    Args:
        recipe: architecture, method and hyperparameters.
        source: training images: labels alone are read, but for fsl, which reads masks or boxes.
        seed: of weights, order, augmentation and the methods' draws.
        fabric: from `make_fabric`.
        checkpoint: file to resume from and to save to; one of another recipe or seed is refused.
        checkpoint_every: steps between saves.
        compile_model: torch.compile the network.

    Returns:
        The network in eval mode, on the device of `fabric`.

    Raises:
        ValueError: a checkpoint that is damaged or of another run.
        Diverged: the loss is not finite at the end of an epoch.
    """
    seed_everything(seed)
    network = build_network(recipe, source.num_classes)
    if fabric.device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    optimizer = SGD(
        network.parameter_groups(recipe.lr, recipe.lr_classifier_ratio),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        fused=True,
    )
    base = [group["lr"] for group in optimizer.param_groups]
    compiled = cast(torch.nn.Module, torch.compile(network)) if compile_model else network
    model, optimizer = fabric.setup(compiled, optimizer)
    run = json.loads(json.dumps(asdict(recipe))) | {"seed": seed, "images": len(source)}
    run |= {"data": source.checksum()} if checkpoint else {}
    run |= {"method_file": plugin.checksum(recipe.method)} if plugin.is_plugin(recipe.method) else {}
    epoch, step = _resume(checkpoint, run, network, optimizer, fabric) if checkpoint else (0, 0)
    if (epoch, step) == (0, 0) and fabric.world_size > 1:
        seed_everything(seed + 7919 * fabric.global_rank)  # from here on ranks draw different masks
    per_epoch = num_batches(len(source), recipe.batch_size, fabric.world_size)
    dense = recipe.method == "fsl"

    while epoch < recipe.epochs:
        network.train()
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * recipe.learning_rate(epoch)
        loss = torch.zeros((), device=fabric.device)
        for images, labels in source.training(recipe.batch_size, seed, epoch, step, fabric, dense):
            if fabric.device.type == "cuda":
                images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = _loss(recipe, model, network, images, labels)
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if checkpoint and (epoch * per_epoch + step) % checkpoint_every == 0:
                _save(checkpoint, run, epoch, step, network, optimizer, fabric)
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"epoch {epoch + 1}: the loss is {loss.item()}; a learning rate below {recipe.lr:g} may help"
            )
        epoch, step = epoch + 1, 0
        if checkpoint:
            _save(checkpoint, run, epoch, step, network, optimizer, fabric)
            logger.info("epoch %d of %d: loss of the last batch %.4f", epoch, recipe.epochs, loss.item())
    if fabric.world_size > 1:
        for buffer in network.buffers():  # statistics of batch normalisation, which each rank gathers by itself
            torch.distributed.broadcast(buffer, 0)
    return network.eval()


def _loss(recipe: Recipe, model: torch.nn.Module, network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Loss of a batch, 0-d; HaS and CutMix change the images first."""
    if recipe.method == "has":
        images = hide_patches(images, recipe.has_grid_size, recipe.has_drop_rate)
    if recipe.method != "cutmix":
        return network.loss(model(images, labels), labels)
    rng = cast(np.random.RandomState, np.random)  # the global one
    images, others, share = mix(images, labels, recipe.cutmix_beta, recipe.cutmix_prob, rng)
    outputs = model(images, labels)
    return share * network.loss(outputs, labels) + (1 - share) * network.loss(outputs, others)


def _save(
    path: Path, run: dict, epoch: int, step: int, network: Network, optimizer: torch.optim.Optimizer, fabric: Fabric
) -> None:
    states = [rng_state()] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(states, rng_state())
    if fabric.is_global_zero:
        state = {"run": run, "epoch": epoch, "step": step, "rng": states}
        with whole_file(path) as temporary:
            torch.save(state | {"model": network.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    fabric.barrier()


def _resume(path: Path, run: dict, network: Network, optimizer: torch.optim.Optimizer, fabric: Fabric) -> tuple:
    """Load everything a checkpoint holds; returns its epoch and step, (0, 0) if there is none."""
    if not path.exists():
        return 0, 0
    state = read_checkpoint(path)
    if state["run"] != run:
        differing = ", ".join(key for key in run if run[key] != state["run"].get(key))
        raise ValueError(f"{path}: checkpoint of another run (other {differing}); name another file")
    if len(state["rng"]) != fabric.world_size:
        raise ValueError(
            f"{path}: written by {len(state['rng'])} processes, this is one of {fabric.world_size}; "
            "start as many, or name another file"
        )
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restore_rng_state(state["rng"][fabric.global_rank])
    logger.info("%s: going on after epoch %d, step %d", path, state["epoch"], state["step"])
    return state["epoch"], state["step"]


def read_checkpoint(path: Path) -> dict:
    """What `fit` saved. FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | {"run": state["run"]}
    except Exception as error:  # zip, pickle and key errors of a damaged or foreign file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); name another file to start again") from error


def load_trained(path: Path, num_classes: int) -> tuple[Network, Recipe]:
    """The network of a checkpoint, and its recipe. ValueError if it has another number of classes."""
    state = read_checkpoint(path)
    names = {field.name for field in fields(Recipe)} - {"pretrained"}
    recipe = Recipe.of({name: value for name, value in state["run"].items() if name in names})
    if plugin.is_plugin(recipe.method) and plugin.checksum(recipe.method) != state["run"]["method_file"]:
        raise ValueError(f"{path}: the file of {recipe.method} has changed since this was trained; train it again")
    network = build_network(recipe, num_classes)
    try:
        network.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected a checkpoint of {num_classes} classes ({str(error).splitlines()[-1].strip()})"
        ) from error
    return network.eval(), recipe
