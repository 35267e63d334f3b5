"""Who works on which tile: the tile size, and the split of the tiles over the ranks of a process group.

Only a group that the caller passes is used: an initialised torch.distributed alone changes nothing. Every rank of the
group holds all features and takes every world-th tile; what ranks exchange is O(N + M). Partial results are merged by
operations that do not depend on the split (k smallest, any, integer sum), so results are the same for any number of
ranks. Threads are torch's own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prdc_metrics.distances import GROUP
from shared_utils.files import whole_file
from shared_utils.logging import get_logger, progress

logger = get_logger("prdc_metrics")

Work = TypeVar("Work")
LONG = 2_000  # tiles
SAVE_EVERY = 300.0  # seconds
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Schedule:
    """How the tiles are processed.

    Args:
        tile: side of a tile (a multiple of GROUP), None for the device's default.
        group: processes that share the work, if any.
        checkpoint: folder where unfinished work is saved and from which the same work resumes. None: no saving.
    """

    tile: int | None = None
    group: dist.ProcessGroup | None = None
    checkpoint: Path | None = None
    saved: set[Path] = field(default_factory=set)  # files of this schedule in `checkpoint`

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
        side = max(self.tile or (8192 if device.type == "cuda" else 1536), at_least)
        side = -(-side // GROUP) * GROUP
        return [slice(start, min(start + side, n)) for start in range(0, n, side)]

    def share(self, work: Sequence[Work], state: Sequence[Any] = (), identity: Sequence[Any] = ()) -> Iterator[Work]:
        """This rank's part, with a progress bar in a terminal if it takes minutes.

        Args:
            work: the tiles of all ranks.
            state: objects that the caller's loop changes; with a checkpoint the attributes named in their SAVED
                are saved and restored.
            identity: tensors and values that determine what is computed; work with another identity is never resumed.
        """
        rank = 0 if self.group is None else dist.get_rank(self.group)
        mine, done, file = work[rank :: self.ranks], 0, None
        if self.checkpoint is not None and state:
            file = self.checkpoint / f"{_name(self.tile, rank, self.ranks, *identity)}.pt"
            self.saved.add(file)
            done = _restore(file, state)
            if done:
                logger.info("%s: resuming at tile %d of %d", file, done, len(mine))
        last = time.monotonic()
        with progress() if len(mine) - done >= LONG else nullcontext() as bar:
            rest: Sequence[Work] = mine[done:]
            for item in bar.track(rest, len(mine), done, description="distances") if bar else rest:
                yield item
                done += 1
                if file and time.monotonic() - last > SAVE_EVERY:
                    _save(file, done, state)
                    last = time.monotonic()
        if file:
            _save(file, done, state)

    def finished(self) -> None:
        """Remove what was saved once the result is complete."""
        for file in self.saved:
            file.unlink(missing_ok=True)
        self.saved.clear()

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
                    f"{name}: ranks {', '.join(map(str, other))} of the group hold different features from rank 0; "
                    "pass the same features on every rank, or sharded=True if each rank holds a part"
                )


def _name(*identity: Any) -> str:
    """A file name for a piece of work, from everything that determines it."""
    digest = hashlib.sha256()
    for part in identity:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _save(file: Path, done: int, state: Sequence[Any]) -> None:
    with whole_file(file) as temporary:
        torch.save({"done": done, "state": [{name: getattr(s, name) for name in s.SAVED} for s in state]}, temporary)


def _restore(file: Path, state: Sequence[Any]) -> int:
    """Restore the saved state; returns the number of finished tiles. ValueError if the file is damaged."""
    if not file.is_file():
        return 0
    try:
        content = torch.load(file, weights_only=True)
        for each, values in zip(state, content["state"], strict=True):
            for name in each.SAVED:
                setattr(each, name, values[name])
        return content["done"]
    except Exception as error:  # zip, pickle and key errors of a damaged file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{file}: damaged ({reason}); name another checkpoint folder to start again") from error


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The (n_r, D) tensors of all ranks, in their order; a rank without rows may pass an empty tensor of any shape.

    Raises:
        ValueError: on every rank, if D or the dtype differs between ranks that have rows.
    """
    ranks = dist.get_world_size(group)
    width, kind = (x.shape[1], DTYPES.index(x.dtype)) if x.numel() else (0, 0)
    mine = torch.tensor([len(x) if x.numel() else 0, width, kind], device=x.device)
    sizes = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(sizes, mine, group=group)
    held = {(int(width), int(kind)) for rows, width, kind in sizes if rows}
    if len(held) > 1:
        shown = " and ".join(f"{width} dimensions of {DTYPES[kind]}" for width, kind in sorted(held))
        raise ValueError(f"ranks hold features of {shown}; these must agree")
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
