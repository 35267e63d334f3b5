"""Linear filters: separable ones as a matrix per axis, the others by FFT.

A border is one of "nearest" (a|abc|c), "reflect" (ba|abc|cb) and "mirror" (cb|abc|ba); images may be smaller than the
filter.
"""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len
from torch import Tensor


def _fold(index: Tensor, size: int, border: str) -> Tensor:  # any integer index -> 0 .. size - 1
    if border == "nearest" or size == 1:
        return index.clamp(0, size - 1)
    edge_once = 1 if border == "mirror" else 0
    index = index.remainder(2 * (size - edge_once))
    return torch.minimum(index, 2 * size - 1 - edge_once - index)


def gaussian_matrix(size: int, sigma: float, radius: int, border: str, device: torch.device) -> Tensor:
    """The matrix of a Gaussian filter of 2 * radius + 1 taps along an axis: (size, size) float64."""
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64, device=device)
    offsets = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    rows = torch.arange(size, device=device)[:, None].expand(-1, len(offsets))
    taps = _fold(rows + offsets, size, border)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    return matrix.index_put_((rows, taps), (weights / weights.sum()).expand_as(rows), accumulate=True)


def apply_separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix along each axis: (N, C, H, W), (H', H), (W', W) -> (N, C, H', W') float64.

    One product per channel, never one over the folded batch, so that the rounding does not depend on N.
    """
    planes = x.double().flatten(0, 1)
    rows, columns = (matrix.expand(len(planes), -1, -1) for matrix in (rows, columns.T))
    return torch.bmm(torch.bmm(rows, planes), columns).unflatten(0, x.shape[:2])


def gaussian_filter(x: Tensor, sigma: tuple[float, float], truncate: float, border: str) -> Tensor:
    """Gaussian filter of (N, C, H, W), sigma per axis, cut off at `truncate` sigma."""
    rows, columns = (
        gaussian_matrix(size, s, int(truncate * s + 0.5), border, x.device)
        for size, s in zip(x.shape[2:], sigma, strict=True)
    )
    return apply_separable(x, rows, columns)


def convolve(x: Tensor, kernels: Tensor, border: str) -> Tensor:
    """Convolve with any kernel: (N, C, H, W) with (1 or N, K, K), K odd -> (N, C, H, W).

    The kernel's middle is offset 0; weight at offset d multiplies the pixel d before the output pixel.
    """
    height, width = x.shape[2:]
    reach = kernels.shape[-1] // 2
    rows, columns = (_fold(torch.arange(-reach, n + reach, device=x.device), n, border) for n in (height, width))
    size = [next_fast_len(n + 2 * reach, real=True) for n in (height, width)]
    spectrum = torch.fft.rfft2(x[:, :, rows][..., columns], s=size)
    spectrum *= torch.fft.rfft2(kernels.to(x.dtype), s=size)[:, None]
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
