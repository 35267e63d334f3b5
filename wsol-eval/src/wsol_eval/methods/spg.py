"""SPG (Zhang et al., ECCV 2018): pixel-wise side heads learn from confident parts of deeper attention maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from wsol_eval.methods.attention import attention

IGNORED = 255
FEWEST_FOREGROUND = 30  # pixels


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, as all of SPG's maps."""
    return interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def seed_mask(maps: Tensor, high: float, low: float) -> Tensor:
    """1 above `high`, then 0 below `low`, else 255: (B, 1, H, W) -> the same, float.

    An image with fewer than 30 pixels above `high` takes those above 0.7 times its maximum instead.
    """
    foreground = maps > high
    few = foreground.sum((1, 2, 3), keepdim=True) < FEWEST_FOREGROUND
    foreground = torch.where(few, maps > 0.7 * maps.amax((1, 2, 3), keepdim=True), foreground)
    mask = torch.where(foreground, 1.0, float(IGNORED))
    return torch.where(maps < low, 0.0, mask)


def seed_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean binary cross-entropy over the pixels that are not ignored: (B, 1, H, W) both; 0 if there are none."""
    counted = mask < IGNORED
    losses = binary_cross_entropy_with_logits(logits, mask.clamp(max=1).to(logits.dtype), reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def spg_loss(
    maps: Tensor,
    side_logits: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    thresholds: Sequence[tuple[float, float]],
    size: Sequence[int] = (224, 224),
) -> Tensor:
    """Classification plus three side losses.

    Args:
        maps: (B, classes, h, w) class maps; their mean is the logit.
        side_logits: of B1, B2 and C, (B, 1, h, w) each.
        labels: (B,).
        thresholds: (high, low) of the attention for B2, of B2 for B1, and of both together for C.
        size: (height, width) at which maps are compared.
    """
    b1, b2, c = (upsample(logits, size) for logits in side_logits)
    seeds = (
        attention(upsample(maps, size), labels),
        b2.detach().sigmoid(),
        (b1.detach().sigmoid() + b2.detach().sigmoid()) / 2,
    )
    loss = cross_entropy(maps.mean((2, 3)), labels)
    for logits, seed, (high, low) in zip((b2, b1, c), seeds, thresholds, strict=True):
        loss = loss + seed_loss(logits, seed_mask(seed, high, low))
    return loss
