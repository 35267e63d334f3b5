"""The real manifold, computed once and reused for every model and checkpoint (paper, section 3.2)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from prdc_metrics import metrics as core
from prdc_metrics.schedule import Schedule
from shared_utils.files import whole_file

FORMAT = "1"


class RealManifold:
    """Real features with their squared radii; `origin`, JSON of your own, is saved with them.

    Example:
        >>> manifold = RealManifold.fit(real, ks=(3, 5))
        >>> manifold.score(fake).values[5]["coverage"]
    """

    def __init__(self, features: Tensor, ks: tuple[int, ...], squared: Tensor):
        self.features, self.ks, self.squared = features, ks, squared
        self.origin: dict[str, Any] = {}

    @classmethod
    def fit(
        cls,
        real: core.Features,
        ks: Sequence[int] = (5,),
        *,
        device: str | torch.device | None = None,
        precision: str = "auto",
        tile: int | None = None,
        group: ProcessGroup | None = None,
    ) -> RealManifold:
        """Radii of real features (N, D) for each k. Other arguments and errors as `compute_prdc`."""
        features, schedule = core.as_features(real, "real", device), Schedule(tile, group)
        schedule.agree(real=features)
        ks = core.checked_ks(ks, features, "real")
        squared, _ = core.squared_radii(features, ks, schedule, core.chosen_precision(precision), "real")
        return cls(features, ks, squared)

    @property
    def radii(self) -> Tensor:
        """(N, K) float64, not squared, one column per k in ascending order."""
        return self.squared.sqrt()

    def at(self, ks: Sequence[int]) -> RealManifold:
        """The same reals for some of the ks; ValueError for a k whose radii were not fitted."""
        ks = core.checked_ks(ks, self.features, "real")
        missing = [k for k in ks if k not in self.ks]
        if missing:
            held = ", ".join(map(str, self.ks))
            raise ValueError(f"the manifold holds k = {held}, not {missing[0]}: fit it for that k")
        part = RealManifold(self.features, ks, self.squared[:, [self.ks.index(k) for k in ks]])
        part.origin = self.origin
        return part

    def score(
        self,
        fake: core.Features,
        *,
        metrics: Iterable[str] | None = None,
        precision: str = "auto",
        tile: int | None = None,
        closed_ball: bool = False,
        masks: bool = False,
        group: ProcessGroup | None = None,
        checkpoint: Path | str | None = None,
    ) -> core.PRDCResult:
        """The metrics of fake features (M, D) against this manifold, for all its ks; the rest as `prdc`."""
        start, schedule = time.perf_counter(), Schedule(tile, group, None if checkpoint is None else Path(checkpoint))
        fake = core.as_features(fake, "fake", self.features.device)
        names = core.chosen_metrics(metrics)
        if fake.shape[1] != self.features.shape[1]:
            raise ValueError(f"real has {self.features.shape[1]} dimensions and fake {fake.shape[1]}")
        if "recall" in names:
            core.checked_ks(self.ks, fake, "fake")
        schedule.agree(real=self.features, fake=fake)
        return core.score(
            self.features,
            self.squared,
            fake,
            self.ks,
            names,
            schedule,
            core.chosen_precision(precision),
            closed_ball,
            masks,
            verified=0,
            start=start,
        )

    def save(self, path: str | Path) -> None:
        """Write features, radii, ks and a checksum as one safetensors file, completely or not at all."""
        tensors = {"features": self.features.cpu().contiguous(), "squared_radii": self.squared.cpu().contiguous()}
        meta = {"format": FORMAT, "ks": json.dumps(self.ks), "sha256": _checksum(tensors)}
        meta["origin"] = json.dumps(self.origin)
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata=meta)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> RealManifold:
        """Read a saved manifold.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, altered, or not a manifold.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no manifold at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if meta.get("format") != FORMAT or set(tensors) != {"features", "squared_radii"}:
            raise ValueError(f"{path} is not a manifold of format {FORMAT}")
        if meta.get("sha256") != _checksum(tensors):
            raise ValueError(f"{path}: contents do not match their checksum; fit the manifold again")
        features = core.as_features(tensors["features"], "real", device)
        manifold = cls(features, tuple(json.loads(meta["ks"])), tensors["squared_radii"].to(device))
        manifold.origin = json.loads(meta.get("origin", "{}"))
        return manifold


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
