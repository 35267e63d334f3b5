"""Blur: defocus, gaussian, glass, motion, zoom. For `draw_x` and `x` see `noise`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_robustness.corruptions.linear import convolve, gaussian_filter, gaussian_matrix
from cutmix_robustness.corruptions.pixels import runs, to_unit, truncate
from cutmix_robustness.corruptions.streams import SampleStreams


def gaussian_blur(images: Tensor, sigma: float, draws: None = None) -> Tensor:
    """Gaussian filter cut off at 4 sigma, borders repeated: float64."""
    return smooth(images.double() / 255, sigma)


def smooth(x: Tensor, sigma: float) -> Tensor:
    """The filter of `gaussian_blur` on any (N, C, H, W), in float64."""
    return gaussian_filter(x, (sigma, sigma), truncate=4, border="nearest")


def defocus_blur(images: Tensor, severity: tuple[float, float], draws: None = None) -> Tensor:
    """Average over a disk whose edge is smoothed by a small Gaussian."""
    radius, sigma = severity
    reach, smoothing = (8, 1) if radius <= 8 else (int(radius), 2)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=images.device)
    disk = (offsets**2 + offsets[:, None] ** 2 <= radius**2).double()
    edge = gaussian_matrix(len(offsets), sigma, smoothing, "mirror", images.device)
    kernel = edge @ (disk / disk.sum()) @ edge.T
    empty = int((kernel.amax(0) > 0).int().argmax())  # columns and rows of zeros around the disk
    return convolve(to_unit(images), kernel[empty : len(kernel) - empty, empty : len(kernel) - empty], border="mirror")


def draw_motion_angle(streams: SampleStreams, images: Tensor, severity: tuple[int, float]) -> Tensor:
    """One angle per image in [-45, 45) degrees: (N,)."""
    return streams.uniform(low=-45, high=45)


def motion_blur(images: Tensor, severity: tuple[int, float], angles: Tensor) -> Tensor:
    """Sum of shifted images along a line."""
    return move(to_unit(images), severity, angles)


def move(x: Tensor, severity: tuple[int, float], angles: Tensor) -> Tensor:
    """The filter of `motion_blur` on any (N, C, H, W), along `angles` (N,) in degrees, borders repeated.

    Step i = 0 .. 2 * radius lies at distance i along the line, rounded to whole pixels, with the weight of a half
    Gaussian. The first step that leaves the image and all later ones are dropped, without renormalising.
    """
    (radius, sigma), (height, width) = severity, x.shape[2:]
    steps = torch.arange(2 * radius + 1, dtype=torch.float64, device=x.device)
    radians = torch.deg2rad(angles.double())[:, None]
    dy = -torch.ceil(steps * torch.sin(radians) - 0.5).long()  # (N, 2 * radius + 1)
    dx = -torch.ceil(steps * torch.cos(radians) - 0.5).long()
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum() * ((dy.abs() < height) & (dx.abs() < width)).cumprod(1)).float()
    padded = F.pad(x, [2 * radius] * 4, mode="replicate")
    rows = torch.arange(padded[..., 0].numel(), device=x.device).view(padded.shape[:3])
    starts = rows[:, :, 2 * radius : 2 * radius + height] * padded.shape[3] + 2 * radius  # (N, C, H)
    total = torch.zeros_like(x)
    for shift, weight in zip((dy * padded.shape[3] + dx).T, weights.T, strict=True):
        total.addcmul_(runs(padded, starts - shift[:, None, None], width), weight[:, None, None, None])
    return total


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of (N, C, H, W) by a factor >= 1, linearly with aligned corners, and keep the first H x W."""
    height, width = x.shape[2:]
    crop_h, crop_w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    size = (round(crop_h * factor), round(crop_w * factor))
    crop = x[:, :, top : top + crop_h, left : left + crop_w]
    return F.interpolate(crop, size=size, mode="bilinear", align_corners=True)[:, :, :height, :width]


def zoom_blur(images: Tensor, factors: tuple[float, ...], draws: None = None) -> Tensor:
    """Mean of the image and its enlargements (the list of factors starts at 1, so the image counts twice)."""
    x = to_unit(images)
    total = x.clone()
    for factor in factors:
        total += clipped_zoom(x, factor)
    return total / (len(factors) + 1)


def draw_glass_moves(streams: SampleStreams, images: Tensor, severity: tuple[float, int, int]) -> list[Tensor]:
    """Where each scanned pixel looks in each pass, as dy * W + dx, both in -delta .. delta - 1.

    One int32 tensor (N, H - 2 * delta, W - 2 * delta) per pass, in scanning order.
    """
    _, delta, passes = severity
    height, width = (max(n - 2 * delta, 0) for n in images.shape[2:])
    moves = torch.arange(-delta, delta, dtype=torch.int32, device=images.device)
    moves = (moves[:, None] * images.shape[3] + moves).flatten()
    joint = streams.integers(len(moves) ** passes, height, width)  # the moves of all passes in one number, at most 4096
    tables = torch.cartesian_prod(*[moves] * passes).view(-1, passes).T.contiguous()
    return [table.index_select(0, joint.flatten()).view_as(joint) for table in tables]


def glass_sources(moves: list[Tensor], size: tuple[int, int], delta: int) -> Tensor:
    """Which pixel of the image each pixel ends up showing: moves as drawn -> (N, H * W) int64 flat indices.

    The benchmark scans the image from pixel (H - delta, W - delta) back to (delta + 1, delta + 1) and gives each pixel
    the current value of the one it looks at. (It means to swap the two, but both sides of its assignment are views of
    one array, so the other pixel keeps its value.) A pixel that looks at one scanned before it in the same pass
    thus takes that one's new value, and so on. Instead of scanning, pointer doubling follows all these chains at once.
    """
    batch, (height, width) = len(moves[0]), size
    count = batch * height * width
    inner = (slice(None), slice(delta + 1, height - delta + 1), slice(delta + 1, width - delta + 1))
    sources = pixels = torch.arange(count, dtype=torch.int32, device=moves[0].device)
    nodes = torch.arange(2 * count, dtype=torch.int32, device=pixels.device)
    follow = nodes[:count]  # each pixel after the pass, followed by each before the pass, where chains end
    for moves_of_pass in moves:
        follow.copy_(pixels).view(batch, height, width)[inner] += moves_of_pass.flip(1, 2)
        follow += count * (follow <= pixels)  # only these looks meet a pixel that was scanned before
        while follow.amin() < count:
            follow.copy_(nodes.index_select(0, follow))
        sources = sources.index_select(0, follow - count)
    return (sources.view(batch, -1) - pixels.view(batch, -1)[:, :1]).long()


def glass_blur(images: Tensor, severity: tuple[float, int, int], moves: list[Tensor]) -> Tensor:
    """Gaussian blur, rounding down to 8 bits, pixels replaced by near ones, Gaussian blur."""
    sigma, delta, _ = severity
    blurred = truncate(gaussian_blur(images, sigma)).flatten(2)
    height, width = images.shape[2:]
    sources = glass_sources(moves, (height, width), delta)[:, None].expand(-1, images.shape[1], -1)
    return smooth(blurred.gather(2, sources).view_as(images).double() / 255, sigma)
