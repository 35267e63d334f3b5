"""Shared by all residual networks here: `Classifier`, initialisation, and modules that drop a branch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cutmix_robustness.dropout import DropBlock2d, ShakeDrop, StochasticDepth, survival_probability

BRANCHES = ("none", "stochdepth", "shakedrop", "dropblock")


def branch_regularizers(kind: str, blocks: int, rate: float, block_size: int = 4) -> list[nn.Module]:
    """One module per residual block, applied to the block's branch before the addition.

    Args:
        kind: none, stochdepth, shakedrop or dropblock.
        blocks: number of residual blocks.
        rate: drop rate of the last block (linear decay) for stochdepth and shakedrop, of the units for dropblock.
        block_size: side of dropblock's squares.

    Raises:
        ValueError: an unknown kind, or a rate outside [0, 1).
    """
    if kind not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}, got {kind!r}")
    if not 0 <= rate < 1:
        raise ValueError(f"branch_rate must lie in [0, 1), got {rate}")
    if kind == "none":
        return [nn.Identity() for _ in range(blocks)]
    if kind == "dropblock":
        return [DropBlock2d(1 - rate, block_size) for _ in range(blocks)]
    build = StochasticDepth if kind == "stochdepth" else ShakeDrop
    return [build(survival_probability(block, blocks, rate)) for block in range(1, blocks + 1)]


def initialise(network: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k * k * out))), batch norm 1 and 0, linear layers as torch does (section 4.1)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Classifier(nn.Module):
    """A network preceded by its data set's normalisation, so that attacks work in pixel space.

    Args:
        network: normalised images (N, 3, H, W) to logits (N, K); `network.points` names the places where it can mix.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    network: Any  # a network of this package, with `points`, `features` and `fc`
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to logits (N, K)."""
        return self.network((images - self.mean) / self.std)
