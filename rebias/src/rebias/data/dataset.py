"""What training and evaluation read from a data set, whichever it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor


class Dataset(Protocol):
    """Labelled inputs that come in batches.

    Attributes:
        labels: (n,) int64.
    """

    labels: Tensor

    def __len__(self) -> int: ...

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
