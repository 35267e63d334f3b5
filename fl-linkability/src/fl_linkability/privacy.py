"""Clipping, the Gaussian mechanism and its exact accountant.

Gaussian releases compose into one: n answers of sensitivity s with noise of standard deviation sigma reveal as
much as a single answer with mu = sqrt(n) s / sigma. For every epsilon this answer is (epsilon, delta)-DP with exactly

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)

(Balle and Wang, ICML 2018, theorem 8). The classical sigma = s sqrt(2 ln(1.25 / delta)) / epsilon holds only for
epsilon below 1. What a release hides depends on the neighbour relation, which decides s: see `mitigations`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr


def clip(delta: np.ndarray, norm: float) -> np.ndarray:
    """Scale an update (all arrays concatenated) to at most this L2 norm; never up. ValueError unless norm > 0."""
    if not norm > 0 or math.isinf(norm):
        raise ValueError(f"the clipping norm must be positive and finite, got {norm}")
    length = np.linalg.norm(delta.astype(np.float64))
    return delta if length <= norm else (delta * (norm / length)).astype(delta.dtype)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta of Gaussian noise at an epsilon; mu is the sensitivity over the noise's standard deviation."""
    high, low = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(-np.exp(high) * np.expm1(low - high))


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least standard deviation that makes one release (epsilon, delta)-DP: the analytic Gaussian mechanism."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    _check_delta(delta)
    low = high = 1.0
    while gaussian_delta(epsilon, high) < delta:
        high *= 2
    while gaussian_delta(epsilon, low) > delta:
        low /= 2
    if low < high:
        low = brentq(lambda mu: gaussian_delta(epsilon, mu) - delta, low, high, xtol=1e-14, rtol=1e-12)
    return sensitivity / low


def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """The exact epsilon of this many Gaussian releases together, without amplification by sampling.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity of one release; 0 gives infinity.
        releases: how often the mechanism answers.
        delta: of all releases together.
    """
    _check_delta(delta)
    if noise_multiplier <= 0:
        return math.inf
    mu = math.sqrt(releases) / noise_multiplier
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    enough = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # zero-concentrated DP's bound
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, enough, xtol=1e-12, rtol=1e-12))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
