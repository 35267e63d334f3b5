"""CutMix (Yun et al., ICCV 2019): a box of another training image is pasted in, and the labels are mixed by area."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def cut_box(size: tuple[int, int], lam: float, centre: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box that leaves a share `lam`: top, left, bottom, right of an image of `size`, clipped into it."""
    ratio = np.sqrt(1 - lam)
    half = [int(side * ratio) // 2 for side in size]
    low = [int(np.clip(c - h, 0, side)) for c, h, side in zip(centre, half, size, strict=True)]
    high = [int(np.clip(c + h, 0, side)) for c, h, side in zip(centre, half, size, strict=True)]
    return low[0], low[1], high[0], high[1]


def mix(images: Tensor, labels: Tensor, beta: float, probability: float, rng: np.random.RandomState) -> tuple:
    """One box for the whole batch, from a random permutation of it; with 1 - `probability` nothing.

    Args:
        images: (B, C, H, W).
        labels: (B,).
        beta: both parameters of the Beta distribution of the share that stays.
        probability: of mixing at all.
        rng: draws everything but the permutation.

    Returns:
        Mixed images, the labels of the paste (B,), and the share of the original ones from the real area of the box.
    """
    if beta <= 0 or rng.rand() >= probability:
        return images, labels, 1.0
    height, width = images.shape[-2:]
    lam = rng.beta(beta, beta)
    top, left, bottom, right = cut_box((height, width), lam, (rng.randint(height), rng.randint(width)))
    order = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, labels[order], 1 - (bottom - top) * (right - left) / (height * width)
