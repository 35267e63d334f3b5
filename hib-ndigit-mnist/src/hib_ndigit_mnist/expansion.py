"""Match probabilities in closed form: the sigmoid of a distance as a sum of Gaussians of that distance.

With sigmoid(b - x) ~ sum_j w_j exp(-x^2 / 2 t_j^2) for every x >= 0, the expectation over a Gaussian difference vector
is a sum of Gaussian integrals, in any dimension and with any diagonal covariance. The largest deviation of the fit
bounds the error of every probability. It costs about as much as 8 x 8 samples. The steeper the sigmoid (large b), the
larger the error: 1e-6 is reached up to about b = 7, 1e-3 up to b = 15; `series.py` takes over from there.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TERMS = (16, 24, 32, 48, 64, 96)
NARROWEST = (3e-2, 1e-2, 1e-3, 1e-4, 1e-5)


@lru_cache(maxsize=256)
def sigmoid_as_gaussians(b: float, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Widths t (J,) and weights w (J,) with |sigmoid(b - x) - sum_j w_j exp(-x^2 / 2 t_j^2)| <= tolerance, or None.

    Uses the shortest entry of a fixed list that reaches the tolerance; float64.
    """
    widest = 15 + 2 * max(b, 0.0)
    x = np.concatenate(
        [[0.0], np.geomspace(1e-6, 1, 400), np.linspace(1, 30 + b, 400), np.geomspace(30 + b, 8 * widest)]
    )
    check = np.concatenate([x, (x[1:] + x[:-1]) / 2])
    for terms in TERMS:
        for narrowest in NARROWEST:
            t = np.geomspace(narrowest, widest, terms)
            weights = np.linalg.lstsq(_gaussians(x, t), _sigmoid(b - x), rcond=1e-13)[0]
            if np.abs(_gaussians(check, t) @ weights - _sigmoid(b - check)).max() <= tolerance:
                return t, weights
    return None


def expansion_of_sigmoid(mean: Tensor, variance: Tensor, a: float, b: float, tolerance: float) -> Tensor | None:
    """E[sigmoid(b - a ||v||)] for v ~ N(mean, diag(variance)).

    Args:
        mean: (D, ...), dimensions first.
        variance: (D, ...).
        a: positive.
        b: any value.
        tolerance: bound on the absolute error.

    Returns:
        (...), or None if the tolerance cannot be met; float32 if that is exact enough, else float64.
    """
    fit = sigmoid_as_gaussians(b, tolerance)
    if fit is None:
        return None
    widths, weights = fit
    cancels = np.abs(weights).max() * 1e-6 * max(1, len(mean) / 8) > tolerance
    dtype = torch.float64 if cancels or tolerance < 1e-4 else torch.float32
    squares, variance = mean.to(dtype).square(), variance.to(dtype)
    result = torch.zeros_like(squares[0])
    for width, weight in zip((widths / a) ** 2, weights, strict=True):
        share = width / (variance[0] + width)  # in (0, 1]: a product over many dimensions may vanish, not overflow
        exponent, volume = squares[0] * share, share
        for d in range(1, len(squares)):
            share = width / (variance[d] + width)
            exponent.addcmul_(squares[d], share)
            volume = volume * share
        result.addcmul_(exponent.mul_(-0.5 / width).exp_(), volume.sqrt(), value=weight)
    return result.clamp_(0, 1)


def _gaussians(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * (x[:, None] / t) ** 2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))
