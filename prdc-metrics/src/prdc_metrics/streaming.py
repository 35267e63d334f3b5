"""Features that arrive in batches, on one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prdc_metrics.metrics import Features, PRDCResult, prdc


class PRDCMetric:
    """Collects features, torchmetrics-style, and scores them on `compute`.

    Args:
        ks: nearest_k values.
        device: where features are kept and scored; default: where they come from.
        **options: passed on to `prdc` (metrics, precision, tile, closed_ball, masks).

    Example:
        >>> metric = PRDCMetric(ks=(5,))
        >>> for batch in loader: metric.update(real=embed(batch), fake=embed(generate()))
        >>> metric.compute().values[5]
    """

    def __init__(self, ks: Sequence[int] = (5,), *, device: str | torch.device | None = None, **options: Any):
        self.ks, self.device, self.options = tuple(ks), device, options
        self.reset()

    def reset(self) -> None:
        """Forget all features."""
        self.real: list[Tensor] = []
        self.fake: list[Tensor] = []

    def update(self, *, real: Features | None = None, fake: Features | None = None) -> None:
        """Add a batch (b, D) of either kind or both. ValueError for a shape or dimension that does not fit."""
        for kept, batch, name in ((self.real, real, "real"), (self.fake, fake, "fake")):
            if batch is None:
                continue
            batch = torch.as_tensor(batch, device=self.device).detach()
            if batch.dim() != 2:
                raise ValueError(f"{name} must have shape (batch, dimensions), got {tuple(batch.shape)}")
            seen = self.real + self.fake
            if seen and seen[0].shape[1] != batch.shape[1]:
                raise ValueError(f"{name} has {batch.shape[1]} dimensions, earlier batches {seen[0].shape[1]}")
            kept.append(batch.clone())

    def merge(self, other: PRDCMetric) -> PRDCMetric:
        """Take over the features of another metric with the same ks, as from another process; returns self."""
        if other.ks != self.ks:
            raise ValueError(f"cannot merge ks {other.ks} into {self.ks}")
        for batch in other.real:
            self.update(real=batch)
        for batch in other.fake:
            self.update(fake=batch)
        return self

    def compute(self) -> PRDCResult:
        """Score what has been collected; ValueError if either kind is missing."""
        if not self.real or not self.fake:
            raise ValueError(f"got {len(self.real)} real and {len(self.fake)} fake batches; both are needed")
        return prdc(torch.cat(self.real), torch.cat(self.fake), self.ks, **self.options)
