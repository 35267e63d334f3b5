"""Digital: contrast, saturate, elastic transform, pixelate, JPEG. For `draw_x` and `x` see `noise`."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cutmix_robustness.corruptions.linear import gaussian_filter
from cutmix_robustness.corruptions.pixels import to_unit
from cutmix_robustness.corruptions.streams import SampleStreams


def contrast(images: Tensor, factor: float, draws: None = None) -> Tensor:
    """Move towards the mean of each channel of each image."""
    x = to_unit(images)
    mean = x.mean((2, 3), keepdim=True, dtype=torch.float64).float()
    return (x - mean) * factor + mean


def saturate(images: Tensor, severity: tuple[float, float], draws: None = None) -> Tensor:
    """Change S of HSV to S * factor + offset, hue and value kept; the hue of grey counts as red."""
    factor, offset = severity
    x = to_unit(images)
    value = x.amax(1, keepdim=True)
    below = value - x  # a channel is value * (1 - saturation * share), share = below / max(below)
    depth = below.amax(1, keepdim=True)
    saturation = depth / value.clamp(min=1e-12)
    share = torch.where(depth > 0, below / depth, torch.tensor([0.0, 1.0, 1.0], device=x.device)[:, None, None])
    return value * (1 - (saturation * factor + offset).clamp(0, 1) * share)


def draw_elastic(streams: SampleStreams, images: Tensor, severity: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """All in [-1, 1): jitter of three points (N, 3, 2), displacements along x and along y (N, H, W) each."""
    height, width = images.shape[2:]
    jitter = streams.uniform(3, 2, low=-1, high=1)
    along_x = streams.uniform(height, width, low=-1, high=1)
    return jitter, along_x, streams.uniform(height, width, low=-1, high=1)


def elastic_transform(images: Tensor, severity: tuple, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A random affine map (CIFAR-C only), then a smooth random displacement, both linearly interpolated."""
    displacement, sigma, jitter, relative = severity
    points, along_x, along_y = draws
    x = to_unit(images)
    height, width = x.shape[2:]
    if jitter:
        x = _sample(x, *_affine_positions(jitter * points, (height, width)), border="mirror")
    sigmas = (sigma * height, sigma * width) if relative else (sigma, sigma)
    field = torch.stack((along_x, along_y), dim=1)
    field = gaussian_filter(field, sigmas, truncate=3, border="reflect").float()
    field *= displacement * (height if relative else 1)
    columns = torch.arange(width, device=x.device) + field[:, 0]
    rows = torch.arange(height, device=x.device)[:, None] + field[:, 1]
    return _sample(x, columns, rows, border="reflect")


def _affine_positions(moves: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each pixel of the mapped image lies in the original: x and y, (N, H, W) each.

    The map takes three corners of a square of two thirds of the image to the corners plus `moves` (N, 3, 2).
    """
    height, width = size
    side = min(size) // 3
    corners = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64, device=moves.device) * side
    corners += torch.tensor([width // 2, height // 2], device=moves.device)
    ones = corners.new_ones(len(moves), 3, 1)
    inverse = torch.linalg.solve(torch.cat((corners + moves, ones), dim=2), corners.expand(len(moves), -1, -1))
    columns = torch.arange(width, device=moves.device)
    rows = torch.arange(height, device=moves.device)[:, None]
    x, y = (
        (a[:, None, None] * columns + b[:, None, None] * rows + c[:, None, None]).float()
        for a, b, c in (inverse[..., 0].unbind(1), inverse[..., 1].unbind(1))
    )
    return x, y


def _sample(x: Tensor, columns: Tensor, rows: Tensor, border: str) -> Tensor:
    """Linear interpolation of (N, C, H, W) at pixel positions (N, H, W) each; border as in `linear`."""
    height, width = x.shape[2:]
    if border == "mirror":
        grid = torch.stack((columns * 2 / max(width - 1, 1) - 1, rows * 2 / max(height - 1, 1) - 1), dim=-1)
    else:
        grid = torch.stack(((columns * 2 + 1) / width - 1, (rows * 2 + 1) / height - 1), dim=-1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=border == "mirror")


def pixelate(images: Tensor, share: float, draws: None = None) -> Tensor:
    """Box-average to int(share * size) pixels per axis, each axis rounded to 8 bits, and repeat back: uint8."""
    height, width = images.shape[2:]
    small_h, small_w = max(int(height * share), 1), max(int(width * share), 1)
    planes = images.flatten(0, 1).float()
    columns, rows = (_windows(*counts, images.device) for counts in ((width, small_w), (height, small_h)))
    small = (torch.bmm(planes, columns.T.expand(len(planes), -1, -1)) / columns.sum(1) + 0.5).floor_()
    small = (torch.bmm(rows.expand(len(planes), -1, -1), small) / rows.sum(1, keepdim=True) + 0.5).byte()
    for axis, size, count in ((2, width, small_w), (1, height, small_h)):
        nearest = ((torch.arange(size, dtype=torch.float64, device=images.device) + 0.5) * count / size).long()
        small = small.index_select(axis, nearest)
    return small.view_as(images)


def _windows(size: int, count: int, device: torch.device) -> Tensor:
    """Which pixels of an axis make up which of `count` equal windows, by their centres: (count, size) of 0 and 1."""
    edges = (torch.arange(count + 1, dtype=torch.float64, device=device) * (size / count) + 0.5).long()[:, None]
    pixels = torch.arange(size, device=device)
    return ((pixels >= edges[:-1]) & (pixels < edges[1:])).float()


def jpeg_compression(images: Tensor, quality: int, draws: None = None) -> Tensor:
    """Encode and decode on the CPU, image by image: uint8."""
    decoded = np.stack([_jpeg(image, quality) for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images.device)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:  # (H, W, 3) uint8
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file, formats=("JPEG",)))
