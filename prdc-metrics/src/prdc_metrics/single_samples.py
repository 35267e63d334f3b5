"""Single samples, filtered and verified like the four metrics: their nearest reals, authenticity, realism."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prdc_metrics.distances import Frame, exact_squared_distances, group_minima, pairs_below
from prdc_metrics.manifold import RealManifold
from prdc_metrics.metrics import Features, as_features, checked_ks, exact_arithmetic
from prdc_metrics.neighbours import Block, nearest_squared
from prdc_metrics.schedule import Schedule


class Neighbours(NamedTuple):
    """The k nearest reals of each sample, the nearest first; of equally near ones the lower row comes first."""

    indices: Tensor  # (M, k) int64, rows of the reals
    distances: Tensor  # (M, k) float64, not squared


def nearest_reals(
    real: Features, y: Features, k: int = 1, *, device: str | torch.device | None = None, tile: int | None = None
) -> Neighbours:
    """Which reals is this sample near?

    Args:
        real: (N, D) features.
        y: (M, D) samples.
        k: number of neighbours, 1 <= k <= N.
        device: where to compute; default: the features' device.
        tile: side of a distance tile; the result does not depend on it.

    Raises:
        ValueError: features as in `compute_prdc`, or k out of range.
    """
    indices, squared = _nearest(*_pair(real, y, device), k, Schedule(tile))
    return Neighbours(indices, squared.sqrt())


def authenticity(
    real: Features, y: Features, *, device: str | torch.device | None = None, tile: int | None = None
) -> Tensor:
    """Which samples are not near-copies of a real (Alaa et al., ICML 2022, section 3).

    A sample is authentic if its nearest real has another real strictly nearer than the sample. The share of authentic
    samples is the authenticity score; in percent it is dgm-eval's AuthPct.

    Args:
        real: (N, D) features of the training set, N >= 2.
        y: (M, D) samples.
        device: as `nearest_reals`.
        tile: as `nearest_reals`.

    Returns:
        (M,) bool.
    """
    real, y = _pair(real, y, device)
    checked_ks((1,), real, "real")
    schedule = Schedule(tile)
    with exact_arithmetic("float32", y):
        own, _ = nearest_squared(real, (1,), schedule, "float32")
    nearest, squared = _nearest(real, y, 1, schedule)
    return own[nearest[:, 0], 0] < squared[:, 0]


def realism(real: Features | RealManifold, y: Features, k: int = 5) -> Tensor:
    """Realism score of single samples (Kynkaanniemi et al. 2019, section 5), on the radii used by the paper.

    max_i radius_i / |X_i - y| over reals whose radius is at most the median, float64.

    Args:
        real: (N, D) features or a fitted `RealManifold` (its smallest k is used).
        y: (M, D) samples to judge.
        k: nearest_k when `real` is features.

    Returns:
        (M,) scores; above 1 means inside one of these balls; +inf where y equals one of these reals.
    """
    manifold = real if isinstance(real, RealManifold) else RealManifold.fit(real, (k,))
    features, y = _pair(manifold.features, y)
    squared = manifold.squared[:, 0]
    typical = (squared <= squared.quantile(0.5)) & (squared > 0)  # a ball of radius 0 holds nothing
    if not typical.any():
        return y.new_zeros(len(y), dtype=torch.float64)
    return _smallest_ratios(features[typical], squared[typical], y).rsqrt()


def _pair(real: Features, y: Features, device: str | torch.device | None = None) -> tuple[Tensor, Tensor]:
    real = as_features(real, "real", device)
    y = as_features(y, "y", real.device)
    if y.shape[1] != real.shape[1]:
        raise ValueError(f"real has {real.shape[1]} dimensions and y {y.shape[1]}")
    return real, y


def _nearest(real: Tensor, y: Tensor, k: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The k nearest reals of each sample, and their squared distances: (M, k) int64 and (M, k) float64."""
    if not 1 <= k <= len(real):
        raise ValueError(f"k must lie in 1..{len(real)} for {len(real)} real samples, got {k}")
    indices = torch.empty(len(y), k, dtype=torch.int64, device=y.device)
    squared = torch.empty(len(y), k, dtype=torch.float64, device=y.device)
    left = torch.arange(len(y), device=y.device)
    with exact_arithmetic("float32", y):
        for precision in ("float32", "float64"):
            left = _filtered(real, y, left, schedule, precision, indices, squared)
    everyone = torch.arange(len(real), device=y.device)
    for rows in left.split(max(1, 2**20 // len(real))) if len(left) else ():  # tied with hundreds
        distances = exact_squared_distances(y, real, rows.repeat_interleave(len(real)), everyone.repeat(len(rows)))
        distances, order = distances.view(len(rows), len(real)).sort(dim=1, stable=True)
        indices[rows], squared[rows] = order[:, :k], distances[:, :k]
    return indices, squared


def _filtered(
    real: Tensor, y: Tensor, wanted: Tensor, schedule: Schedule, precision: str, indices: Tensor, squared: Tensor
) -> Tensor:
    """Fill the wanted rows (W,) of indices and squared (M, k); returns those that have too many candidates."""
    if not len(wanted):
        return wanted
    frame, k = Frame(real, y, precision=precision), indices.shape[1]
    centres, samples = frame.points(real), frame.points(y[wanted])
    columns = schedule.blocks(len(centres.bias), y.device, at_least=2 * k)
    rows = schedule.blocks(len(samples.bias), y.device)
    out = centres.values.new_empty(rows[0].stop * columns[0].stop)
    crowded = []
    for place in rows:
        here = wanted[place]  # without the padding
        real_row = torch.arange(place.stop - place.start, device=y.device) < len(here)
        block = Block(samples.slack[place], real_row, k, centres)
        for column in columns:
            block.take(frame.lower_bounds(samples, place, centres, column, out), 0, column.start)
        block.settle()
        exact = exact_squared_distances(y, real, here[block.row], block.column)
        chosen, rank = _first_of_each_row(block.row, exact, block.column, k)
        fine = ~block.crowded[block.row[chosen]]
        chosen, rank = chosen[fine], rank[fine]
        row = here[block.row[chosen]]
        indices[row, rank], squared[row, rank] = block.column[chosen], exact[chosen]
        crowded.append(here[block.crowded[: len(here)]])
    return torch.cat(crowded)


def _first_of_each_row(row: Tensor, value: Tensor, column: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each row in a list of (row, value, column), the k entries of smallest value, then column: places, ranks."""
    order = column.argsort()
    for key in (value, row):
        order = order[key[order].argsort(stable=True)]
    count = torch.bincount(row)
    rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row[order]]
    return order[rank < k], rank[rank < k]


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
                upper = torch.minimum(upper, ends * (1 + 2**-20))  # for the rounding in these lines
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
