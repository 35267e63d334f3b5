"""Distances to the k nearest other points of a set: NND_k of the paper (section 3).

Tile by tile, the lower bounds of `distances.Frame` give every row a falling upper bound of its k-th smallest distance
and the few pairs that may lie below it. Each tile of the upper triangle serves both its rows and its columns. In the
end the k-th smallest is known up to a bracket, and only the pairs within that bracket are computed exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prdc_metrics.distances import Frame, Points, exact_squared_distances, group_minima, pairs_below
from prdc_metrics.schedule import Schedule


def nearest_squared(x: Tensor, ks: tuple[int, ...], schedule: Schedule, precision: str) -> tuple[Tensor, int]:
    """Squared distance of every row to its k-th nearest other row, for each k; self excluded by index.

    Args:
        x: (n, D), floating dtype.
        ks: ascending, 1 <= k < n.
        schedule: tile size and ranks.
        precision: working precision of the filter.

    Returns:
        (n, K) float64, and the number of pairs computed exactly.
    """
    everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
    nearest, crowded, verified = _filtered(x, ks, everything, schedule, precision)
    if precision != "float64" and crowded.any():
        again, still_crowded, more = _filtered(x, ks, crowded, schedule, "float64")
        nearest[crowded] = again[crowded]
        crowded, verified = still_crowded, verified + more
    if crowded.any():
        nearest[crowded], more = _crowded_rows(x, crowded.nonzero()[:, 0], ks, schedule)
        verified += more
    return nearest, verified


class Block:
    """Consecutive rows, and the pairs that may be among their k nearest.

    Args:
        slack: (R,) of these rows.
        wanted: (R,) bool; other rows are skipped.
        k: the largest k asked for.
        others: all points on the other side.
    """

    SAVED = ("upper", "crowded", "found", "row", "column", "bound", "seen", "settled")

    def __init__(self, slack: Tensor, wanted: Tensor, k: int, others: Points):
        self.slack, self.k, self.others = slack, k, others
        self.upper = torch.full_like(slack, torch.finfo(slack.dtype).max)  # padding is at infinity and stays out
        self.upper.masked_fill_(~wanted, -math.inf)
        self.crowded = torch.zeros_like(wanted)
        self.found = torch.zeros(len(slack), dtype=torch.int64, device=slack.device)
        self.limit = 512 + 32 * k  # a row with more candidates has too many ties for this filter
        self.row, self.column = self.found[:0], self.found[:0]
        self.bound = slack[:0]
        self.seen = self.settled = 0

    def take(self, tile: Tensor, side: int, start: int) -> None:
        """Take in a tile of lower bounds whose rows (side 0) or columns (side 1) are this block's.

        The other side begins at point `start`.
        """
        width = tile.shape[1 - side]
        minima = group_minima(tile, side, self.k)  # (R, G)
        if not self.seen and minima.shape[1] >= self.k:
            slack = self.others.slack[start : start + width].view(-1, minima.shape[1]).amax(0)
            self._lower((minima + slack).topk(self.k, 1, largest=False)[0][:, -1])
        row, column, bound = pairs_below(tile, side, self.upper, minima)
        self.found += torch.bincount(row, minlength=len(self.found))
        self.row, self.column = torch.cat([self.row, row]), torch.cat([self.column, column + start])
        self.bound = torch.cat([self.bound, bound])
        self.crowded |= self.found > self.limit
        self.upper.masked_fill_(self.crowded, -math.inf)
        self.seen += width
        if not self.settled:
            self.settled = width
        elif self.seen >= 2 * self.settled:  # a better bound from twice as many columns is worth a sort
            self.settle()

    def settle(self) -> None:
        """Lower the bounds to what the pairs allow, and drop the pairs above them."""
        self._lower(self.smallest(self.bound + self.others.slack.index_select(0, self.column))[:, -1])
        keep = self.bound <= self.upper.index_select(0, self.row)
        self.row, self.column, self.bound = self.row[keep], self.column[keep], self.bound[keep]
        self.found = torch.bincount(self.row, minlength=len(self.found))
        self.settled = self.seen

    def smallest(self, values: Tensor) -> Tensor:
        """The k smallest values of each row, from one value per pair, ascending: (R, k), +inf where a row has fewer."""
        return smallest_per_row(self.row, values, len(self.upper), self.k)

    def pair_upper(self) -> Tensor:
        """Upper bound of each pair's scaled squared distance: (P,)."""
        return self.bound + self.others.slack.index_select(0, self.column) + self.slack.index_select(0, self.row)

    def _lower(self, kth: Tensor) -> None:
        self.upper = torch.minimum(self.upper, kth + self.slack)


def _filtered(
    x: Tensor, ks: tuple[int, ...], wanted: Tensor, schedule: Schedule, precision: str
) -> tuple[Tensor, Tensor, int]:
    """Filter and verify the wanted rows (n,).

    Returns:
        (n, K) squared distances, (n,) mask of wanted rows left out because they have too many candidates, and the
        number of verified pairs.
    """
    n, k = len(x), ks[-1]
    frame = Frame(x, precision=precision)
    points = frame.points(x)
    wanted = torch.cat([wanted, wanted.new_zeros(len(points.bias) - n)])
    places = schedule.blocks(len(points.bias), x.device, at_least=2 * k)
    blocks = [Block(points.slack[place], wanted[place], k, points) for place in places]
    active = [bool(wanted[place].any()) for place in places]
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks)) if active[i] or active[j]]
    out = points.values.new_empty((places[0].stop - places[0].start) ** 2)
    for i, j in schedule.share(pairs, blocks, ("nearest", x, ks, wanted, precision)):
        if i == j:
            tile = frame.lower_bounds_within(points, places[i], out)
        else:
            tile = frame.lower_bounds(points, places[i], points, places[j], out)
        if active[i]:
            blocks[i].take(tile, 0, places[j].start)
        if active[j] and i != j:
            blocks[j].take(tile, 1, places[i].start)

    crowded = schedule.any(torch.cat([block.crowded for block in blocks]))
    lowest = schedule.smallest(torch.cat([block.smallest(block.bound) for block in blocks]))
    highest = schedule.smallest(torch.cat([block.smallest(block.pair_upper()) for block in blocks]))
    at = [k - 1 for k in ks]
    nearest, verified = [], 0
    for block, place in zip(blocks, places, strict=True):
        squared, more = _kth(x, block, place.start, lowest[place][:, at], highest[place][:, at], ks, schedule)
        nearest.append(squared)
        verified += more
    return torch.cat(nearest)[:n], crowded[:n], schedule.total(verified, x.device)


def _kth(
    x: Tensor, block: Block, start: int, low: Tensor, high: Tensor, ks: tuple[int, ...], schedule: Schedule
) -> tuple[Tensor, int]:
    """The k-th smallest exact squared distance of each row, known to lie in low..high (R, K): (R, K), pairs computed.

    Pairs that end below `low` count as smaller without being computed.
    """
    ends = block.pair_upper()[:, None]
    smaller = ends < low[block.row]  # (P, K)
    close = (block.bound[:, None] <= high[block.row]) & ~smaller
    some = close.any(1)
    row, close = block.row[some], close[some]
    squared = exact_squared_distances(x, x, row + start, block.column[some])
    found = []
    for column, k in enumerate(ks):
        before = schedule.sum(torch.bincount(block.row[smaller[:, column]], minlength=len(low)))
        here = close[:, column]
        nearest = schedule.smallest(smallest_per_row(row[here], squared[here], len(low), k))
        found.append(nearest.gather(1, (k - 1 - before).clamp(min=0)[:, None])[:, 0])
    return torch.stack(found, 1), len(row)


def smallest_per_row(row: Tensor, values: Tensor, rows: int, k: int) -> Tensor:
    """The k smallest values of each row in a list of (row, value), ascending: (rows, k), +inf where a row has fewer."""
    order = row.argsort()
    row, count = row[order], torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    table = values.new_full((rows, max(k, int(count.max()))), math.inf)
    table[row, place] = values[order]
    return table.topk(k, 1, largest=False)[0]


def _crowded_rows(x: Tensor, rows: Tensor, ks: tuple[int, ...], schedule: Schedule) -> tuple[Tensor, int]:
    """Rows whose k-th neighbour is tied with hundreds: zero if k copies exist, else by plain exact distances."""
    nearest = torch.zeros(len(rows), len(ks), dtype=torch.float64, device=x.device)
    _, label, copies = torch.unique(x.double(), dim=0, return_inverse=True, return_counts=True)
    rest = (copies[label[rows]] <= ks[-1]).nonzero()[:, 0]
    everyone = torch.arange(len(x), device=x.device)
    for some in schedule.share(rest.split(max(1, 2**20 // len(x)))):
        row = rows[some]
        squared = exact_squared_distances(x, x, row.repeat_interleave(len(x)), everyone.repeat(len(row)))
        squared = squared.view(len(row), len(x))
        squared[torch.arange(len(row), device=x.device), row] = math.inf
        nearest[some] = squared.topk(ks[-1], 1, largest=False)[0][:, [k - 1 for k in ks]]
    return schedule.sum(nearest), len(rest) * len(x)
