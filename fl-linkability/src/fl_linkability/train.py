"""Local training: many clients start from the same weights and each takes its own SGD steps on its own data.

`train_batched` trains many clients at once with stacked parameters; `train_one` is the plain loop over one client,
which Flower's clients run and which the batched form is tested against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fl_linkability.data.bundle import NOTHING, task_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # imported here because it takes seconds

State = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager]
Gradients = Callable[[State, Tensor, Tensor, Tensor, Autocast], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True)
class LocalSGD:
    """What a client does in one round, with a new optimizer each time; the last short batch is kept."""

    epochs: int = 1
    batch_size: int = 8
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric on one process, or on all that torchrun or Slurm started: ranks share the clients of a round.

    Args:
        device: auto (CUDA if available), cpu or cuda.
        precision: auto (bf16-mixed on CUDA from Ampere on, else 32-true) or one of Fabric's.
    """
    from lightning.fabric import Fabric

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        ampere = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16-mixed" if ampere else "32-true"
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


def training_norms(model: nn.Module) -> dict[str, _NormBase]:
    """Layers, by name, that normalise by the batch or keep running statistics when the network is in training mode."""
    model.train()
    norms = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _NormBase) and layer.training)
    return {name: layer for name, layer in norms if isinstance(layer, _BatchNorm) or layer.track_running_stats}


def trained_state(model: nn.Module) -> State:
    """A copy of what a client trains and sends: parameters that are not frozen, and running statistics that move."""
    state = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    for name, layer in training_norms(model).items():
        for statistic in ("running_mean", "running_var"):
            if (value := getattr(layer, statistic)) is not None:
                state[f"{name}.{statistic}"] = value.detach().clone()
    return state


def flatten(state: State) -> Tensor:
    """(D,), parameter by parameter in the state's order."""
    return torch.cat([value.flatten() for value in state.values()])


def layer_slices(state: State) -> dict[str, tuple[int, int]]:
    """Where each parameter lies in the flat update."""
    ends = np.cumsum([v.numel() for v in state.values()]).tolist()
    return dict(zip(state, zip([0, *ends[:-1]], ends, strict=True), strict=True))


def unflatten(flat: Tensor, like: State) -> State:
    """The inverse of `flatten` for one update."""
    parts = flat.split([v.numel() for v in like.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(like.items(), parts, strict=True)}


def as_input(x: Tensor) -> Tensor:
    """uint8 images become floats in [0, 1]; floats and tokens stay."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Loss per sample (n,), by the task of the targets.

    Cross-entropy for a class, its mean over the words of a text, mean binary cross-entropy over labels, squared error
    of a number.
    """
    task = task_of(y)
    if task == "labels":
        return F.binary_cross_entropy_with_logits(outputs.float(), y, reduction="none").mean(-1)
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if task == "number":
        return (outputs - y).square()
    if task == "words":
        each = F.cross_entropy(outputs.transpose(1, 2), y, reduction="none", ignore_index=NOTHING)
        return each.sum(1) / (y != NOTHING).sum(1).clamp(min=1)
    return F.cross_entropy(outputs, y, reduction="none")


def epoch_orders(n: int, epochs: int, rng: np.random.Generator) -> np.ndarray:
    """The order of a client's samples, int64 (epochs, n)."""
    return np.stack([rng.permutation(n) for _ in range(epochs)])


def batch_table(
    orders: Sequence[np.ndarray], starts: Sequence[int] | np.ndarray, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Batches of many clients side by side.

    Args:
        orders: per client int (epochs, n_k), from `epoch_orders`.
        starts: row of each client's first sample in the common pool.
        batch_size: B; a short last batch is averaged over its own size.

    Returns:
        rows int64 (K, S, B) of the pool and weights float32 (K, S, B): 1/size in a batch, 0 where there is no sample.
    """
    steps = [order.shape[0] * -(-order.shape[1] // batch_size) for order in orders]
    rows = np.zeros((len(orders), max(steps), batch_size), dtype=np.int64)
    weights = np.zeros(rows.shape, dtype=np.float32)
    for k, (order, start) in enumerate(zip(orders, starts, strict=True)):
        per_epoch = -(-order.shape[1] // batch_size)
        full, rest = divmod(order.shape[1], batch_size)
        padded = np.zeros((len(order), per_epoch * batch_size), dtype=np.int64)
        padded[:, : order.shape[1]] = order + start
        rows[k, : steps[k]] = padded.reshape(-1, batch_size)
        mask = np.full((per_epoch, batch_size), 1 / batch_size, dtype=np.float32)
        if rest:
            mask[full] = np.where(np.arange(batch_size) < rest, 1 / rest, 0)
        weights[k, : steps[k]] = np.tile(mask, (len(order), 1))
    return torch.from_numpy(rows), torch.from_numpy(weights)


def train_batched(
    model: nn.Module,
    state: State,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    weights: Tensor,
    local: LocalSGD,
    autocast: Autocast = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Train K clients at once; weights and updates stay in the state's precision, autocast applies to the network only.

    Args:
        model: its forward defines the network (its `stacked` method if it has one); its weights are not touched.
        state: common start, from `trained_state`.
        x: (N, ...) samples of all clients.
        y: (N,), (N, labels) or (N, length).
        rows: (K, S, B), from `batch_table`.
        weights: (K, S, B).
        local: how clients train.
        autocast: such as `fabric.autocast`; gradients written out by a model (`stacked_gradients`) ignore it.

    Returns:
        updates (K, D), new minus old, and the loss before each step (K, S), NaN past a client's last step.

    Raises:
        ValueError: a network whose clients cannot run side by side: dropout, batch norm in training mode, or an
            operation that vmap does not support.
    """
    k, n_steps, _ = rows.shape
    names = list(state)
    params = [v.detach().expand(k, *v.shape).clone() for v in state.values()]
    velocity = [torch.zeros_like(p) for p in params] if local.momentum else None
    gradients = _gradients(model, y)
    steps = rows.unbind(1)
    step_weights = [w.to(params[0].dtype) for w in weights.unbind(1)]
    active = weights.sum(2) > 0  # (K, S)
    ragged = [not all_on for all_on in active.all(0).tolist()]
    history = []
    model.train()
    for step in range(n_steps):
        xb, yb = as_input(x[steps[step]]), y[steps[step]]
        loss, grads = gradients(dict(zip(names, params, strict=True)), xb, yb, step_weights[step], autocast)
        history.append(loss)
        on = active[:, step] if ragged[step] else None
        _sgd_step(params, grads, velocity, local, on)
    deltas = torch.cat([(p - v).flatten(1) for p, v in zip(params, state.values(), strict=True)], 1)
    return deltas, torch.where(active, torch.stack(history, 1), torch.nan)


def _gradients(model: nn.Module, y: Tensor) -> Gradients:
    """Losses (K,) and gradients of stacked parameters: the model's own form, or autograd over `stacked` or vmap."""
    if norms := training_norms(model):
        raise ValueError(
            f'batch norm in training mode ({next(iter(norms))}) needs engine "loop": "batched" pads short batches, '
            "which would enter the statistics"
        )
    own = _own_form(model, "stacked_gradients")
    if own is not None and task_of(y) == "class":
        return lambda params, x, y, weights, autocast: own(params, x, y, weights)

    def one(params: State, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    forward = _own_form(model, "stacked") or vmap(one, randomness="error")

    def gradients(
        params: State, x: Tensor, y: Tensor, weights: Tensor, autocast: Autocast
    ) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = {name: value.requires_grad_() for name, value in params.items()}
        try:
            with autocast():
                logits = forward(leaves, x)
        except RuntimeError as error:
            reason = str(error).split(". ")[0]
            if "vmap" not in reason and "Batching rule" not in reason:
                raise
            raise ValueError(
                f'this network needs engine "loop": its clients cannot run side by side ({reason})'
            ) from error
        loss = (losses(logits.flatten(0, 1), y.flatten(0, 1)).view(weights.shape) * weights).sum(1)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        for value in leaves.values():
            value.requires_grad_(False)
        return loss.detach(), grads

    return gradients


def _own_form(model: nn.Module, name: str) -> Callable | None:
    """A network's stacked form, if it belongs to the forward in use and no layer is frozen."""
    defines = (next((c for c in type(model).__mro__ if each in vars(c)), None) for each in (name, "forward"))
    form, forward = defines
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    return getattr(model, name) if form is forward and trains_all else None


def _sgd_step(
    params: list[Tensor], grads: Sequence[Tensor], velocity: list[Tensor] | None, local: LocalSGD, on: Tensor | None
) -> None:
    """torch.optim.SGD on stacked parameters; clients that are not `on` (K,) do not change."""
    grads = list(grads)
    if local.weight_decay:
        grads = torch._foreach_add(grads, params, alpha=local.weight_decay)
    if velocity is not None:
        torch._foreach_mul_(velocity, local.momentum)
        torch._foreach_add_(velocity, grads)
        grads = velocity
    if on is not None:
        grads = [g * on.view(-1, *[1] * (g.ndim - 1)) for g in grads]
    torch._foreach_add_(params, grads, alpha=-local.lr)


def train_one(
    model: nn.Module,
    state: State,
    x: Tensor,
    y: Tensor,
    order: np.ndarray,
    local: LocalSGD,
    autocast: Autocast = nullcontext,
) -> tuple[Tensor, Tensor]:
    """One client with nn.Module and torch.optim.SGD; the model's weights are overwritten, its other buffers are not.

    Returns:
        update (D,) and the loss before each step (S,).
    """
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    targets = dict(model.named_parameters()) | buffers
    with torch.no_grad():
        for name, value in state.items():
            targets[name].copy_(value)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    model.train()
    history = []
    for epoch in order:
        for rows in torch.from_numpy(epoch).to(x.device).split(local.batch_size):
            optimizer.zero_grad()
            with autocast():
                logits = model(as_input(x[rows]))
            loss = losses(logits, y[rows]).mean()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
    delta = torch.cat([(targets[name].detach() - value).flatten() for name, value in state.items()])
    with torch.no_grad():
        for name, value in before.items():  # nothing carries over to the next client
            buffers[name].copy_(value)
    return delta, torch.stack(history)
