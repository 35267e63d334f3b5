"""Rotation of word images on the device, in batches: the paper's augmentation (section 4.2) and its test rotations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate_words(images: Tensor, degrees: Tensor | float, size: tuple[int, int] | None = None) -> Tensor:
    """Rotate words anticlockwise and crop the rotated box, resized to `size` without keeping the ratio.

    Outside the image its edge is repeated, as in the official code: there are no black corners, but on a picture with
    noise or texture the repeated pixels are streaks that give away the angle modulo 90 degrees. The box of an H x W
    word is H|cos| + W|sin| high and H|sin| + W|cos| wide; at 0 degrees and equal size the image comes back unchanged.

    Args:
        images: [B, C, H, W], floating point or uint8.
        degrees: one angle, or one per image [B].
        size: height and width of the result; None: that of the images.

    Returns:
        [B, C, *size] of the images' dtype (bilinear; uint8 is rounded).

    Raises:
        ValueError: another shape, or angles that are not finite.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    height, width = images.shape[2:]
    degrees = torch.as_tensor(degrees, dtype=torch.float32, device=images.device).expand(len(images))
    if not degrees.isfinite().all():
        raise ValueError("degrees must be finite")
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    box_h = height * cos.abs() + width * sin.abs()
    box_w = height * sin.abs() + width * cos.abs()
    # from the result's coordinates in -1 .. 1 to the image's: scale to the box in pixels, turn back, scale to -1 .. 1
    zero = torch.zeros_like(cos)
    theta = torch.stack(
        [
            torch.stack([cos * box_w / width, -sin * box_h / width, zero], dim=1),
            torch.stack([sin * box_w / height, cos * box_h / height, zero], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, *(size or (height, width))], align_corners=False)
    pixels = images if images.is_floating_point() else images.float()
    turned = F.grid_sample(pixels, grid.to(pixels.dtype), padding_mode="border", align_corners=False)
    return turned if images.is_floating_point() else turned.round().to(images.dtype)


def draw_angles(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Angles in degrees [count]: normal (sd 34, the paper's augmentation) or uniform (0 .. 360, its table 4)."""
    if kind == "normal":
        return 34.0 * torch.randn(count, generator=generator)
    if kind == "uniform":
        return 360.0 * torch.rand(count, generator=generator)
    raise ValueError(f"rotation must be none, normal or uniform, got {kind!r}")
