"""Match probabilities from the characteristic function of the squared distance: steep sigmoids in any dimension.

The squared length Q of a Gaussian vector has a characteristic function in closed form. With the sigmoid as a cosine
series in Q, sigmoid(b - sqrt(q)) = sum_k c_k cos(k pi q / S), its expectation is sum_k c_k Re E[exp(i k pi Q / S)]. The
larger b, the smoother the function at q = 0 and the faster the series converges: it covers what `expansion.py` cannot.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy.fft
import torch
from torch import Tensor

GRID = 1 << 16  # points of the cosine transform
TERMS_AT_ONCE = 32
SCALARS_AT_ONCE = 1 << 21


def series_of_sigmoid(mean: Tensor, variance: Tensor, a: float, b: float, tolerance: float) -> Tensor | None:
    """E[sigmoid(b - a ||v||)] for v ~ N(mean, diag(variance)).

    Args:
        mean: (n, D).
        variance: (n, D).
        a: positive.
        b: any value.
        tolerance: bound on the absolute error.

    Returns:
        (n,) float64, or None if the tolerance cannot be met (small b, tight tolerance).

    Raises:
        ValueError: a mean or variance that is not finite, or a negative variance.
    """
    if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
        raise ValueError("expected finite means, and finite variances of 0 or more")
    squares, variance = (a * mean.double()).square(), variance.double() * a * a
    reach = math.sqrt(-2 * math.log(tolerance / 4))  # the length is within reach sd of its median, up to the tolerance
    spread, radius = variance.amax(1).sqrt(), squares.sum(1).sqrt()
    longest, shortest = (squares + variance).sum(1).sqrt() + (reach + 1) * spread, radius - (reach + 1) * spread
    end = max(b, 0.0) - math.log(tolerance / 4)  # beyond, the sigmoid is negligible
    result = torch.zeros_like(radius)
    near = (shortest < end).nonzero()[:, 0]
    size = longest[near].clamp_min(end).log2().round()  # pairs of similar size share a period
    parts = [part for each in size.unique() for part in near[size == each].split(_rows_at_once(mean.shape[1]))]
    for part in parts:
        period = max(end**2, (float(longest[part].max()) ** 2 + end**2) / 2)
        coefficients = _cosines(b, 1.05 ** math.ceil(math.log(period, 1.05)), tolerance)
        if coefficients is None:
            return None
        result[part] = _sum(squares[part], variance[part], *coefficients, tolerance)
    return result.clamp_(0, 1)


def _rows_at_once(dim: int) -> int:
    return max(1, SCALARS_AT_ONCE // (TERMS_AT_ONCE * dim))


@lru_cache(maxsize=64)
def _cosines(b: float, period: float, tolerance: float) -> tuple[np.ndarray, float] | None:
    """C (GRID + 1,) of sigmoid(b - sqrt(q)) on [0, period]; None if the grid is too coarse for the tolerance."""
    x = np.sqrt(np.linspace(0, period, GRID + 1))
    c = scipy.fft.dct(1 / (1 + np.exp(np.clip(x - b, -700, 700))), type=1) / GRID
    c[[0, -1]] /= 2
    aliased = np.abs(c[-GRID // 4 :]).max() * 64
    return None if aliased > tolerance / 4 else (c, period)


def _sum(squares: Tensor, variance: Tensor, c: np.ndarray, period: float, tolerance: float) -> Tensor:
    rest = np.abs(c)[::-1].cumsum()[::-1]  # sum of |c| from k on
    result = torch.full_like(squares[:, 0], c[0])
    for k in range(1, len(c), TERMS_AT_ONCE):
        order = torch.arange(k, min(k + TERMS_AT_ONCE, len(c)), dtype=torch.float64, device=squares.device)
        omega = (order * (math.pi / period))[:, None]  # (T, 1)
        u = 2 * omega * variance[:, None]  # (n, T, D)
        damping = u.square() + 1
        along = omega * squares[:, None] / damping
        log_size = -(damping.log() / 4 + along * u).sum(2)
        angle = (u.atan() / 2 + along).sum(2)
        weights = torch.from_numpy(c[k : k + len(order)]).to(squares.device)
        result += (log_size.exp() * angle.cos()) @ weights
        if rest[min(k + len(order), len(c) - 1)] * float(log_size[:, -1].max().exp()) < tolerance / 4:
            break
    return result
