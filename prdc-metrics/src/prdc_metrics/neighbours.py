"""Distances to the k nearest other points of a set: NND_k of the paper (section 3).

Tile by tile, the lower bounds of `distances.Frame` give every row a falling upper bound of its k-th smallest distance
and the few pairs that may lie below it. Those pairs are then computed exactly. Each tile of the upper triangle serves
both its rows and its columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prdc_metrics.distances import GROUP, Frame, Points, exact_squared_distances
from prdc_metrics.schedule import Schedule


def nearest_squared(x: Tensor, k: int, schedule: Schedule, precision: str) -> tuple[Tensor, int]:
    """Squared distances of every row to its k nearest other rows, self excluded by index.

    Args:
        x: (n, D), floating dtype.
        k: number of neighbours, 1 <= k < n.
        schedule: tile size and ranks.
        precision: working precision of the filter.

    Returns:
        (n, k) float64, ascending, and the number of pairs computed exactly.
    """
    everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
    nearest, crowded, verified = _filtered(x, k, everything, schedule, precision)
    if precision != "float64" and crowded.any():
        again, still_crowded, more = _filtered(x, k, crowded, schedule, "float64")
        nearest[crowded] = again[crowded]
        crowded, verified = still_crowded, verified + more
    if crowded.any():
        nearest[crowded], more = _crowded_rows(x, crowded.nonzero()[:, 0], k, schedule)
        verified += more
    return nearest, verified


class _Candidates:
    """Per row the k best upper bounds seen so far, and the pairs that may be among the k nearest."""

    def __init__(self, points: Points, k: int, wanted: Tensor):
        self.points, self.k, self.wanted = points, k, wanted
        self.best = points.bias.new_full((len(points.bias), k), math.inf)
        self.found = torch.zeros_like(wanted, dtype=torch.int64)
        self.limit = 512 + 32 * k  # a row with more candidates has too many ties for this filter
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, tile: Tensor, lowest: Tensor, group_slack: Tensor, rows: slice, columns: slice) -> None:
        """Take in one tile.

        Args:
            tile: (R, L, G) lower bounds, the columns split into G groups of L.
            lowest: (R, G) smallest lower bound of each group.
            group_slack: (G,) largest column slack of each group.
            rows: where the R rows stand in the set.
            columns: where the L * G columns stand; column (l, g) is number l * G + g.
        """
        best = torch.cat([self.best[rows], lowest + group_slack], 1).topk(self.k, 1, largest=False)[0]
        self.best[rows] = best
        upper = best[:, -1] + self.points.slack[rows]
        upper.clamp_(max=torch.finfo(upper.dtype).max)  # padding stays out
        upper.masked_fill_(~self.wanted[rows], -math.inf)
        row, group = (lowest <= upper[:, None]).nonzero(as_tuple=True)
        bounds = tile[row, :, group]  # (hits, L)
        hit, place = (bounds <= upper[row, None]).nonzero(as_tuple=True)
        row, column = row[hit] + rows.start, place * tile.shape[2] + group[hit] + columns.start
        self.found += torch.bincount(row, minlength=len(self.found))
        self.wanted &= self.found <= self.limit
        self.pairs.append((row, column, bounds[hit, place]))


def _filtered(x: Tensor, k: int, wanted: Tensor, schedule: Schedule, precision: str) -> tuple[Tensor, Tensor, int]:
    """Filter and verify the wanted rows (n,).

    Returns:
        (n, k) squared distances, (n,) mask of wanted rows left out because they have too many candidates, and the
        number of verified pairs.
    """
    n = len(x)
    frame = Frame(x, precision=precision)
    points = frame.points(x)
    wanted = torch.cat([wanted, wanted.new_zeros(len(points.bias) - n)])
    found = _Candidates(points, k, wanted.clone())
    blocks = schedule.blocks(len(points.bias), x.device, at_least=2 * k)
    active = [bool(wanted[block].any()) for block in blocks]
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks)) if active[i] or active[j]]
    out = points.values.new_empty((blocks[0].stop - blocks[0].start) ** 2)
    for i, j in schedule.share(pairs):
        rows, columns = blocks[i], blocks[j]
        tile = frame.lower_bounds(points, rows, points, columns, out)
        if i == j:
            tile.fill_diagonal_(math.inf)
        if active[i]:
            split = tile.view(len(tile), *_groups(tile.shape[1], k))
            slack = points.slack[columns].view(split.shape[1:]).amax(0)
            found.update(split, split.amin(1), slack, rows, columns)
        if active[j] and i != j:
            split = tile.view(*_groups(len(tile), k), tile.shape[1])
            slack = points.slack[rows].view(split.shape[:2]).amax(0)
            found.update(split.permute(2, 0, 1), split.amin(0).t().contiguous(), slack, columns, rows)

    best = schedule.gather(found.best).topk(k, 1, largest=False)[0]
    row, column, bound = (
        (torch.cat(parts) for parts in zip(*found.pairs, strict=True))
        if found.pairs
        else (torch.empty(0, dtype=torch.int64, device=x.device),) * 3
    )
    crowded = schedule.any(wanted & ~found.wanted)
    close = (bound <= (best[:, -1] + points.slack)[row]) & ~crowded[row]
    row, column = row[close], column[close]
    squared = exact_squared_distances(x, x, row, column)
    nearest = schedule.gather(_smallest_per_row(row, squared, n, k)).topk(k, 1, largest=False)[0]
    return nearest, crowded[:n], int(schedule.sum(torch.tensor(len(row), device=x.device)))


def _groups(width: int, k: int) -> tuple[int, int]:
    """Split `width` columns (a multiple of 32) into groups: (length, number), at least k groups where possible."""
    length = GROUP
    while length > 1 and width // length < k:
        length //= 2
    return length, width // length


def _smallest_per_row(row: Tensor, squared: Tensor, n: int, k: int) -> Tensor:
    """The k smallest values of each row of a list of (row, value): (n, k), +inf where a row has fewer."""
    order = squared.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, squared = row[order], squared[order]
    count = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    first = place < k
    smallest = squared.new_full((n, k), math.inf)
    smallest[row[first], place[first]] = squared[first]
    return smallest


def _crowded_rows(x: Tensor, rows: Tensor, k: int, schedule: Schedule) -> tuple[Tensor, int]:
    """Rows whose k-th neighbour is tied with hundreds: zero where k copies exist, else by plain exact distances."""
    nearest = torch.zeros(len(rows), k, dtype=torch.float64, device=x.device)
    _, label, copies = torch.unique(x.double(), dim=0, return_inverse=True, return_counts=True)
    rest = (copies[label[rows]] <= k).nonzero()[:, 0]
    everyone = torch.arange(len(x), device=x.device)
    for some in schedule.share(rest.split(max(1, 2**20 // len(x)))):
        row = rows[some]
        squared = exact_squared_distances(x, x, row.repeat_interleave(len(x)), everyone.repeat(len(row)))
        squared = squared.view(len(row), len(x))
        squared[torch.arange(len(row), device=x.device), row] = math.inf
        nearest[some] = squared.topk(k, 1, largest=False)[0]
    return schedule.sum(nearest), len(rest) * len(x)
