"""Squared Euclidean distances: exact for listed pairs, bounded for whole tiles.

Every decision of the package is made on `exact_squared_distances`: differences of the inputs as given, squared and
summed in float64 in an order that depends on D alone. Computing it for all N x M pairs is what makes the metrics slow,
so `Frame` first brackets a whole tile with one matrix product,

    lower_ij <= d(a_i, b_j)^2 <= lower_ij + slack_i + slack_j,

and only pairs that the bracket leaves open are computed exactly (filter and verify).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUP = 16  # sets are padded to a multiple of this, so that any tile splits into equal groups of columns
STRIPS = 4  # in which a tile on the diagonal is computed
PRECISIONS = ("float32", "tf32", "bf16", "float64")

_MANTISSA_BITS = {"float32": 23, "tf32": 10, "bf16": 7, "float64": 52}


def exact_squared_distances(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """d(a[rows], b[columns])^2 in float64 for listed pairs, (P,) indices each -> (P,).

    The order of the sum depends on D alone (a binary tree over the coordinates), so the same two points have the same
    distance bit for bit whatever the device, the batch of pairs or the set they come from.
    """
    chunk = max(1, (2**24 if a.is_cuda else 2**17) // a.shape[1])  # a CPU's cache holds it
    squared = [
        _tree_sum(a.index_select(0, i).double().sub_(b.index_select(0, j)).square_())
        for i, j in zip(rows.split(chunk), columns.split(chunk), strict=True)
    ]
    return torch.cat(squared) if squared else a.new_empty(0, dtype=torch.float64)


def _tree_sum(terms: Tensor) -> Tensor:  # (P, D) -> (P,), destroys its input
    width = terms.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, 0]


@dataclass(frozen=True)
class Points:
    """One set as a `Frame` sees it, padded with points at infinity to a multiple of GROUP."""

    values: Tensor  # (n, D) centred, scaled, rounded to the working precision
    bias: Tensor  # (n,) |value|^2 - error
    slack: Tensor  # (n,) 2 * error


class Frame:
    """Centre and scale shared by the sets whose distances are bracketed together.

    Args:
        sets: raw inputs (n, D); the frame is centred on the mean of the first and scaled by a power of two so that no
            centred point is longer than 1.
        precision: "float32", "tf32", "bf16" (inputs rounded to that type, products accumulated in float32) or
            "float64".
    """

    def __init__(self, *sets: Tensor, precision: str = "float32"):
        self.precision = precision
        self.centre = torch.stack([c.double().sum(0) for c in _chunks(sets[0])]).sum(0) / len(sets[0])
        ends = [end.double() - self.centre for x in sets for end in (x.amin(0), x.amax(0))]
        largest = max(float(end.abs().max()) for end in ends)
        exponent = math.frexp(largest)[1] + math.ceil(math.log2(self.centre.numel()) / 2)
        self.scale = math.ldexp(1.0, -exponent)

    def points(self, x: Tensor) -> Points:
        """Round the rows of x to the working precision and bound what that costs in squared distance.

        With p = value + residual, |residual| = rho measured in float64, A = |value|, w the unit roundoff of the
        working type and u that of the accumulator, the error of |a|^2 + |b|^2 - 2ab against the float64 distance of
        the raw points is at most error(a) + error(b) with

            error = 2 (D + 12) u A^2  +  2 rho A + 2 rho^2 + rho^2 / w + w A^2  +  underflow:

        the standard bound of a dot product of length D and the final additions, and |d^2 - d'^2| <= rho (2 d' + rho)
        split by 2 rho_a A_b <= rho_a^2 / w + w A_b^2, so that it is a sum of a row's term and a column's term. One
        point of huge norm then widens the bracket of its own pairs only.
        """
        n, dim = x.shape
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        padded = -(-n // GROUP) * GROUP
        values = torch.empty(padded, dim, dtype=dtype, device=x.device)
        values[n:] = 0
        bias = torch.full((padded,), math.inf, dtype=dtype, device=x.device)
        slack = torch.zeros(padded, dtype=dtype, device=x.device)
        rounding = 2.0 ** -(_MANTISSA_BITS[self.precision] + 1)
        accumulation = 2.0**-53 if dtype == torch.float64 else 2.0**-22 if x.is_cuda else 2.0**-24
        relative = 2 * (dim + 12) * (accumulation + 2.0**-53) + rounding
        underflow = (dim + 12) * torch.finfo(dtype).tiny * 64
        start = 0
        for chunk in _chunks(x):
            rows = slice(start, start := start + len(chunk))
            centred = (chunk.double() - self.centre).mul_(self.scale)
            values[rows] = _round(centred, self.precision)
            rounded = values[rows].double()
            norm = torch.linalg.vector_norm(rounded, dim=1)
            norm2 = norm.square()
            rho = torch.linalg.vector_norm(centred.sub_(rounded), dim=1) + norm * 2.0**-52  # centring rounds once
            error = relative * norm2 + 2 * rho * norm + (2 + 1 / rounding) * rho.square() + underflow
            error *= 1.001  # for the rounding in this bound itself
            bias[rows] = norm2 - error
            slack[rows] = 2 * error
        return Points(values, bias, slack)

    def lower_bounds(self, a: Points, rows: slice, b: Points, columns: slice, out: Tensor) -> Tensor:
        """Lower bounds of the scaled squared distances of one tile, (rows, columns); +inf where padded."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        tile = out[: height * width].view(height, width)
        self._fill(tile, a, rows, b, columns)
        return tile

    def lower_bounds_within(self, a: Points, rows: slice, out: Tensor) -> Tensor:
        """Lower bounds between all pairs of some rows of one set, (rows, rows); +inf on the diagonal.

        The tile is symmetric: strip by strip, only the part from the diagonal on is computed.
        """
        side = rows.stop - rows.start
        tile = out[: side * side].view(side, side)
        height = -(-side // STRIPS)
        for top in range(0, side, height):
            end, first = min(top + height, side), rows.start + top
            self._fill(tile[top:end, top:], a, slice(first, rows.start + end), a, slice(first, rows.stop))
            tile[end:, top:end] = tile[top:end, end:].t()
        return tile.fill_diagonal_(math.inf)

    def _fill(self, tile: Tensor, a: Points, rows: slice, b: Points, columns: slice) -> None:
        left, right = a.values[rows], b.values[columns].t()
        torch.add(a.bias[rows, None], b.bias[columns], out=tile)
        if self.precision == "bf16" and left.is_cuda:
            tile.sub_(torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32), alpha=2)
        else:
            tile.addmm_(left, right, alpha=-2)

    def threshold(self, squared: Tensor, toward: float) -> Tensor:
        """Raw squared distances as scaled thresholds of the working type, rounded toward -inf or +inf."""
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        scaled = (squared * self.scale**2).to(dtype)
        return torch.nextafter(scaled, torch.full_like(scaled, toward))


def group_minima(tile: Tensor, side: int, at_least: int = 1) -> Tensor:
    """Minima over GROUP (or fewer) interleaved entries along the other side of a tile.

    Args:
        tile: (R, C), contiguous, both multiples of GROUP.
        side: 0 for minima of each row, 1 for minima of each column.
        at_least: groups are made shorter until there are this many, if possible.

    Returns:
        (R, G) or (C, G); entry l * G + g of the other side belongs to group g.
    """
    other = tile.shape[1 - side]
    length = GROUP
    while length > 1 and other // length < at_least:
        length //= 2
    if side == 0:
        return tile.view(len(tile), length, -1).amin(1)
    return tile.view(length, -1, tile.shape[1]).amin(0).t().contiguous()


def pairs_below(tile: Tensor, side: int, limit: Tensor, minima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a tile that do not exceed the limit of their row (side 0) or column (side 1).

    Args:
        tile: (R, C), contiguous.
        side: as `group_minima`.
        limit: (R,) or (C,).
        minima: the result of `group_minima` for the same tile and side.

    Returns:
        For each of P entries: its index on `side`, its index on the other side, and its value.
    """
    groups, width = minima.shape[1], tile.shape[1]
    found = true_places(minima <= limit[:, None])
    place, group = found // groups, found % groups
    length = tile.shape[1 - side] // groups
    members = torch.arange(length, device=tile.device) * groups
    first, stride = (place * width + group, 1) if side == 0 else (group * width + place, width)
    where = (first[:, None] + members * stride).view(-1)
    values = tile.view(-1).index_select(0, where)  # several times faster than tile[...]
    hit = true_places(values <= limit.index_select(0, place).repeat_interleave(length))
    origin = hit // length
    return place.index_select(0, origin), members[hit % length] + group.index_select(0, origin), values[hit]


def true_places(mask: Tensor) -> Tensor:
    """Flat indices of True in a contiguous mask: (P,). On a CPU NumPy's search is faster."""
    if mask.is_cuda:
        return mask.view(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _round(x: Tensor, precision: str) -> Tensor:
    """float64 -> the working type; tf32 values are kept in float32 with the low 13 bits of the mantissa zero."""
    if precision == "float64":
        return x
    if precision == "bf16":
        return x.bfloat16()
    x = x.float()
    if precision == "tf32":
        x = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x


def _chunks(x: Tensor) -> Iterator[Tensor]:
    return iter(x.split(max(1, (2**24 if x.is_cuda else 2**17) // x.shape[1])))
