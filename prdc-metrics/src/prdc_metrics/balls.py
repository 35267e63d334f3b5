"""Which points of one set lie in the balls of another: the counts behind all four metrics (paper, section 3).

One pass over the N x M pairs answers both questions: which fakes lie in which real balls (precision, density, coverage)
and which reals lie in any fake ball (recall). The lower bounds of `distances.Frame` settle nearly every pair; those
whose bracket contains the squared radius are computed exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prdc_metrics.distances import Frame, Points, exact_squared_distances, group_minima, pairs_below
from prdc_metrics.schedule import Schedule

FLUSH = 2**20  # open pairs are verified once there are this many


@dataclass(frozen=True)
class Membership:
    """For K radii per ball: how many balls hold each member, and how many members each ball holds."""

    counts: Tensor  # (members, K) int64
    held: Tensor  # (centres, K) int64
    on_sphere: int = 0  # pairs at exactly the radius, for any of the K


def ball_membership(
    real: Tensor,
    fake: Tensor,
    real_squared: Tensor,
    fake_squared: Tensor | None,
    schedule: Schedule,
    precision: str,
    closed: bool,
) -> tuple[Membership, Membership | None, int]:
    """Members of the real balls among the fakes and of the fake balls among the reals.

    Args:
        real: (N, D).
        fake: (M, D).
        real_squared: (N, K) float64 squared radii.
        fake_squared: (M, K) squared radii, or None to leave the fake balls out.
        schedule: tile size and ranks.
        precision: working precision of the filter.
        closed: points on the sphere count as inside.

    Returns:
        Membership of fakes in real balls, of reals in fake balls (None if left out), number of verified pairs.
    """
    brackets = [_Bracket(real, fake, real_squared, fake_squared, precision)]
    balls = [_Balls(real, fake, real_squared, closed)]
    if fake_squared is not None:
        balls.append(_Balls(fake, real, fake_squared, closed))
    rows = schedule.blocks(len(brackets[0].real.bias), real.device)
    columns = schedule.blocks(len(brackets[0].fake.bias), real.device)
    out = {}
    identity = ("balls", real, fake, real_squared, fake_squared, precision, closed)
    for i, j in schedule.share([(i, j) for i in rows for j in columns], balls, identity):
        for attempt in range(2):
            if attempt == len(brackets):
                brackets.append(_Bracket(real, fake, real_squared, fake_squared, "float64"))
            bracket = brackets[attempt]
            dtype = bracket.real.bias.dtype
            if dtype not in out:
                out[dtype] = torch.empty(rows[0].stop * columns[0].stop, dtype=dtype, device=real.device)
            findings = bracket.findings(i, j, out[dtype])
            if bracket.final or max(len(f.open_centre) for f in findings) <= max(4096, out[dtype].numel() // 64):
                break
        for ball, finding in zip(balls, findings, strict=True):
            ball.take(finding)
    for ball in balls:
        ball.verify()
    verified = schedule.total(sum(ball.verified for ball in balls), real.device)
    inside = [
        Membership(schedule.sum(b.counts), schedule.sum(b.held), schedule.total(b.on_sphere, real.device))
        for b in balls
    ]
    return inside[0], inside[1] if len(inside) > 1 else None, verified


@dataclass(frozen=True)
class _Finding:
    """What the bracket decides in one tile: sure memberships, and the pairs left open."""

    centres: slice
    members: slice
    counts: Tensor  # (members of the tile, K)
    held: Tensor  # (centres of the tile, K)
    open_centre: Tensor  # (P,)
    open_member: Tensor  # (P,)


class _Balls:
    """Running membership of one set of balls."""

    SAVED = ("counts", "held", "open", "waiting", "verified", "on_sphere")

    def __init__(self, centres: Tensor, members: Tensor, squared_radii: Tensor, closed: bool):
        self.centres, self.members, self.squared, self.closed = centres, members, squared_radii, closed
        ks = squared_radii.shape[1]
        self.counts = torch.zeros(len(members), ks, dtype=torch.int64, device=members.device)
        self.held = torch.zeros(len(centres), ks, dtype=torch.int64, device=members.device)
        self.open: list[tuple[Tensor, Tensor]] = []
        self.waiting = self.verified = self.on_sphere = 0

    def take(self, finding: _Finding) -> None:
        members, centres = self.counts[finding.members], self.held[finding.centres]
        members += finding.counts[: len(members)]  # the rest is padding
        centres += finding.held[: len(centres)]
        self.open.append((finding.open_centre, finding.open_member))
        self.waiting += len(finding.open_centre)
        if self.waiting > FLUSH:
            self.verify()

    def verify(self) -> None:
        if self.open:
            centre, member = (torch.cat(parts) for parts in zip(*self.open, strict=True))
            squared = exact_squared_distances(self.centres, self.members, centre, member)[:, None]
            radii = self.squared[centre]
            inside = (squared <= radii if self.closed else squared < radii).long()
            self.counts.index_add_(0, member, inside)
            self.held.index_add_(0, centre, inside)
            self.on_sphere += int((squared == radii).any(1).sum())
            self.verified += len(centre)
        self.open, self.waiting = [], 0


class _Bracket:
    """Both sets in one frame, with the radii as thresholds."""

    def __init__(self, real: Tensor, fake: Tensor, real_squared: Tensor, fake_squared: Tensor | None, precision: str):
        self.final = precision == "float64"
        self.frame = Frame(real, fake, precision=precision)
        self.real, self.fake = self.frame.points(real), self.frame.points(fake)
        self.real_radii = self._thresholds(real_squared, self.real)
        self.fake_radii = None if fake_squared is None else self._thresholds(fake_squared, self.fake)

    def _thresholds(self, squared: Tensor, points: Points) -> tuple[Tensor, Tensor]:
        """Squared radii (n, K) rounded down and up; padding has no ball."""
        padding = (0, 0, 0, len(points.bias) - len(squared))
        down, up = (self.frame.threshold(squared, toward) for toward in (-math.inf, math.inf))
        pad = torch.nn.functional.pad
        return pad(down, padding, value=-math.inf), pad(up, padding, value=-math.inf)

    def findings(self, rows: slice, columns: slice, out: Tensor) -> list[_Finding]:
        tile = self.frame.lower_bounds(self.real, rows, self.fake, columns, out)
        found = [_look(tile, 0, self.real, self.real_radii, rows, self.fake, columns)]
        if self.fake_radii is not None:
            found.append(_look(tile, 1, self.fake, self.fake_radii, columns, self.real, rows))
        return found


def _look(
    tile: Tensor,
    side: int,
    centre_points: Points,
    radii: tuple[Tensor, Tensor],
    centres: slice,
    member_points: Points,
    members: slice,
) -> _Finding:
    """Settle the pairs of one tile whose rows (side 0) or columns (side 1) are R centres, the other side C members."""
    down, up = radii[0][centres], radii[1][centres]  # (R, K)
    centre_slack, member_slack = centre_points.slack[centres], member_points.slack[members]
    widest = up.amax(1)
    minima = group_minima(tile, side)
    if int((minima <= widest[:, None]).count_nonzero()) <= minima.numel() // 4:  # few memberships: list them
        centre, member, bounds = pairs_below(tile, side, widest, minima)
        upper = bounds + centre_slack[centre] + member_slack[member]
        sure = upper[:, None] < down[centre]  # (P, K)
        open_ = ((bounds[:, None] <= up[centre]) & ~sure).any(1)
        sure = (sure & ~open_[:, None]).long()
        counts = sure.new_zeros(len(member_slack), sure.shape[1]).index_add_(0, member, sure)
        held = sure.new_zeros(len(centre_slack), sure.shape[1]).index_add_(0, centre, sure)
        centre, member = centre[open_], member[open_]
    else:  # many: count them without listing
        lower = tile if side == 0 else tile.t()  # (R, C)
        upper = lower + (centre_slack[:, None] + member_slack)
        sures = [upper < limit[:, None] for limit in down.unbind(1)]
        opens = [(lower <= limit[:, None]) & ~sure for limit, sure in zip(up.unbind(1), sures, strict=True)]
        open_ = torch.stack(opens).any(0)
        sures = [sure & ~open_ for sure in sures]
        counts, held = (torch.stack([sure.sum(axis, dtype=torch.int32) for sure in sures], 1) for axis in (0, 1))
        centre, member = open_.nonzero(as_tuple=True)
    return _Finding(centres, members, counts, held, centre + centres.start, member + members.start)
