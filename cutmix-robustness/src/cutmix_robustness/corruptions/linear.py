"""Linear filters, plane by plane: by OpenCV on a CPU; elsewhere matrix products along an axis, or the FFT.

A border is one of "nearest" (a|abc|c), "reflect" (ba|abc|cb) and "mirror" (cb|abc|ba); images may be smaller than the
filter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import cv2
import torch
from scipy.fft import next_fast_len
from torch import Tensor

_OPENCV = {"nearest": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT, "mirror": cv2.BORDER_REFLECT_101}
_BLOCK = 56  # of 224 rows: small enough to skip most zeros of the band, large enough for the product to run at speed


def _fold(index: Tensor, size: int, border: str) -> Tensor:  # any integer index -> 0 .. size - 1
    if border == "nearest" or size == 1:
        return index.clamp(0, size - 1)
    edge_once = 1 if border == "mirror" else 0
    index = index.remainder(2 * (size - edge_once))
    return torch.minimum(index, 2 * size - 1 - edge_once - index)


@lru_cache(maxsize=16)
def gaussian_matrix(size: int, sigma: float, radius: int, border: str, device: torch.device) -> Tensor:
    """A Gaussian filter of 2 * radius + 1 taps along an axis as a matrix: (size, size) float64."""
    offsets = torch.arange(-radius, radius + 1, device=device)
    rows = torch.arange(size, device=device)[:, None].expand(-1, len(offsets))
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    taps = _gaussian_taps(sigma, radius).to(device).expand_as(rows)
    return matrix.index_put_((rows, _fold(rows + offsets, size, border)), taps, accumulate=True)


def _gaussian_taps(sigma: float, radius: int) -> Tensor:  # (2 * radius + 1,) float64, of sum 1
    if radius == 0:
        return torch.ones(1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
    return weights / weights.sum()


def filter_axis(x: Tensor, axis: int, matrix: Tensor, reach: int) -> Tensor:
    """Multiply axis 2 or 3 of (N, C, H, W) by a matrix whose entries lie within `reach` of its diagonal: float64.

    The product is computed in blocks of rows, to skip the zeros, and separately for each channel of each image, so that
    the rounding does not depend on N.
    """
    size = len(matrix)
    planes = x.double().flatten(0, 1)
    blocks = []
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        first, last = max(start - reach, 0), min(stop + reach, size)
        part = planes.narrow(axis - 1, first, last - first)
        rows = matrix[start:stop, first:last].expand(len(part), -1, -1)
        blocks.append(torch.bmm(rows, part) if axis == 2 else torch.bmm(part, rows.transpose(1, 2)))
    return torch.cat(blocks, axis - 1).unflatten(0, x.shape[:2])


def gaussian_filter(x: Tensor, sigma: tuple[float, float], truncate: float, border: str) -> Tensor:
    """Gaussian filter of (N, C, H, W), sigma per axis, cut off at `truncate` sigma: float64."""
    radii = [int(truncate * s + 0.5) for s in sigma]
    if x.device.type == "cpu":
        kind = _OPENCV[border]
        down, across = (_gaussian_taps(s, radius).numpy() for s, radius in zip(sigma, radii, strict=True))
        return _by_plane(x.double(), partial(cv2.sepFilter2D, ddepth=-1, kernelX=across, kernelY=down, borderType=kind))
    for axis, s, radius in zip((2, 3), sigma, radii, strict=True):
        if radius > 0:
            x = filter_axis(x, axis, gaussian_matrix(x.shape[axis], s, radius, border, x.device), radius)
    return x.double()


def convolve(x: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Convolve (N, C, H, W) with any kernel (K, K), K odd: float32.

    By OpenCV on a CPU. The FFT runs in float64: its last bits depend on N, and those of float32 would show.
    """
    height, width = x.shape[2:]
    if x.device.type == "cpu":
        turned = kernel.flip(0, 1).float().numpy()
        return _by_plane(x, partial(cv2.filter2D, ddepth=-1, kernel=turned, borderType=_OPENCV[border]))
    reach = len(kernel) // 2
    rows, columns = (_fold(torch.arange(-reach, n + reach, device=x.device), n, border) for n in (height, width))
    size = [next_fast_len(n + 2 * reach, real=True) for n in (height, width)]
    spectrum = torch.fft.rfft2(x.index_select(2, rows).index_select(3, columns).double(), s=size)
    spectrum *= torch.fft.rfft2(kernel.double(), s=size)
    result = torch.fft.irfft2(spectrum, s=size)
    return result[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width].float()


def _by_plane(x: Tensor, work: Callable[..., object]) -> Tensor:
    """Let `work(plane, dst=)` filter each (H, W) plane of a (N, C, H, W) tensor on the CPU."""
    done = torch.empty_like(x, memory_format=torch.contiguous_format)
    for plane, filtered in zip(x.flatten(0, 1).numpy(), done.flatten(0, 1).numpy(), strict=True):
        work(plane, dst=filtered)
    return done
