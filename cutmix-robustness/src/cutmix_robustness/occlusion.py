"""Occluded images and in-between images (section 4.3 and appendix D of 1905.04899)."""

from __future__ import annotations

import torch
from torch import Tensor


def hole(height: int, width: int, size: int) -> tuple[slice, slice]:
    """Rows and columns of the centred square, starting at floor((H - size) / 2); ValueError if it does not fit."""
    if not 0 <= size <= min(height, width):
        raise ValueError(f"size must lie in 0 .. {min(height, width)}, got {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


def occlude(images: Tensor, size: int, where: str = "center", fill: float | Tensor = 0.0) -> Tensor:
    """Cover a centred square ("center") or everything else ("boundary").

    Args:
        images: (N, C, H, W).
        size: side in pixels.
        where: "center" or "boundary".
        fill: value or (C,) values; 0 after normalisation; before it, the mean colour.

    Raises:
        ValueError: images that are not 4-D, a size that does not fit, an unknown `where`.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be 4-D (N, C, H, W), got shape {tuple(images.shape)}")
    if where not in ("center", "boundary"):
        raise ValueError(f"where must be center or boundary, got {where!r}")
    height, width = images.shape[2:]
    rows, columns = hole(height, width, size)
    fill = torch.as_tensor(fill, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    if where == "center":
        covered = images.clone()
        covered[:, :, rows, columns] = fill
    else:
        covered = torch.empty_like(images).copy_(fill.expand_as(images[0]))
        covered[:, :, rows, columns] = images[:, :, rows, columns]
    return covered


def in_between(images_a: Tensor, images_b: Tensor, ratio: float, kind: str) -> Tensor:
    """Images in between two images.

    Args:
        images_a: (N, C, H, W).
        images_b: the same shape.
        ratio: "mixup": weight of B; "cutmix": side of the centred hole filled from B, as a share of the image's.
        kind: "mixup" or "cutmix".

    Raises:
        ValueError: another shape or kind, or a ratio outside [0, 1].
    """
    if images_a.shape != images_b.shape:
        raise ValueError(f"images_b must have shape {tuple(images_a.shape)}, got {tuple(images_b.shape)}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    if kind == "mixup":
        return torch.lerp(images_a, images_b, ratio)
    if kind != "cutmix":
        raise ValueError(f"kind must be mixup or cutmix, got {kind!r}")
    height, width = images_a.shape[2:]
    rows, columns = hole(height, width, round(ratio * min(height, width)))
    mixed = images_a.clone()
    mixed[:, :, rows, columns] = images_b[:, :, rows, columns]
    return mixed
