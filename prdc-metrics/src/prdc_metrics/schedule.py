"""Who works on which tile: the tile size, and the split of the tiles over the ranks of torch.distributed.

Every rank holds all features and takes every world-th tile; what ranks exchange is O(N + M). Partial results are merged
by operations that do not depend on the split (k smallest, any, integer sum), so results are the same for any number of
ranks. Threads are torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prdc_metrics.distances import GROUP


@dataclass(frozen=True)
class Schedule:
    """Tile side (a multiple of 32, None for the device's default) and this process's place among the ranks."""

    tile: int | None = None
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_process(cls, tile: int | None) -> Schedule:
        """The schedule of this process; raises ValueError for a tile below 1."""
        if tile is not None and tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        if dist.is_available() and dist.is_initialized():
            return cls(tile, dist.get_rank(), dist.get_world_size())
        return cls(tile)

    def blocks(self, n: int, device: torch.device, at_least: int = 1) -> list[slice]:
        """Split 0..n (a multiple of 32) into blocks of the tile side, raised to `at_least`."""
        side = max(self.tile or (8192 if device.type == "cuda" else 1024), at_least)
        side = -(-side // GROUP) * GROUP
        return [slice(start, min(start + side, n)) for start in range(0, n, side)]

    def share(self, work: Sequence) -> Sequence:
        """This rank's part."""
        return work[self.rank :: self.ranks]

    def gather(self, x: Tensor) -> Tensor:
        """Put the (n, c) tensors of all ranks side by side: (n, c * ranks)."""
        if self.ranks == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(x)
        return x

    def any(self, mask: Tensor) -> Tensor:
        """Elementwise OR over the ranks."""
        return self.sum(mask.to(torch.int64)) > 0 if self.ranks > 1 else mask
