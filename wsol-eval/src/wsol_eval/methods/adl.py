"""ADL (Choe and Shim, CVPR 2019): the most attended region is dropped, or the features are weighted by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_mask(features: Tensor, threshold: float) -> Tensor:
    """1 where the attention stays below threshold * its maximum: (B, C, h, w) -> (B, 1, h, w)."""
    mean = features.mean(1, keepdim=True)
    return (mean < threshold * mean.amax((2, 3), keepdim=True)).to(features.dtype)


def importance(features: Tensor) -> Tensor:
    """Sigmoid of the channel mean: (B, C, h, w) -> (B, 1, h, w)."""
    return features.mean(1, keepdim=True).sigmoid()


class ADL(nn.Module):
    """Multiplies features by the drop mask (probability `drop_rate`, one draw per batch) or else by the importance.

    Identity when not training. The mask has no gradient, the importance has.
    """

    def __init__(self, drop_rate: float = 0.75, drop_threshold: float = 0.9):
        super().__init__()
        self.drop_rate, self.drop_threshold = drop_rate, drop_threshold

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        if not self.training:
            return features
        if torch.rand(()) < self.drop_rate:  # on the CPU: no wait for the device
            return features * drop_mask(features, self.drop_threshold)
        return features * importance(features)
