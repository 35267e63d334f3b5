"""Who works on which tile: the tile size, and the split of the tiles over the ranks of a process group.

Only a group that the caller names is used: an initialised torch.distributed alone changes nothing. Every rank of the
group holds all features and takes every world-th tile; what ranks exchange is O(N + M). Partial results are merged by
operations that do not depend on the split (k smallest, any, integer sum), so results are the same for any number of
ranks. Threads are torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prdc_metrics.distances import GROUP
from shared_utils.logging import progress

Work = TypeVar("Work")
LONG = 2_000  # tiles
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Schedule:
    """Tile side (a multiple of GROUP, None for the device's default) and the group that shares the work, if any."""

    tile: int | None = None
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")
        if self.group is not None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: torch.distributed is not initialised; leave group out on a single process")

    @property
    def ranks(self) -> int:
        """Number of processes that share the work."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def blocks(self, n: int, device: torch.device, at_least: int = 1) -> list[slice]:
        """Split 0..n (a multiple of GROUP) into blocks of the tile side, raised to `at_least`."""
        side = max(self.tile or (8192 if device.type == "cuda" else 1024), at_least)
        side = -(-side // GROUP) * GROUP
        return [slice(start, min(start + side, n)) for start in range(0, n, side)]

    def share(self, work: Sequence[Work]) -> Iterator[Work]:
        """This rank's part, with a progress bar in a terminal where it takes minutes."""
        mine = work if self.group is None else work[dist.get_rank(self.group) :: self.ranks]
        if len(mine) < LONG:
            yield from mine
            return
        with progress() as bar:
            yield from bar.track(mine, description="distances")

    def gather(self, x: Tensor) -> Tensor:
        """Put the (n, c) tensors of all ranks side by side: (n, c * ranks)."""
        if self.ranks == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def smallest(self, x: Tensor) -> Tensor:
        """The k smallest of each row over the ranks, ascending: (n, k) ascending -> (n, k)."""
        return x if self.ranks == 1 else self.gather(x).topk(x.shape[1], 1, largest=False)[0]

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def total(self, count: int, device: torch.device) -> int:
        """Sum of one integer per rank."""
        return count if self.ranks == 1 else int(self.sum(torch.tensor(count, device=device)))

    def any(self, mask: Tensor) -> Tensor:
        """Elementwise OR over the ranks."""
        return self.sum(mask.to(torch.int64)) > 0 if self.ranks > 1 else mask

    def agree(self, **tensors: Tensor) -> None:
        """ValueError on every rank unless all hold the same tensors (shape, type and a checksum of the bytes)."""
        if self.ranks == 1:
            return
        for name, x in tensors.items():
            marks = self.gather(_fingerprint(x)[None]).view(self.ranks, -1)
            other = (marks != marks[0]).any(1).nonzero()[:, 0].tolist()
            if other:
                raise ValueError(
                    f"{name}: ranks {', '.join(map(str, other))} of the group hold other features than rank 0; "
                    "pass equal features on every rank, or sharded=True where each rank holds its own part"
                )


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The (n_r, D) tensors of all ranks, in their order; a rank without rows may pass an empty tensor of any shape.

    Raises:
        ValueError: on every rank, where D or the dtype differs between ranks that have rows.
    """
    ranks = dist.get_world_size(group)
    width, kind = (x.shape[1], DTYPES.index(x.dtype)) if x.numel() else (0, 0)
    mine = torch.tensor([len(x) if x.numel() else 0, width, kind], device=x.device)
    sizes = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(sizes, mine, group=group)
    held = {(int(width), int(kind)) for rows, width, kind in sizes if rows}
    if len(held) > 1:
        shown = " and ".join(f"{width} dimensions of {DTYPES[kind]}" for width, kind in sorted(held))
        raise ValueError(f"ranks hold features of {shown}; they must be alike")
    width, kind = held.pop() if held else (0, 0)
    padded = torch.zeros(max(int(rows) for rows, *_ in sizes), width, dtype=DTYPES[kind], device=x.device)
    if x.numel():
        padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(rows)] for part, (rows, *_) in zip(parts, sizes, strict=True)]


def _fingerprint(x: Tensor) -> Tensor:
    """(n, D) -> (6,) int64: shape, dtype, and sums over the bits that depend on value and place."""
    bits = x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    places = [torch.arange(1, len(sums) + 1, device=x.device) for sums in (rows, columns)]
    sums = [rows.sum(), (rows * places[0]).sum(), (columns * places[1]).sum()]
    return torch.stack([torch.tensor(v, device=x.device) for v in (*x.shape, DTYPES.index(x.dtype))] + sums)
