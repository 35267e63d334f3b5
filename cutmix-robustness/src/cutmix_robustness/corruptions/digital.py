"""Digital: contrast, saturate, elastic transform, pixelate, JPEG. For `draw_x` and `x` see `noise`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from .linear import gaussian_filter
from .pixels import to_levels, to_unit
from .streams import SampleStreams


def contrast(x: Tensor, factor: float, draws: None = None) -> Tensor:
    """Move towards the mean of each channel of each image."""
    mean = x.mean((2, 3), keepdim=True, dtype=torch.float64).float()
    return (x - mean) * factor + mean


def saturate(x: Tensor, severity: tuple[float, float], draws: None = None) -> Tensor:
    """Change S of HSV to S * factor + offset, hue and value kept; the hue of grey counts as red."""
    factor, offset = severity
    value = x.amax(1, keepdim=True)
    below = value - x  # a channel is value * (1 - saturation * share), share = below / max(below)
    depth = below.amax(1, keepdim=True)
    saturation = depth / value.clamp(min=1e-12)
    share = torch.where(depth > 0, below / depth, torch.tensor([0.0, 1.0, 1.0], device=x.device)[:, None, None])
    return value * (1 - (saturation * factor + offset).clamp(0, 1) * share)


def draw_elastic(streams: SampleStreams, x: Tensor, severity: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """All in [-1, 1): jitter of three points (N, 3, 2), displacements along x and along y (N, H, W) each."""
    height, width = x.shape[2:]
    return tuple(streams.uniform(*shape, low=-1, high=1) for shape in ((3, 2), (height, width), (height, width)))


def elastic_transform(x: Tensor, severity: tuple, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A random affine map (CIFAR-C only), then a smooth random displacement, both linearly interpolated."""
    displacement, sigma, jitter, relative = severity
    points, along_x, along_y = draws
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


def pixelate(x: Tensor, share: float, draws: None = None) -> Tensor:
    """Box-average to int(share * size) pixels per axis and repeat back; each axis rounds to 8 bits."""
    height, width = x.shape[2:]
    small_h, small_w = max(int(height * share), 1), max(int(width * share), 1)
    small = _box_means(to_levels(x), small_w)
    small = _box_means(small.transpose(2, 3), small_h).transpose(2, 3)
    rows, columns = (
        ((torch.arange(n, device=x.device, dtype=torch.float64) + 0.5) * m / n).long()
        for n, m in ((height, small_h), (width, small_w))
    )
    return small.div_(255)[:, :, rows][..., columns]


def _box_means(x: Tensor, count: int) -> Tensor:
    """Rounded means over `count` equal windows of the last axis; a pixel belongs to a window that holds its centre."""
    size = x.shape[-1]
    edges = (torch.arange(count + 1, dtype=torch.float64, device=x.device) * (size / count) + 0.5).long()
    starts, lengths = edges[:-1], edges.diff()
    total = x[..., starts]
    for step in range(1, int(lengths.max())):
        inside = lengths > step
        total += x[..., (starts + step).clamp(max=size - 1)] * inside
    return (total / lengths + 0.5).floor_()


def jpeg_compression(x: Tensor, quality: int, draws: None = None) -> Tensor:
    """Encode and decode on the CPU, image by image."""
    images = to_levels(x).byte().cpu()
    decoded = decode_jpeg(encode_jpeg(list(images), quality=quality))
    return to_unit(torch.stack(decoded)).to(x.device)
