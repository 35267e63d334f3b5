"""From features to logits and score maps: one head per method.

A head gets the features of three depths (low, middle, top) and returns a dict with `logits` (B, classes) and what
`score_map` and `loss` need. Score maps are raw: resizing and normalising come after (scoremaps.resize_normalize).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, binary_cross_entropy_with_logits, cross_entropy

from wsol_eval.methods.acol import acol_loss, erase
from wsol_eval.methods.attention import normalize, select
from wsol_eval.methods.spg import spg_loss

Features = tuple[Tensor, Tensor, Tensor]
Outputs = dict[str, Any]  # tensors, and the input's size


def conv(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution with ReLU; the size stays."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


class Head(nn.Module):
    """Base: cross-entropy, and the map of the label's class from `outputs["maps"]` (B, classes, h, w)."""

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"], labels)

    def score_map(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return select(outputs["maps"], labels)


class LinearHead(Head):
    """CAM (Zhou et al., CVPR 2016): pooled features, one linear layer; the map is the MEAN of weight * feature."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, features: Features, labels: Tensor | None) -> Outputs:
        top = features[-1]
        return {"logits": self.fc(top.mean((2, 3))), "features": top}

    def score_map(self, outputs: Outputs, labels: Tensor) -> Tensor:
        weights = self.fc.weight[labels]  # (B, C)
        return torch.einsum("bc,bchw->bhw", weights, outputs["features"].to(weights.dtype)) / weights.shape[1]


class ConvHead(Head):
    """CAM as a 1x1 convolution before the pooling: its class channel is the map."""

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(channels, num_classes, 1))

    def forward(self, features: Features, labels: Tensor | None) -> Outputs:
        maps = self.classifier(features[-1])
        return {"logits": maps.mean((2, 3)), "maps": maps}


class AcolHead(Head):
    """Two classifiers; the second sees erased features. The map is the larger of both, each min-max normalised."""

    def __init__(self, channels: int, num_classes: int, threshold: float, hidden: tuple[int, ...], pool: bool = False):
        super().__init__()
        widths = (channels, *hidden)

        def branch() -> nn.Sequential:
            layers = [conv(*pair) for pair in zip(widths, widths[1:], strict=False)]
            return nn.Sequential(*layers, nn.Conv2d(widths[-1], num_classes, 1))

        self.classifier_a, self.classifier_b = branch(), branch()
        self.threshold, self.pool = threshold, pool

    def forward(self, features: Features, labels: Tensor | None) -> Outputs:
        top = avg_pool2d(features[-1], 3, 1, 1) if self.pool else features[-1]
        maps_a = self.classifier_a(top)
        logits = maps_a.mean((2, 3))
        maps_b = self.classifier_b(erase(top, maps_a, logits.argmax(1) if labels is None else labels, self.threshold))
        return {"logits": logits, "logits_b": maps_b.mean((2, 3)), "maps": maps_a, "maps_b": maps_b}

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return acol_loss(outputs["logits"], outputs["logits_b"], labels)

    def score_map(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return torch.maximum(normalize(select(outputs["maps"], labels)), normalize(select(outputs["maps_b"], labels)))


class SpgHead(Head):
    """Class maps from the top features; side heads B1 (low), B2 (middle), which share two convolutions, and C (top)."""

    def __init__(
        self,
        channels: tuple[int, int, int],
        num_classes: int,
        thresholds: tuple[tuple[float, float], ...],
        side: int,
        last: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        low, middle, top = channels
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Conv2d(top, num_classes, 1)
        self.b1, self.b2 = conv(low, side), conv(middle, side)
        self.b_shared = nn.Sequential(conv(side, side), nn.Conv2d(side, 1, 1))
        self.c = nn.Sequential(conv(top, last), nn.Conv2d(last, 1, 1))
        self.thresholds = thresholds

    def forward(self, features: Features, labels: Tensor | None) -> Outputs:
        low, middle, top = features
        top = self.dropout(top)  # one mask: head C sees what the classifier sees
        maps = self.classifier(top)
        outputs = {"logits": maps.mean((2, 3)), "maps": maps}
        if self.training:  # the side heads only teach
            outputs["logits_b1"], outputs["logits_b2"] = self.b_shared(self.b1(low)), self.b_shared(self.b2(middle))
            outputs["logits_c"] = self.c(top)
        return outputs

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        sides = (outputs["logits_b1"], outputs["logits_b2"], outputs["logits_c"])
        return spg_loss(outputs["maps"], sides, labels, self.thresholds, outputs["input_size"])


class FslHead(Head):
    """Fully supervised: one channel, per-pixel cross-entropy against masks averaged to the map's size."""

    def __init__(self, channels: int):
        super().__init__()
        self.pixel = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Features, labels: Tensor | None) -> Outputs:
        return {"logits": self.pixel(features[-1])}

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """`labels` are targets (B, H, W) in [0, 1]; 255 is ignored."""
        logits = outputs["logits"][:, 0].float()
        size = (logits.shape[-2], logits.shape[-1])
        counted = adaptive_avg_pool2d((labels <= 1).float()[:, None], size)[:, 0]
        target = adaptive_avg_pool2d((labels * (labels <= 1)).float()[:, None], size)[:, 0]
        target = target / counted.clamp(min=1e-6)
        losses = binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (losses * counted).sum() / counted.sum().clamp(min=1)

    def score_map(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return outputs["logits"][:, 0].float().sigmoid()
