"""How one user's images look: shear, rotation, scale, stroke, gamma, contrast and sensor noise; tensors in and out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RANGES = {
    "shear": (-0.35, 0.35),
    "rotation": (-0.25, 0.25),  # radians
    "scale": (0.85, 1.15),
    "stroke": (-1.0, 1.0),  # blend with the 3 x 3 minimum (below 0) or maximum
    "log_gamma": (-0.6, 0.6),
    "gain": (0.6, 1.0),
    "background": (0.0, 0.25),
    "noise": (0.02, 0.12),
}
NAMES = tuple(RANGES)


def random_styles(n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform styles, float64 (n, 8), columns in the order of NAMES."""
    low, high = np.array(list(RANGES.values())).T
    return rng.uniform(low, high, (n, len(NAMES)))


def apply_styles(images: Tensor, styles: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw each image in its style.

    Args:
        images: float (n, 1, H, W) in [0, 1].
        styles: (n, 8), one row per image.
        rng: of the sensor noise.

    Returns:
        float32 (n, 1, H, W) in [0, 1].
    """
    style = {name: torch.from_numpy(styles[:, i]).float().view(-1, 1, 1, 1) for i, name in enumerate(NAMES)}
    images = _warp(images.float(), style)
    weight, sign = style["stroke"].abs(), style["stroke"].sign()
    stroked = sign * F.max_pool2d(sign * images, 3, 1, 1)  # the minimum where the sign is negative
    images = (1 - weight) * images + weight * stroked
    images = images.clamp(0, 1) ** style["log_gamma"].exp()
    images = style["background"] + (style["gain"] - style["background"]) * images
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (images + style["noise"] * noise).clamp(0, 1)


def _warp(images: Tensor, style: dict[str, Tensor]) -> Tensor:
    angle, shear, scale = (style[name].flatten() for name in ("rotation", "shear", "scale"))
    cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros_like(angle)
    theta = torch.stack(
        [torch.stack([cos, cos * shear - sin, zero], 1), torch.stack([sin, sin * shear + cos, zero], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def upsample(images: Tensor, side: int) -> Tensor:
    """Bilinear resize of (n, h, w) or (n, 1, h, w) to (n, 1, side, side), antialiased when shrinking."""
    images = images.view(-1, 1, *images.shape[-2:]).float()
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=images.shape[-1] > side)
