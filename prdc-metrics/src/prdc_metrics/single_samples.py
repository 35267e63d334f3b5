"""Realism of single samples (Kynkaanniemi et al. 2019, section 5), filtered and verified as the four metrics are."""

from __future__ import annotations

import torch
from torch import Tensor

from prdc_metrics.distances import Frame, exact_squared_distances, group_minima, pairs_below
from prdc_metrics.manifold import RealManifold
from prdc_metrics.metrics import Features, as_features, exact_arithmetic
from prdc_metrics.schedule import Schedule


def realism(real: Features | RealManifold, y: Features, k: int = 5) -> Tensor:
    """Realism score of single samples, on the radii used by the paper.

    max_i radius_i / |X_i - y| over reals whose radius is at most the median, float64.

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
    squared = manifold.squared[:, 0]
    typical = (squared <= squared.quantile(0.5)) & (squared > 0)  # a ball of radius 0 holds nothing
    if not typical.any():
        return y.new_zeros(len(y), dtype=torch.float64)
    return _smallest_ratios(manifold.features[typical], squared[typical], y).rsqrt()


def _smallest_ratios(centres: Tensor, squared_radii: Tensor, y: Tensor) -> Tensor:
    """min_i |X_i - y|^2 / radius_i^2 of each y: centres (N, D), squared_radii (N,), y (M, D) -> (M,) float64."""
    schedule, found = Schedule(), []
    precision = "float32" if squared_radii.max() < 2.0**40 * squared_radii.min() else "float64"
    with exact_arithmetic(precision, y):
        frame = Frame(centres, y, precision=precision)
        real, fake = frame.points(centres), frame.points(y)
        weight = torch.ones_like(real.bias)  # of the padding, which is at infinity
        weight[: len(centres)] = 1 / (squared_radii * frame.scale**2)
        rows = schedule.blocks(len(fake.bias), y.device)
        columns = schedule.blocks(len(real.bias), y.device)
        out = real.values.new_empty(rows[0].stop * columns[0].stop)
        for block in rows:
            upper = torch.full_like(fake.bias[block], torch.finfo(out.dtype).max)
            pairs = []
            for column in columns:
                tile = frame.lower_bounds(fake, block, real, column, out)
                ends = tile + real.slack[column]
                ends = ends.add_(fake.slack[block, None]).mul_(weight[column]).amin(1)
                upper = torch.minimum(upper, ends * (1 + 2**-20))  # the roundings of these very lines
                row, place, low = pairs_below(tile.mul_(weight[column]), 0, upper, group_minima(tile, 0))
                pairs.append((row, place + column.start, low))
            row, centre, low = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            close = low <= upper[row]
            row, centre = row[close], centre[close]
            real_row = row + block.start < len(y)
            row, centre = row[real_row], centre[real_row]
            ratios = exact_squared_distances(y, centres, row + block.start, centre) / squared_radii[centre]
            size = min(block.stop, len(y)) - block.start
            best = torch.full((size,), torch.inf, dtype=torch.float64, device=y.device)
            found.append(best.scatter_reduce_(0, row, ratios, "amin"))
    return torch.cat(found)
