"""Features that arrive in batches, on one process or many: a torchmetrics Metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prdc_metrics.metrics import Features, as_features, prdc
from prdc_metrics.schedule import gather_rows


class PRDCMetric(Metric):
    """Collects features of real and generated samples and scores them on `compute`.

    A torchmetrics `Metric`: under an initialised torch.distributed `compute` is called by every rank, gathers what all
    ranks have collected (a sampler's repeated samples included) and lets them share the work. To score on one rank
    alone pass `sync_on_compute=False`. As always in torchmetrics, `metric(...)` also scores the batch itself: use
    `update`.

    Args:
        ks: nearest_k values.
        metrics: names to compute, default all four.
        precision: as `prdc`.
        tile: as `prdc`.
        closed_ball: as `prdc`.
        **kwargs: those of torchmetrics: sync_on_compute, process_group, compute_on_cpu, ...

    Example:
        >>> metric = PRDCMetric(ks=(5,)).to(device)
        >>> for batch in loader: metric.update(real=embed(batch), fake=embed(generate()))
        >>> self.log_dict(metric.compute())  # precision, recall, density, coverage
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    real: list[Tensor] | Tensor
    fake: list[Tensor] | Tensor

    def __init__(
        self,
        ks: Sequence[int] = (5,),
        *,
        metrics: Sequence[str] | None = None,
        precision: str = "auto",
        tile: int | None = None,
        closed_ball: bool = False,
        **kwargs: Any,
    ):
        super().__init__(dist_sync_fn=gather_rows, **kwargs)
        self.ks = tuple(ks)
        self.options: dict[str, Any] = {"metrics": metrics, "precision": precision, "tile": tile}
        self.options |= {"closed_ball": closed_ball}
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, *, real: Features | None = None, fake: Features | None = None) -> None:
        """Add a batch (b, D) of either kind or both. ValueError for a batch that does not fit, or NaN in it."""
        batches = {name: x for name, x in (("real", real), ("fake", fake)) if x is not None}
        checked = {name: as_features(x, name, self.device) for name, x in batches.items()}
        for name, batch in checked.items():
            seen = [*self.real, *self.fake, *checked.values()]
            if seen[0].shape[-1] != batch.shape[1]:
                raise ValueError(f"{name} has {batch.shape[1]} dimensions, earlier batches {seen[0].shape[-1]}")
        for name, batch in checked.items():
            getattr(self, name).append(batch.clone())

    def compute(self) -> dict[str, Tensor]:
        """Score what has been collected; ValueError if either kind is missing.

        Returns:
            0-d float64 tensors by name; with several ks by name and k, such as "density_k5".
        """
        real, fake = _all_rows(self.real), _all_rows(self.fake)
        if real is None or fake is None:
            empty = [name for name, x in (("real", real), ("fake", fake)) if x is None]
            raise ValueError(f"no {' and no '.join(empty)} features have been collected; both kinds are needed")
        group = (self.process_group or torch.distributed.group.WORLD) if self._is_synced else None
        values = prdc(real, fake, self.ks, group=group, **self.options).values
        return {
            name if len(values) == 1 else f"{name}_k{k}": torch.tensor(value, dtype=torch.float64, device=self.device)
            for k, of_k in values.items()
            for name, value in of_k.items()
        }


def _all_rows(state: list[Tensor] | Tensor) -> Tensor | None:
    """A list of batches, or one tensor once the ranks' batches are gathered; None without rows."""
    rows = state if isinstance(state, Tensor) else torch.cat(state) if state else None
    return None if rows is None or not len(rows) else rows
