"""The methods that ReBias is compared with, one class each; every step is tested against its released code.

RUBi (Cadene et al. 2019) and LearnedMixin (Clark et al. 2019) as the authors of ReBias released them, HEX (Wang et al.
2019), LfF (Nam et al. 2020) and JTT (Liu et al. 2021) as their own authors did. None sees a bias label.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from rebias.data.dataset import Dataset
from rebias.methods import Method, Parts, frozen_statistics, gather_with_gradient
from rebias.models import HexNet, Network
from rebias.objectives import (
    LearnedMixinLoss,
    RUBiLoss,
    SampleLosses,
    generalized_cross_entropy,
    hex_project,
    lff_weights,
)
from rebias.settings import Settings


class RUBi(Method):
    """f masked by a head on g; g is trained at the same time by its own cross-entropy."""

    graphed = True

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        head = RUBiLoss(gs[0].fc.in_features, gs[0].fc.out_features)
        (self.f, self.head), (self.g,) = _with_head(self, f, head), self.add("g0", gs[0])

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        self.descend("g0", F.cross_entropy(self.g(images)[0], targets))
        with torch.no_grad(), frozen_statistics(self.g):
            _, g_feat = self.g(images)  # of the updated g, as in the released code
        loss, parts = self.head(self.f(images)[0], g_feat, targets)
        self.descend("f", loss)
        return parts


class LearnedMixin(Method):
    """f with a g that was trained before and is frozen."""

    graphed = True

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        head = LearnedMixinLoss(f.fc.in_features)
        (self.f, self.head), (self.g,) = _with_head(self, f, head), self.add("g0", gs[0])

    def pretrain_step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        loss = F.cross_entropy(self.g(images)[0], targets)
        self.descend("g0", loss)
        return {"g_cross_entropy": loss.detach()}

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        with torch.no_grad(), frozen_statistics(self.g):
            g_logits, _ = self.g(images)  # in train mode, as in the released code
        f_logits, f_feat = self.f(images)
        loss, parts = self.head(f_logits, f_feat, g_logits, targets)
        self.descend("f", loss)
        return parts


class HEX(Method):
    """Logits from which everything that the grey-level co-occurrence branch can predict is projected out."""

    f: Any  # HexNet wrapped by Fabric, which forwards `both`

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        (self.f,) = self.add("f", HexNet(f, f.fc.in_features, f.fc.out_features))
        self.f.mark_forward_method("both")

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        loss = F.cross_entropy(hex_project(*self.f.both(images)), targets)
        self.descend("f", loss)
        return {"f_cross_entropy": loss.detach()}


class LfF(Method):
    """Learning from failure: a twin of f is trained to be biased; f learns the samples that the twin finds hard."""

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        (self.f,), (self.g,) = self.add("f", f), self.add("g0", gs[0])
        self.f_losses, self.g_losses = (SampleLosses(len(data), f.fc.out_features) for _ in range(2))
        self.modules |= {
            "f.losses": fabric.to_device(self.f_losses), "g0.losses": fabric.to_device(self.g_losses)
        }  # fmt: skip

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        f_logits, g_logits = self.f(images)[0].float(), self.g(images)[0].float()
        f_losses = F.cross_entropy(f_logits, targets, reduction="none")
        g_losses = F.cross_entropy(g_logits, targets, reduction="none")
        for losses, each in ((self.f_losses, f_losses), (self.g_losses, g_losses)):
            losses.update(*(gather_with_gradient(x) for x in (each.detach(), targets, index.to(targets.device))))
        weights = lff_weights(self.f_losses.relative(index), self.g_losses.relative(index))
        loss = (weights * f_losses).mean()
        self.descend("f", loss)
        self.descend("g0", generalized_cross_entropy(g_logits, targets))
        return {"f_weighted_cross_entropy": loss.detach()}


class JTT(Method):
    """Just train twice: samples that a first, briefly trained network gets wrong count more for f.

    The released code repeats those samples in the training set; here they have a larger weight in their batch,
    so an epoch keeps its length.
    """

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        (self.f,), (self.g,) = self.add("f", f), self.add("g0", gs[0])

    def pretrain_step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        loss = F.cross_entropy(self.g(images)[0], targets)
        self.descend("g0", loss)
        return {"g_cross_entropy": loss.detach()}

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        with torch.no_grad():
            wrong = self.g.eval()(images)[0].argmax(1) != targets
        weights = 1 + self.settings.upweight * wrong.float()
        losses = F.cross_entropy(self.f(images)[0].float(), targets, reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        self.descend("f", loss)
        return {"f_weighted_cross_entropy": loss.detach(), "wrong": wrong.float().mean()}


def _with_head(method: Method, f: nn.Module, head: nn.Module) -> list[nn.Module]:
    """Put f and its loss's head under one optimizer; or leave the head random, as the released code does."""
    if method.settings.head == "trained":
        return method.add("f", f, head)
    head.requires_grad_(False)
    method.modules["f.head"] = method.fabric.to_device(head)
    return [*method.add("f", f), head]
