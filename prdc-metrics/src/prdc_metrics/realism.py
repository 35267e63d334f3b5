"""Realism score of single samples (Kynkaanniemi et al. 2019, section 5), on the radii used by the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from prdc_metrics.distances import exact_squared_distances
from prdc_metrics.manifold import RealManifold
from prdc_metrics.metrics import Features, as_features


def realism(real: Features | RealManifold, y: Features, k: int = 5) -> Tensor:
    """max_i radius_i / |X_i - y| over reals whose radius is at most the median, float64.

    Args:
        real: (N, D) features or a fitted `RealManifold` (its smallest k is used).
        y: (M, D) samples to judge.
        k: nearest_k when `real` is features.

    Returns:
        (M,) scores; above 1 means inside some real ball; +inf where y equals a real with positive radius.
    """
    manifold = real if isinstance(real, RealManifold) else RealManifold.fit(real, (k,))
    y = as_features(y, "y", manifold.features.device)
    if y.shape[1] != manifold.features.shape[1]:
        raise ValueError(f"real has {manifold.features.shape[1]} dimensions and y {y.shape[1]}")
    radii = manifold.radii[:, 0]
    typical = radii <= radii.quantile(0.5)
    centres, radii = manifold.features[typical], radii[typical]
    scores = []
    for rows in torch.arange(len(y), device=y.device).split(max(1, 2**20 // len(centres))):
        columns = torch.arange(len(centres), device=y.device)
        squared = exact_squared_distances(y, centres, rows.repeat_interleave(len(centres)), columns.repeat(len(rows)))
        ratio = radii / squared.view(len(rows), len(centres)).sqrt()
        scores.append(ratio.nan_to_num(nan=0.0, posinf=torch.inf).amax(1))  # 0 / 0: a ball of radius 0 holds nothing
    return torch.cat(scores)
