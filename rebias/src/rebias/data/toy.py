"""The two-dimensional toy of section 3.2: x = (B, S), where the label equals the bias B in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

NUM_CLASSES = 3


class ToyPoints:
    """Three unit squares on the diagonal in training, all nine in testing; the sizes are ours; the paper gives none.

    The class y is uniform in 0 .. 2; b = y in training, uniform and independent of y in testing;
    x = (b + U(0, 1), y + U(0, 1)) - 1.5.

    Args:
        n: points.
        train: fully biased, or unbiased.
        seed: seed of all draws.
    """

    def __init__(self, n: int, train: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(NUM_CLASSES, (n,), generator=generator)
        self.bias = self.labels if train else torch.randint(NUM_CLASSES, (n,), generator=generator)
        corner = torch.stack([self.bias, self.labels], 1)
        self.points = corner + torch.rand(n, 2, generator=generator) - 1.5
        self.name = f"toy {'train' if train else 'test'}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One point (2,), its label and its bias."""
        return self.points[index], int(self.labels[index]), int(self.bias[index])

    def to(self, device: torch.device | str) -> ToyPoints:
        """Move everything; returns itself."""
        self.points, self.labels, self.bias = (x.to(device) for x in (self.points, self.labels, self.bias))
        return self

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: points (B, 2) float32 and targets (B,)."""
        for index in index_batches:
            index = index.to(self.labels.device, non_blocking=True)
            yield self.points[index], self.labels[index]

    def record(self) -> dict:
        """Name, size and checksum, for the run record."""
        digest = hashlib.sha256(self.points.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes())
        return {"name": self.name, "shape": list(self.points.shape), "sha256": digest.hexdigest()[:16]}
