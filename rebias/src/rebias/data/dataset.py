"""What training and evaluation read from a data set, whichever it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    workers: int = -1
    """reading processes; -1: one per core, 8 at most"""
    skip_missing: bool = False
    """go on without videos that are missing, counted and named"""
    skip_broken: bool = False
    """go on without files that cannot be decoded, counted and named; each one is decoded once before"""

    @property
    def num_workers(self) -> int:
        """As a number of processes."""
        return min(8, len(os.sched_getaffinity(0))) if self.workers < 0 else self.workers


class Dataset(Protocol):
    """Labelled inputs that come in batches; a torch DataLoader takes it too, item by item.

    Attributes:
        name: for the run record.
        labels: (n,) int64.
    """

    name: str
    labels: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """(input, label), with the bias label behind them where there is one."""

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: inputs (B, ...) and targets (B,)."""

    def record(self) -> dict[str, Any]:
        """Name, size and checksum, for the run record."""


class BiasedDataset(Dataset, Protocol):
    """With a bias label per input.

    Attributes:
        bias: (n,) int64.
    """

    bias: Tensor
