"""Min-max normalisation and the attention map of a class, which ACoL and SPG share."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(maps: Tensor) -> Tensor:
    """Min-max over the last two axes: (..., h, w) -> the same in [0, 1]; a constant map becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def select(maps: Tensor, labels: Tensor) -> Tensor:
    """The map of each image's class: (B, C, h, w), (B,) -> (B, h, w)."""
    return maps[torch.arange(len(maps), device=maps.device), labels]


def attention(maps: Tensor, labels: Tensor) -> Tensor:
    """The normalised map of each image's class, without gradient: (B, C, h, w), (B,) -> (B, 1, h, w)."""
    return normalize(select(maps.detach(), labels))[:, None]
