"""Blur: defocus, gaussian, glass, motion, zoom. For `draw_x` and `x` see `noise`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import convolve, gaussian_filter, gaussian_matrix
from .pixels import to_levels, truncate
from .streams import SampleStreams


def gaussian_blur(x: Tensor, sigma: float, draws: None = None) -> Tensor:
    """Gaussian filter cut off at 4 sigma, borders repeated: float64."""
    return smooth(to_levels(x).double() / 255, sigma)


def smooth(x: Tensor, sigma: float) -> Tensor:
    """The filter of `gaussian_blur` on any (N, C, H, W), in float64."""
    return gaussian_filter(x, (sigma, sigma), truncate=4, border="nearest")


def defocus_blur(x: Tensor, severity: tuple[float, float], draws: None = None) -> Tensor:
    """Average over a disk whose edge is smoothed by a small Gaussian."""
    radius, sigma = severity
    reach, smoothing = (8, 1) if radius <= 8 else (int(radius), 2)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=x.device)
    disk = (offsets**2 + offsets[:, None] ** 2 <= radius**2).double()
    edge = gaussian_matrix(len(offsets), sigma, smoothing, "mirror", x.device)
    return convolve(x, (edge @ (disk / disk.sum()) @ edge.T)[None], border="mirror")


def motion_kernels(radius: int, sigma: float, angles: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernels of a motion along `angles` (N,) in degrees: (N, K, K), K = 4 * radius + 1.

    A step i = 0 .. 2 * radius lies at distance i along the line, rounded to whole pixels, with the weight of a half
    Gaussian. Steps from the first one that leaves an image of `size` (H, W) on are dropped, without renormalising.
    """
    steps = torch.arange(2 * radius + 1, dtype=torch.float64, device=angles.device)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    radians = torch.deg2rad(angles.double())[:, None]
    dy = -torch.ceil(steps * torch.sin(radians) - 0.5).long()  # (N, 2 * radius + 1)
    dx = -torch.ceil(steps * torch.cos(radians) - 0.5).long()
    inside = ((dy.abs() < size[0]) & (dx.abs() < size[1])).long().cumprod(1)
    side = 4 * radius + 1
    kernels = torch.zeros(len(angles), side * side, dtype=torch.float64, device=angles.device)
    kernels.scatter_add_(1, (dy + 2 * radius) * side + dx + 2 * radius, weights / weights.sum() * inside)
    return kernels.view(-1, side, side)


def draw_motion_angle(streams: SampleStreams, x: Tensor, severity: tuple[int, float]) -> Tensor:
    """One angle per image in [-45, 45) degrees: (N,)."""
    return streams.uniform(low=-45, high=45)


def motion_blur(x: Tensor, severity: tuple[int, float], angles: Tensor) -> Tensor:
    """Sum of shifted images along a line, borders repeated."""
    radius, sigma = severity
    return convolve(x, motion_kernels(radius, sigma, angles, x.shape[2:]), border="nearest")


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of (N, C, H, W) by a factor >= 1, linearly with aligned corners, and keep the first H x W."""
    height, width = x.shape[2:]
    crop_h, crop_w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    size = (round(crop_h * factor), round(crop_w * factor))
    crop = x[:, :, top : top + crop_h, left : left + crop_w]
    return F.interpolate(crop, size=size, mode="bilinear", align_corners=True)[:, :, :height, :width]


def zoom_blur(x: Tensor, factors: tuple[float, ...], draws: None = None) -> Tensor:
    """Mean of the image and its enlargements (the list of factors starts at 1, so the image counts twice)."""
    total = x.clone()
    for factor in factors:
        total += clipped_zoom(x, factor)
    return total / (len(factors) + 1)


def draw_glass_moves(streams: SampleStreams, x: Tensor, severity: tuple[float, int, int]) -> Tensor:
    """Where each scanned pixel looks in each pass, as dy * W + dx, both in -delta .. delta - 1.

    Shape (N, passes, H - 2 * delta, W - 2 * delta), the pixel scanned first in front.
    """
    _, delta, passes = severity
    height, width = (max(n - 2 * delta, 0) for n in x.shape[2:])
    moves = torch.arange(-delta, delta, device=x.device)
    moves = (moves[:, None] * x.shape[3] + moves).flatten()
    return moves[streams.integers(len(moves), passes, height, width)]


def glass_sources(moves: Tensor, size: tuple[int, int], delta: int) -> Tensor:
    """Which pixel of the image each pixel ends up showing: moves as drawn -> (N, H * W) flat indices.

    The benchmark scans the image from pixel (H - delta, W - delta) back to (delta + 1, delta + 1) and gives each pixel
    the current value of the one it looks at. (It means to swap the two, but both sides of its assignment are views of
    one array, so the other pixel keeps its value.) A pixel that looks at one scanned before it in the same pass thus
    follows that one's look, and so on. Instead of scanning, all these chains are followed at once by pointer doubling.
    """
    batch, (height, width) = len(moves), size
    inner = (slice(None), slice(delta + 1, height - delta + 1), slice(delta + 1, width - delta + 1))
    pixels = torch.arange(batch * height * width, device=moves.device)
    scanned = torch.zeros(batch, height, width, dtype=torch.bool, device=moves.device)
    scanned[inner] = True
    sources = pixels
    for moves_of_pass in moves.flip(2, 3).unbind(1):
        look = pixels.clone()
        look.view_as(scanned)[inner] += moves_of_pass
        chained = (look > pixels) & scanned.take(look)
        follow = torch.where(chained, look, ~look)  # ~i, a negative number: pixel i before the pass, the end of a chain
        open_ = chained.nonzero().squeeze(1)
        while len(open_):
            follow[open_] = ahead = follow[follow[open_]]
            open_ = open_[ahead >= 0]
        sources = sources[~follow]
    return sources.view(batch, -1) % (height * width)


def glass_blur(x: Tensor, severity: tuple[float, int, int], moves: Tensor) -> Tensor:
    """Gaussian blur, rounding down to 8 bits, pixels replaced by near ones, Gaussian blur."""
    sigma, delta, _ = severity
    blurred = truncate(gaussian_blur(x, sigma)).flatten(2)
    sources = glass_sources(moves, x.shape[2:], delta)[:, None].expand(-1, x.shape[1], -1)
    return smooth(blurred.gather(2, sources).view_as(x) / 255, sigma)
