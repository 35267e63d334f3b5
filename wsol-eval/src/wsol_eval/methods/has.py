"""Hide-and-Seek (Singh and Lee, ICCV 2017): random patches of a training image are hidden."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def hide_patches(images: Tensor, grid_size: int, drop_rate: float) -> Tensor:
    """Hide each square patch independently with probability `drop_rate`.

    Args:
        images: (B, C, H, W), normalised, so that 0 is the mean colour.
        grid_size: side of a patch in pixels; the last patches are cut off.
        drop_rate: in [0, 1].

    Returns:
        A new tensor of the same shape.
    """
    height, width = images.shape[-2:]
    rows, columns = -(-height // grid_size), -(-width // grid_size)
    kept = torch.rand(len(images), 1, rows, columns, device=images.device) >= drop_rate
    kept = interpolate(kept.to(images.dtype), scale_factor=grid_size, mode="nearest")
    return images * kept[..., :height, :width]
