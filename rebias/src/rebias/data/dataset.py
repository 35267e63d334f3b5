"""The interface through which training and evaluation read a data set."""

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
    """reading processes; -1: one per core, at most 8"""
    skip_missing: bool = False
    """skip missing videos; they are counted and named"""
    skip_broken: bool = False
    """skip files that cannot be decoded (each is decoded once in advance); they are counted and named"""

    @property
    def num_workers(self) -> int:
        """The number of processes."""
        return min(8, len(os.sched_getaffinity(0))) if self.workers < 0 else self.workers


class Dataset(Protocol):
    """Labelled inputs that come in batches; a torch DataLoader takes it too, item by item.

    Attributes:
        name: name in the run record.
        labels: (n,) int64.
    """

    name: str
    labels: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """(input, label), followed by the bias label if there is one."""

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: inputs (B, ...) and targets (B,)."""

    def record(self) -> dict[str, Any]:
        """Name, size and checksum, for the run record."""


class BiasedDataset(Dataset, Protocol):
    """A set with a bias label per input.

    Attributes:
        bias: (n,) int64.
    """

    bias: Tensor
