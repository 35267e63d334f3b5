"""Frost: a texture of ice laid over the image.

The benchmark blends in six photographs, which may not be redistributed. `procedural_textures` draws textures
instead: branching ridges of filtered noise in the colours of ice. To compare figures with published ones, pass
the photographs themselves to `corrupt` as `frost_textures`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_robustness.corruptions.pixels import runs, to_unit
from cutmix_robustness.corruptions.streams import SampleStreams

USED_TEXTURES = 5  # the benchmark draws the index from 0 .. 4 and never shows its sixth texture
_SIDE = 512
_ICE = ((30, 40, 50), (130, 148, 162), (240, 246, 250))  # RGB of bare glass, thin ice, thick ice


def draw_frost(streams: SampleStreams, images: Tensor, severity: tuple[float, float]) -> Tensor:
    """Choice of texture, of its first row and of its first column, each in [0, 1): (N, 3)."""
    return streams.uniform(3)


def frost(images: Tensor, severity: tuple[float, float], draws: Tensor, textures: Tensor) -> Tensor:
    """Weighted sum of the image and a random crop of one of the textures (T, 3, h, w) in [0, 1], h > H, w > W."""
    keep, strength = severity
    height, width = images.shape[2:]
    count, channels, h, w = textures.shape
    choice, top, left = (draws * torch.tensor([count, h - height, w - width], device=images.device)).long().T
    rows = torch.arange(height, device=images.device)
    planes = choice[:, None] * channels + torch.arange(channels, device=images.device)  # (N, 3)
    starts = (planes[..., None] * h + top[:, None, None] + rows) * w + left[:, None, None]  # (N, 3, H)
    return keep * to_unit(images) + strength * runs(textures, starts, width)


def fit_textures(textures: Tensor, scale: str, size: tuple[int, int]) -> Tensor:
    """Resize textures (T, 3, h, w) for crops of `size` (H, W).

    CIFAR-C shrinks them to a fifth. At scale "imagenet" they are enlarged by 1.1, as in the package `imagecorruptions`
    (ImageNet-C's script crops them at their own size), or by more if that does not cover the image; the same rule is
    used for images that are too large for a fifth.
    """
    cover = max(n / m for n, m in zip(size, textures.shape[2:], strict=True))
    small = scale == "cifar" and cover < 0.2
    factor = 0.2 if small else 1.1 * max(cover, 1)
    fitted = [max(math.ceil(m * factor), n + 1) for n, m in zip(size, textures.shape[2:], strict=True)]
    mode = "bilinear" if small else "bicubic"
    return F.interpolate(textures, size=fitted, mode=mode, align_corners=False).clamp_(0, 1).contiguous()


@lru_cache(maxsize=8)
def fitted_procedural_textures(scale: str, size: tuple[int, int], device: torch.device) -> Tensor:
    """`procedural_textures` after `fit_textures`, cached for the next batch."""
    return fit_textures(procedural_textures(), scale, size).to(device)


@lru_cache(maxsize=1)
def procedural_textures() -> Tensor:
    """Five textures of ice, the same on every call: (5, 3, 512, 512) in [0, 1]."""
    streams = SampleStreams(torch.arange(1, USED_TEXTURES + 1))
    frequency = torch.fft.fftfreq(_SIDE, dtype=torch.float64)
    fy, fx = frequency[:, None], frequency[: _SIDE // 2 + 1].abs()
    radius = (fx**2 + fy**2).sqrt().clamp(min=1 / _SIDE)
    direction = torch.atan2(fy, fx)

    def field(spectrum: Tensor) -> Tensor:  # Gaussian field of unit variance with that amplitude spectrum
        noise = torch.fft.rfft2(streams.normal(_SIDE, _SIDE).double()) * spectrum
        values = torch.fft.irfft2(noise, s=(_SIDE, _SIDE))
        return values / values.std((1, 2), keepdim=True)

    needles = torch.full((USED_TEXTURES, _SIDE, _SIDE), -torch.inf, dtype=torch.float64)
    for angle in streams.uniform(5).double().T[..., None, None] * math.pi:
        spread = torch.remainder(direction - angle + math.pi / 2, math.pi) - math.pi / 2
        ridges = 1 - 2 * field(radius**-1.6 * torch.exp(-((spread / 0.2) ** 2))).abs()  # 1 on the zero lines
        needles = torch.maximum(needles, ridges)
    ice = torch.sigmoid(0.8 * field(radius**-1.5) + 1.8 * needles + 0.3 * field(radius**-0.5) - 0.9)
    ice = ice.float()[:, None]  # (5, 1, 512, 512) in 0 .. 1
    glass, thin, thick = (torch.tensor(colour)[:, None, None] / 255 for colour in _ICE)
    return torch.lerp(torch.lerp(glass, thin, (2 * ice).clamp(max=1)), thick, (2 * ice - 1).clamp(min=0))
