"""The Inception network behind FID, in PyTorch: used by published FID and precision numbers.

It is Inception v3 as in the TensorFlow graph of 2015: average pools that leave padding out of the mean, a maximum
in the last block's pool, 1,008 classes, and TensorFlow 1's resize. pytorch-fid converted its weights to torchvision's
names, and torch-fidelity reads the same file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import Inception3, inception_v3


def empty_inception() -> Inception3:
    """On the meta device, with the names and shapes of pt_inception-2015-12-05-6726825d.pth."""
    with torch.device("meta"):
        return inception_v3(weights=None, init_weights=False, transform_input=False, num_classes=1008, aux_logits=False)


def pool_as_tensorflow(net: Inception3) -> nn.Module:
    """The loaded network with the graph's pools and without its classifier: (B, 3, 299, 299) -> (B, 2048)."""
    mean = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        pool = mean if name != "7c" else nn.MaxPool2d(3, stride=1, padding=1)
        setattr(net, f"Mixed_{name}", _Pooled(getattr(net, f"Mixed_{name}"), pool))
    net.fc = nn.Identity()
    return net


class _Pooled(nn.Module):
    """A torchvision block with a different pool before its last branch."""

    def __init__(self, block: nn.Module, pool: nn.Module):
        super().__init__()
        self.block: Any = block  # torchvision does not type its branches
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.block.branch_pool(self.pool(x))], 1)


def resize_as_tensorflow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) -> (..., H, W): bilinear between the pixels at i * h / H, without antialias or half-pixel centres."""
    rows, columns = (_weights(old, new).to(images) for old, new in zip(images.shape[-2:], size, strict=True))
    return rows @ images @ columns.T


def _weights(old: int, new: int) -> Tensor:
    """(new, old) float32: each row takes at most two neighbouring pixels."""
    place = torch.arange(new, dtype=torch.float32) * (old / new)
    low = place.long()
    weights = torch.zeros(new, old)
    share = place - low
    weights[torch.arange(new), low] = 1 - share
    weights[torch.arange(new), (low + 1).clamp(max=old - 1)] += share
    return weights
