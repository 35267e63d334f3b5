"""The base class of methods, the vanilla network, and ReBias: networks, optimizers, steps that read like the equations.

A step sees images, targets and sample indices; bias labels never reach it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from rebias.data.dataset import Dataset
from rebias.independence import dimension_sigma, median_sigma
from rebias.models import Network
from rebias.objectives import ReBiasLoss
from rebias.settings import Settings

Parts = dict[str, Tensor]


class Method(ABC):
    """Base class of methods.

    Attributes:
        modules: everything with weights, by name; "f" is the network that is evaluated.
        optimizers: by name, wrapped by Fabric.
        loss: set if its bandwidths belong in a checkpoint.
    """

    loss: ReBiasLoss | None = None
    graphed = False
    """whether on CUDA the steps are replayed as a graph: they neither draw random numbers nor wait for a value"""

    def __init__(self, settings: Settings, fabric: Fabric):
        self.settings, self.fabric = settings, fabric
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}

    def add(self, name: str, *modules: nn.Module) -> list[nn.Module]:
        """Put modules under one Adam; returns them wrapped by Fabric."""
        wrapped: list[nn.Module] = [self.fabric.setup_module(module) for module in modules]
        weights = itertools.chain(*(module.parameters() for module in modules))
        s = self.settings
        cuda = self.fabric.device.type == "cuda"
        rate = torch.tensor(s.lr, device=self.fabric.device) if cuda else s.lr
        adam = torch.optim.Adam(weights, lr=rate, weight_decay=s.weight_decay, fused=True, capturable=cuda)
        self.optimizers[name] = self.fabric.setup_optimizers(adam)
        for number, module in enumerate(wrapped):
            self.modules[name if number == 0 else f"{name}.head"] = module
        return wrapped

    def descend(self, name: str, loss: Tensor) -> None:
        """One step of an optimizer on a loss."""
        self.optimizers[name].zero_grad()
        self.fabric.backward(loss)
        self.optimizers[name].step()

    def start_epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:  # noqa: B027  most methods need none
        """Called before every epoch with a share of the training batches."""

    def pretrain_step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        """A step of the epochs that come before training proper."""
        raise ValueError(f"{self.settings.method} has nothing to pre-train; set pretrain_epochs to 0")

    def finish(self) -> None:  # noqa: B027  most methods need none
        """Called after the last epoch; a second call changes nothing."""

    @abstractmethod
    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        """One training step; returns detached parts of the losses.

        Args:
            images: (B, ...).
            targets: (B,) int64.
            index: (B,) indices of the samples in the training set, on any device.
        """


class Vanilla(Method):
    """Cross-entropy alone; with `monitor_g` a biased network, which f never sees, is trained alongside."""

    graphed = True

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        (self.f,) = self.add("f", f)
        if settings.monitor_g:
            (self.g,) = self.add("g0", gs[0])

    def step(self, images: Tensor, targets: Tensor, index: Tensor | None = None) -> Parts:
        logits, features = self.f(images)
        loss = F.cross_entropy(logits, targets)
        parts = {"f_cross_entropy": loss.detach()}
        if self.settings.penalty == "feature-norm":
            norm = features.float().square().mean()
            loss, parts["feature_norm"] = loss + self.settings.f_lambda * norm, norm.detach()
        self.descend("f", loss)
        if self.settings.monitor_g:
            self.descend("g0", F.cross_entropy(self.g(images)[0], targets))
        return parts


class ReBias(Method):
    """Alternating minimax of section 3.2, Algorithm 1.

    g-first uses one forward pass of f for both steps; f-first (the paper's order) needs a second one of f, without
    gradient. Forward passes without gradient do not change batch norm's running statistics.
    """

    loss: ReBiasLoss

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        s = settings
        sigma = "median" if s.sigma == "median" and s.sigma_every == "batch" else s.sigma_value
        self.loss = ReBiasLoss(
            s.f_lambda, s.g_lambda, sigma, sigma, s.estimator, s.conditional, gather=gather_with_gradient
        )
        fixed = s.sigma == "fixed" or (s.sigma == "median" and s.sigma_every == "batch")
        self.graphed = fixed and not s.conditional and s.penalty != "hsic-shuffled"
        (self.f,) = self.add("f", f)
        self.gs = [self.add(f"g{number}", g)[0] for number, g in enumerate(gs)]

    def step(self, images: Tensor, targets: Tensor, index: Tensor | None = None) -> Parts:
        f_logits, f_feat = self._forward(self.f, images)
        if self.settings.order == "g-first":
            parts = self._update_g(images, targets, f_feat.detach())
            return parts | self._update_f(images, targets, f_logits, f_feat)
        parts = self._update_f(images, targets, f_logits, f_feat)
        if self.settings.n_g_update:
            with torch.no_grad(), frozen_statistics(self.f):
                f_feat = self._forward(self.f, images)[1]
        return parts | self._update_g(images, targets, f_feat)

    def _update_g(self, images: Tensor, targets: Tensor, f_feat: Tensor) -> Parts:
        parts: Parts = {}
        for number, g in enumerate(self.gs):
            for _ in range(self.settings.n_g_update):
                g_logits, g_feat = self._forward(g, images)
                loss, parts = self.loss.g_loss(g_logits, g_feat, f_feat, targets)
                self.descend(f"g{number}", loss)
        return parts

    def _update_f(self, images: Tensor, targets: Tensor, f_logits: Tensor, f_feat: Tensor) -> Parts:
        counted = self.gs if self.settings.n_g_update else []  # a g that is never updated sees its images only here
        with torch.no_grad(), frozen_statistics(*counted):
            g_feats = [self._forward(g, images)[1] for g in self.gs]
        if self.settings.penalty == "hsic-shuffled":
            order = torch.randperm(len(images), device=images.device)
            g_feats = [g_feat[order] for g_feat in g_feats]
        loss, parts = self.loss.f_loss(f_logits, f_feat, g_feats, targets)
        self.descend("f", loss)
        return parts

    def _forward(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = network(images)
        return logits, logits if self.settings.feature == "logits" else features

    @torch.no_grad()
    def start_epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Recompute bandwidths that are the median over a share of the training set, or the dimension."""
        s = self.settings
        if s.sigma == "fixed" or (s.sigma == "median" and s.sigma_every == "batch"):
            return
        f_feats, g_feats = [], []
        with frozen_statistics(self.f, *self.gs):  # in train mode, as the loss will see the features
            for images, _ in batches:
                f_feats.append(self._forward(self.f.train(), images)[1])
                g_feats += [self._forward(g.train(), images)[1] for g in self.gs]
                if s.sigma == "dimension":
                    break
        if s.sigma == "dimension":
            self.loss.sigma_f = s.sigma_value * dimension_sigma(f_feats[0])
            self.loss.sigma_g = s.sigma_value * dimension_sigma(g_feats[0])
        else:
            self.loss.sigma_f = s.sigma_value * median_sigma(f_feats)
            self.loss.sigma_g = s.sigma_value * median_sigma(g_feats)


@contextmanager
def frozen_statistics(*networks: nn.Module) -> Iterator[None]:
    """Inside, batch norm in train mode does not change its running mean and variance, bit for bit."""
    norms = [m for network in networks for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def gather_with_gradient(x: Tensor) -> Tensor:
    """(B, ...) of every rank as (ranks * B, ...); the gradient goes back to the rank that a row came from.

    HSIC of gathered features is that of the whole batch: every rank computes the same value, and the mean of the
    ranks' gradients that DDP takes is its gradient.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    if not x.is_floating_point():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather  # missing in a build without distributed

    return torch.cat(all_gather(x.contiguous()))
