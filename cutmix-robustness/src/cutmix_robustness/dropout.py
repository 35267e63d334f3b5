"""Regularizers that drop regions of the image (Cutout) or parts of the network (DropBlock, StochDepth, ShakeDrop)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_robustness.draws import own_stream


class Cutout:
    """Cover a square of each image, its centre uniform over the image, clipped at the border.

    Args:
        size: side of the square in pixels: 16 on CIFAR, 112 on ImageNet.
        fill: value, or one per channel; the paper's 0 after normalisation is the mean colour before it.
        generator: generator of the centres, one row of two numbers per image; as in `CutMix`.

    Raises:
        ValueError: size below 1; on calling, images that are not 4-D.
    """

    def __init__(self, size: int, fill: float | tuple[float, ...] = 0.0, generator: torch.Generator | None = None):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.fill, self.generator = size, fill, generator

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to a covered copy."""
        if images.ndim != 4:
            raise ValueError(f"images must be 4-D (N, C, H, W), got shape {tuple(images.shape)}")
        n, channels, height, width = images.shape
        uniform = torch.rand(n, 2, dtype=torch.float64, generator=own_stream(self.generator))
        top_left = (uniform * torch.tensor([height, width])).floor().long() - self.size // 2
        y1, x1 = top_left.to(images.device, non_blocking=True)[:, :, None].unbind(1)  # (N, 1) each
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows, columns = (y >= y1) & (y < y1 + self.size), (x >= x1) & (x < x1 + self.size)
        fill = torch.as_tensor(self.fill, dtype=images.dtype, device=images.device).expand(channels)
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], fill[:, None, None], images)


def dropblock_gamma(keep_prob: float, block_size: int, height: int, width: int) -> float:
    """Rate of block corners on a height x width map such that a share 1 - keep_prob of the units is dropped."""
    corners = (height - block_size + 1) * (width - block_size + 1)
    return (1 - keep_prob) / block_size**2 * height * width / corners


class DropBlock2d(nn.Module):
    """Drop contiguous squares of a feature map in training and rescale what is left.

    torchvision's version takes only odd sizes; the paper uses 4 on CIFAR.

    Args:
        keep_prob: share of units kept, 0.9 in the paper.
        block_size: side of a square, 4 on CIFAR; reduced to the feature map's size if that is smaller.
    """

    def __init__(self, keep_prob: float = 0.9, block_size: int = 4):
        super().__init__()
        if not 0 < keep_prob <= 1 or block_size < 1:
            raise ValueError(f"keep_prob must lie in (0, 1] and block_size be >= 1, got {keep_prob} and {block_size}")
        self.keep_prob, self.block_size = keep_prob, block_size

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training or self.keep_prob == 1:
            return features
        n, channels, height, width = features.shape
        block = min(self.block_size, height, width)
        gamma = dropblock_gamma(self.keep_prob, block, height, width)
        corners = torch.rand(n, channels, height - block + 1, width - block + 1, device=features.device) < gamma
        dropped = F.max_pool2d(F.pad(corners.float(), [block - 1] * 4), block, stride=1)
        keep = 1 - dropped
        return features * (keep * (keep.numel() / keep.sum().clamp(min=1))).to(features.dtype)


def survival_probability(block: int, blocks: int, drop_last: float) -> float:
    """Linear decay: block l of L (from 1) survives with probability 1 - l / L * drop_last."""
    return 1 - block / blocks * drop_last


class StochasticDepth(nn.Module):
    """Drop the residual branch for the whole batch in training; scale it by its survival in evaluation.

    Args:
        survival: probability that the branch is kept.
    """

    def __init__(self, survival: float):
        super().__init__()
        self.survival = survival

    def forward(self, residual: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return residual * self.survival
        return residual * (torch.rand((), device=residual.device) < self.survival).to(residual.dtype)


class _Shake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
        ctx.save_for_backward(backward_scale)
        return residual * forward_scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None, None


class ShakeDrop(nn.Module):
    """out = x + (b + a - b a) F(x) with b ~ Bernoulli(p_l) and a ~ U(-1, 1) forward, U(0, 1) backward, per batch.

    Args:
        survival: p_l; evaluation scales by it, which is the mean of b + a - b a.
    """

    def __init__(self, survival: float):
        super().__init__()
        self.survival = survival

    def forward(self, residual: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return residual * self.survival
        gate, alpha, beta = torch.rand(3, device=residual.device, dtype=residual.dtype)
        kept = gate < self.survival  # b = 1: both factors are 1; b = 0: alpha and beta
        return _Shake.apply(residual, torch.where(kept, 1, 2 * alpha - 1), torch.where(kept, 1, beta))
