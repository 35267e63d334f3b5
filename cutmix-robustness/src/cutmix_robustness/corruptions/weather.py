"""Weather: snow, frost, fog, brightness, spatter. For `draw_x` and `x` see `noise`."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from cutmix_robustness.corruptions.blur import clipped_zoom, move, smooth
from cutmix_robustness.corruptions.pixels import to_unit
from cutmix_robustness.corruptions.streams import SampleStreams

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)
_LUMA = (0.299, 0.587, 0.114)


def _colour(rgb: tuple[float, float, float], like: Tensor) -> Tensor:  # (3, 1, 1)
    return torch.tensor(rgb, device=like.device)[:, None, None]


def draw_snow(streams: SampleStreams, images: Tensor, severity: tuple) -> tuple[Tensor, Tensor]:
    """The flakes as standard normal numbers (N, H, W), and an angle in [-135, -45) degrees (N,)."""
    return streams.normal(*images.shape[2:]), streams.uniform(low=-135, high=-45)


def snow(images: Tensor, severity: tuple, draws: tuple[Tensor, Tensor]) -> Tensor:
    """Whiten the image and add a layer of motion-blurred flakes and the same layer rotated by 180 degrees.

    The motion blur is that of `motion_blur`; the generation scripts of CIFAR-C and ImageNet-C used ImageMagick's.
    """
    mean, sigma, zoom, threshold, radius, motion_sigma, keep = severity
    x, (noise, angles) = to_unit(images), draws
    layer = clipped_zoom((mean + sigma * noise)[:, None], zoom)
    layer = layer.masked_fill(layer < threshold, 0).clamp(0, 1)
    layer = (move(layer, (radius, motion_sigma), angles) * 255).round_().div_(255)
    grey = (x * _colour(_LUMA, x)).sum(1, keepdim=True)
    return keep * x + (1 - keep) * torch.maximum(x, grey * 1.5 + 0.5) + layer + layer.flip(2, 3)


def draw_fog(streams: SampleStreams, images: Tensor, severity: tuple[float, float]) -> list[Tensor]:
    """The roughness of each level of the plasma, coarse to fine: (N, 3, S, S) in [-1, 1), S = 1, 2, 4, ..."""
    levels = max((max(images.shape[2:]) - 1).bit_length(), 1)
    return [streams.uniform(3, 2**level, 2**level, low=-1, high=1) for level in range(levels)]


def plasma(roughness: list[Tensor], decay: float) -> Tensor:
    """Diamond-square clouds on a torus, scaled to [0, 1]: (N, S, S), S = 2 ** len(roughness).

    A new point is the mean of its four neighbours plus amplitude^2 * roughness; the amplitude starts at 100 and is
    divided by `decay` from level to level.
    """
    corners = roughness[0].new_zeros(len(roughness[0]), 1, 1)
    amplitude = 100.0
    for centre_noise, row_noise, column_noise in (level.unbind(1) for level in roughness):
        scale = amplitude**2
        right, below = corners.roll(-1, 2), corners.roll(-1, 1)
        centres = (corners + right + below + right.roll(-1, 1)) / 4 + scale * centre_noise
        on_rows = (centres + centres.roll(1, 1) + corners + right) / 4 + scale * row_noise
        on_columns = (centres + centres.roll(1, 2) + corners + below) / 4 + scale * column_noise
        upper = torch.stack((corners, on_rows), dim=3).flatten(2)
        lower = torch.stack((on_columns, centres), dim=3).flatten(2)
        corners = torch.stack((upper, lower), dim=2).flatten(1, 2)
        amplitude /= decay
    corners = corners - corners.amin((1, 2), keepdim=True)
    return corners / corners.amax((1, 2), keepdim=True)


def fog(images: Tensor, severity: tuple[float, float], roughness: list[Tensor]) -> Tensor:
    """Add clouds and scale back to the brightest value of the image."""
    x, (strength, decay) = to_unit(images), severity
    brightest = x.amax((1, 2, 3), keepdim=True)
    clouds = plasma(roughness, decay)[:, None, : x.shape[2], : x.shape[3]]
    return (x + strength * clouds) * brightest / (brightest + strength)


def brightness(images: Tensor, offset: float, draws: None = None) -> Tensor:
    """Raise V of HSV; hue and saturation do not change, so all three channels scale alike and black becomes grey."""
    x = to_unit(images)
    value = x.amax(1, keepdim=True)
    raised = (value + offset).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


def draw_spatter(streams: SampleStreams, images: Tensor, severity: tuple) -> Tensor:
    """Liquid as standard normal numbers: (N, H, W)."""
    return streams.normal(*images.shape[2:])


def spatter(images: Tensor, severity: tuple, noise: Tensor) -> Tensor:
    """Drops of water (severities 1 to 3) or mud (4 and 5)."""
    mean, sigma, smoothing, threshold, strength, mud = severity
    x = to_unit(images)
    liquid = smooth((mean + sigma * noise)[:, None], smoothing)
    liquid = liquid.masked_fill(liquid < threshold, 0)
    if mud:
        cover = smooth(liquid > threshold, strength)
        cover = cover.masked_fill(cover < 0.8, 0)
        return x * (1 - cover) + cover * _colour(_MUD, x)
    layers = (liquid * 255).remainder(256).byte()[:, 0]  # what exceeds 1 wraps around
    drops = [_water(layer) for layer in layers.cpu().numpy()]
    return x + strength * torch.from_numpy(np.stack(drops))[:, None].to(x.device) * _colour(_WATER, x)


def _water(layer: np.ndarray) -> np.ndarray:
    """Refraction at the edges of drops: uint8 (H, W) -> float32 (H, W), scaled to a maximum of 1."""
    distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.blur(cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss), (3, 3))
    drops = layer * relief.astype(np.float32)
    return drops / max(drops.max(), np.float32(1))
