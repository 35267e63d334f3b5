"""Between 8-bit images and floating-point ones in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

_SLACK = 2.0**-9  # grey levels: the rounding of float32 must not turn an exact 100 into 99


def to_unit(images: Tensor) -> Tensor:
    """Values 0 .. 255 to float32 in [0, 1]."""
    return images.float().div_(255)


def to_levels(x: Tensor) -> Tensor:
    """Undo `to_unit`: whole numbers 0 .. 255, float32."""
    return (x * 255).round_()


def truncate(x: Tensor) -> Tensor:
    """Clip to [0, 1] and round down to whole grey levels, as the benchmark does; the dtype is kept.

    The benchmark computes in float64, where the rounding of a filter can lower a flat area by one level. That is
    reproduced in float64; in float32 a value within 1/512 level of a whole one counts as that.
    """
    levels = x.clamp(0, 1) * 255
    return (levels.add_(_SLACK) if x.dtype == torch.float32 else levels).floor_()
