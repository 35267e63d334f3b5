"""From 8-bit images to floating-point ones in [0, 1] and back."""

from __future__ import annotations

import torch
from torch import Tensor

_SLACK = 2.0**-9  # grey levels: the rounding of float32 must not turn an exact 100 into 99


def to_unit(images: Tensor) -> Tensor:
    """Values 0 .. 255 to float32 in [0, 1]."""
    return images.float().div_(255)


def runs(source: Tensor, starts: Tensor, width: int) -> Tensor:
    """Rows of `width` consecutive values of a contiguous tensor from any flat positions: (*starts.shape, width)."""
    overlapping = source.as_strided((source.numel() - width + 1, width), (1, 1))
    return overlapping.index_select(0, starts.flatten()).view(*starts.shape, width)


def truncate(x: Tensor) -> Tensor:
    """Clip to [0, 1] and round down to whole grey levels, as the benchmark does: uint8.

    The benchmark computes in float64, where the rounding of a filter can lower a flat area by one level. That is
    reproduced in float64; in float32 a value within 1/512 level of a whole level counts as that level.
    """
    levels = x.clamp(0, 1).mul_(255)
    return (levels.add_(_SLACK) if x.dtype == torch.float32 else levels).to(torch.uint8)
