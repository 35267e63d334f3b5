"""Precision, recall, density and coverage (paper, section 3), exact for any input."""

from __future__ import annotations

import contextlib
import json
import operator
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributed import ProcessGroup

from prdc_metrics.arithmetic import full_float32
from prdc_metrics.balls import Membership, ball_membership
from prdc_metrics.distances import PRECISIONS
from prdc_metrics.expectation import expected_coverage, expected_density
from prdc_metrics.neighbours import nearest_squared
from prdc_metrics.schedule import Schedule, gather_rows

Features = Tensor | ArrayLike
METRICS = ("precision", "recall", "density", "coverage")
TIES = 0.01  # share of memberships on the sphere above which we warn: the closed forms are off by as much


@dataclass(frozen=True)
class PRDCResult:
    """Values and integer counts per k; with `masks=True` also the per-sample decisions (K columns, one per k)."""

    num_real: int
    num_fake: int
    ks: tuple[int, ...]
    values: dict[int, dict[str, float]]
    counts: dict[int, dict[str, int]]  # numerators; the denominators are M, N, k M and N
    expected_density: dict[int, float]
    expected_coverage: dict[int, float]
    recheck_pairs: int  # pairs whose distance was computed exactly
    closed_ball: bool
    device: str
    seconds: float
    real_radii: Tensor | None = None  # (N, K) float64, not squared
    fake_radii: Tensor | None = None  # (M, K) float64
    fake_counts: Tensor | None = None  # (M, K) int64, number of real balls that contain the fake
    precision_mask: Tensor | None = None  # (M, K) bool
    recall_mask: Tensor | None = None  # (N, K) bool
    coverage_mask: Tensor | None = None  # (N, K) bool

    def to_json(self, **origin: Any) -> str:
        """Everything but the per-sample tensors, as one JSON object, with the version of this package.

        Args:
            **origin: what else is needed to report the numbers: embedding, weights, seed.
        """
        names = ["num_real", "num_fake", "ks", "values", "counts", "expected_density", "expected_coverage"]
        names += ["recheck_pairs", "device", "seconds"]
        found = {name: getattr(self, name) for name in names} | {"balls": "closed" if self.closed_ball else "open"}
        return json.dumps(found | {"prdc_metrics": version("prdc-metrics")} | origin, indent=2)


def compute_prdc(
    real_features: Features,
    fake_features: Features,
    nearest_k: int,
    *,
    metrics: Iterable[str] | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    tile: int | None = None,
    closed_ball: bool = False,
    group: ProcessGroup | None = None,
    sharded: bool = False,
) -> dict[str, float]:
    """Drop-in for `prdc.compute_prdc`: the four metrics of the paper (section 3) for one k.

    Args:
        real_features: (N, D) array or tensor, any real dtype.
        fake_features: (M, D).
        nearest_k: k, 1 <= k <= N - 1, and <= M - 1 when recall is asked.
        metrics: names to compute, default all four; leaving recall out saves the fake-fake distances.
        device: where to compute; default: the features' device.
        precision: precision of the filter ("auto", "float32", "tf32", "bf16", "float64"); the result does not depend on
            it.
        tile: side of a distance tile; the result does not depend on it.
        closed_ball: count points on the sphere as inside (the paper's balls are open).
        group: processes of torch.distributed that share the work, each calling with the same features, or with its
            part of them (`sharded`); all get the same result. None: this process alone, even if torch.distributed is
            up.
        sharded: each rank of the group holds a part of the rows; the parts are gathered first.

    Returns:
        Python floats under "precision", "recall", "density", "coverage". Density may exceed 1: its range is [0, N / k].

    Raises:
        ValueError: not 2-D, D differs, NaN or infinite values, empty sets, k out of range, unknown metric; ranks of
            the group that hold different features.
        TypeError: nearest_k is not an integer.
    """
    k = _integer(nearest_k)
    result = prdc(
        real_features,
        fake_features,
        (k,),
        metrics=metrics,
        device=device,
        precision=precision,
        tile=tile,
        closed_ball=closed_ball,
        group=group,
        sharded=sharded,
    )
    if "coverage" in result.values[k] and result.expected_coverage[k] < 0.95:
        warnings.warn(
            f"nearest_k={k} gives an expected coverage of {result.expected_coverage[k]:.3f} even for identical "
            f"distributions with {result.num_real} reals and {result.num_fake} fakes; smallest_k returns a k for .95",
            stacklevel=2,
        )
    return result.values[k]


def prdc(
    real: Features,
    fake: Features,
    ks: Sequence[int] = (5,),
    *,
    metrics: Iterable[str] | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    tile: int | None = None,
    closed_ball: bool = False,
    masks: bool = False,
    group: ProcessGroup | None = None,
    sharded: bool = False,
    checkpoint: Path | str | None = None,
) -> PRDCResult:
    """The metrics for several k in one pass, with counts, expectations and (masks=True) per-sample decisions.

    Arguments and errors as `compute_prdc`. Per-sample results of sharded features have the rows of all ranks.
    `checkpoint` is for hours of work, a million samples on each side: a folder in which the work is saved every five
    minutes. The same call resumes from there; the files are removed once the result is complete.
    """
    start = time.perf_counter()
    schedule = Schedule(tile, group, None if checkpoint is None else Path(checkpoint))
    precision = chosen_precision(precision)
    if sharded and group is None:
        raise ValueError("sharded needs a group, whose ranks hold the parts, such as torch.distributed.group.WORLD")
    real, fake = as_features(real, "real", device, sharded), as_features(fake, "fake", device, sharded)
    if sharded:
        real, fake = (torch.cat(gather_rows(x, group)) for x in (real, fake))
    schedule.agree(real=real, fake=fake)
    names, ks = chosen_metrics(metrics), checked_ks(ks, real, "real")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real has {real.shape[1]} dimensions and fake {fake.shape[1]}")
    if "recall" in names:
        checked_ks(ks, fake, "fake")
    real_squared, verified = squared_radii(real, ks, schedule, precision, "real")
    return score(real, real_squared, fake, ks, names, schedule, precision, closed_ball, masks, verified, start)


def knn_radii(
    x: Features,
    k: int,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    tile: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Distance of every row to its k-th nearest other row: (n, D) -> (n,) float64, not squared (NND_k)."""
    x, schedule = as_features(x, "x", device), Schedule(tile, group)
    schedule.agree(x=x)
    ks = checked_ks((k,), x, "x")
    return squared_radii(x, ks, schedule, chosen_precision(precision), "x")[0][:, 0].sqrt()


def score(
    real: Tensor,
    real_squared: Tensor,
    fake: Tensor,
    ks: tuple[int, ...],
    names: tuple[str, ...],
    schedule: Schedule,
    precision: str,
    closed_ball: bool,
    masks: bool,
    verified: int,
    start: float,
) -> PRDCResult:
    """From real radii (N, K) to the result; real, fake and ks have been checked."""
    fake_squared = None
    if "recall" in names:
        fake_squared, more = squared_radii(fake, ks, schedule, precision, "fake")
        verified += more
    with exact_arithmetic(precision, fake):
        in_real, in_fake, more = ball_membership(
            real, fake, real_squared, fake_squared, schedule, precision, closed_ball
        )
    if in_real.on_sphere > TIES * int(in_real.counts[:, -1].sum()):
        warnings.warn(
            f"{in_real.on_sphere} fakes lie exactly on the sphere of a real: discrete features, or copies of reals. "
            "Density 1 and the expected coverage hold only for identical distributions without ties; "
            "relabelled_intervals gives the expectations for this data",
            stacklevel=3,
        )
    schedule.finished()
    values, counts = _values(in_real, in_fake, ks, names)
    per_sample = {}
    if masks:
        per_sample = {
            "real_radii": real_squared.sqrt(),
            "fake_counts": in_real.counts,
            "precision_mask": in_real.counts > 0,
            "coverage_mask": in_real.held > 0,
        }
        if in_fake is not None and fake_squared is not None:
            per_sample |= {"fake_radii": fake_squared.sqrt(), "recall_mask": in_fake.counts > 0}
    return PRDCResult(
        num_real=len(real),
        num_fake=len(fake),
        ks=ks,
        values=values,
        counts=counts,
        expected_density={k: expected_density(len(real), len(fake), k) for k in ks},
        expected_coverage={k: expected_coverage(len(real), len(fake), k) for k in ks},
        recheck_pairs=verified + more,
        closed_ball=closed_ball,
        device=str(real.device),
        seconds=time.perf_counter() - start,
        **per_sample,
    )


def _values(
    in_real: Membership, in_fake: Membership | None, ks: tuple[int, ...], names: tuple[str, ...]
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, int]]]:
    num_real, num_fake = len(in_real.held), len(in_real.counts)
    values, counts = {}, {}
    for column, k in enumerate(ks):
        counts[k] = {
            "precision": int((in_real.counts[:, column] > 0).sum()),
            "recall": 0 if in_fake is None else int((in_fake.counts[:, column] > 0).sum()),
            "density": int(in_real.counts[:, column].sum()),
            "coverage": int((in_real.held[:, column] > 0).sum()),
        }
        size = {"precision": num_fake, "recall": num_real, "density": k * num_fake, "coverage": num_real}
        counts[k] = {name: counts[k][name] for name in names}
        values[k] = {name: counts[k][name] / size[name] for name in names}
    return values, counts


def squared_radii(x: Tensor, ks: tuple[int, ...], schedule: Schedule, precision: str, name: str) -> tuple[Tensor, int]:
    """NND_k^2 for each k: (n, D) -> (n, K) float64, and the number of verified pairs. Warns about zero radii."""
    with exact_arithmetic(precision, x):
        radii, verified = nearest_squared(x, ks, schedule, precision)
    empty = int((radii[:, 0] == 0).sum())
    if empty:
        warnings.warn(
            f"{empty} of {len(x)} {name} balls have radius 0 (at least {ks[0]} copies of the point each): "
            "an open ball of radius 0 contains nothing",
            stacklevel=3,
        )
    return radii, verified


def as_features(x: Features, name: str, device: str | torch.device | None = None, may_be_empty: bool = False) -> Tensor:
    """Check features and put them on `device`: (n, D), floating, finite. Integers become float64.

    Raises:
        ValueError: no numbers, masked entries, not 2-D, empty, NaN or infinite, or values whose squares leave the range
            of float64.
    """
    x = torch.as_tensor(x if isinstance(x, Tensor) else _as_numbers(x, name), device=device).detach()
    if x.is_complex():
        raise ValueError(f"{name} must be real-valued, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0 or (len(x) == 0 and not may_be_empty):
        raise ValueError(f"{name} must have shape (samples, dimensions), both at least 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        x = x.double()
    low, high = x.aminmax() if len(x) else (x.new_zeros(()),) * 2
    if not (low.isfinite() and high.isfinite()):
        bad = (~x.isfinite().all(1)).nonzero()[:, 0]
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} of {len(x)} rows, first in row {int(bad[0])}"
        )
    largest = max(-float(low), float(high))
    if largest > 2.0**500 or 0 < largest < 2.0**-450:
        raise ValueError(f"{name} has magnitude {largest:g}: rescale both sets, the metrics do not depend on scale")
    return x.contiguous()


def _as_numbers(x: ArrayLike, name: str) -> np.ndarray:
    """What torch can wrap: native byte order, positive strides, float64 for types that torch lacks."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.getmaskarray(x).any():
        raise ValueError(f"{name} has masked entries: fill or drop them")
    array = np.asarray(x)
    if array.dtype == object:  # a frame of mixed columns, rows of unequal length
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} contains something other than numbers ({error}): pass a numeric array") from None
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def checked_ks(ks: Sequence[int], x: Tensor, name: str) -> tuple[int, ...]:
    """Each k an integer in 1..n-1; returned ascending without repeats."""
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks must be several k such as ({ks!r},), got {ks!r}; for one k use compute_prdc")
    ks = tuple(sorted({_integer(k) for k in ks}))
    if not ks:
        raise ValueError("ks is empty")
    if ks[0] < 1 or ks[-1] > len(x) - 1:
        raise ValueError(
            f"k must lie in 1..{len(x) - 1} for {len(x)} {name} samples, got {ks[0] if ks[0] < 1 else ks[-1]}"
        )
    return ks


def _integer(k: SupportsIndex) -> int:
    if isinstance(k, (bool, np.bool_)):
        raise ValueError("k must be an integer, got a bool")
    return operator.index(k)


def chosen_metrics(metrics: Iterable[str] | None) -> tuple[str, ...]:
    """The requested names in the paper's order; raises ValueError for unknown ones."""
    if metrics is None:
        return METRICS
    asked = {metrics} if isinstance(metrics, str) else set(metrics)
    if not asked or asked - set(METRICS):
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {sorted(asked)}")
    return tuple(name for name in METRICS if name in asked)


def chosen_precision(precision: str) -> str:
    """Resolve "auto" to float32, which has the tightest bounds of the fast types."""
    if precision == "auto":
        return "float32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


@contextlib.contextmanager
def exact_arithmetic(precision: str, x: Tensor) -> Iterator[None]:
    """The matrix product as the error bound assumes it: no autograd, no autocast, tf32 only if asked for."""
    tf32 = precision == "tf32" and x.is_cuda
    with full_float32(tf32), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield
