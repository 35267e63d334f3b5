"""Clipping, Gaussian mechanisms and their accountant."""

from __future__ import annotations

import math

import numpy as np

RDP_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)


def clip(delta: np.ndarray, norm: float) -> np.ndarray:
    """Scale an update (all arrays concatenated) to at most this L2 norm; never up. ValueError unless norm > 0."""
    if not norm > 0 or math.isinf(norm):
        raise ValueError(f"the clipping norm must be positive and finite, got {norm}")
    length = np.linalg.norm(delta.astype(np.float64))
    return delta if length <= norm else (delta * (norm / length)).astype(delta.dtype)


def local_dp_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """Standard deviation of the classical Gaussian mechanism, one release: sensitivity * sqrt(2 ln(1.25/d)) / eps."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def central_dp_sigma(noise_multiplier: float, clipping_norm: float, num_sampled_clients: int) -> float:
    """Standard deviation of the noise on the average of clipped updates."""
    return noise_multiplier * clipping_norm / num_sampled_clients


def rdp_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Epsilon of so many Gaussian releases together, by Renyi DP without amplification (add or remove one).

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity of one release.
        releases: how often the mechanism answers.
        delta: of the whole.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if noise_multiplier <= 0:
        return math.inf
    best = math.inf
    for order in RDP_ORDERS:
        rdp = releases * order / (2 * noise_multiplier**2)
        best = min(best, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(best, 0.0)
