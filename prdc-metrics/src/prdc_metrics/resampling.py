"""Intervals without a model of the data: from subsamples, and from random relabellings of the two sets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prdc_metrics.metrics import METRICS, Features, as_features, prdc


def subsample_intervals(
    real: Features, fake: Features, k: int = 5, *, n: int = 20, fraction: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """Metrics over n random subsets of both sets.

    Without replacement: a point drawn twice is its own neighbour and breaks the radii.

    Args:
        real: (N, D).
        fake: (M, D).
        k: nearest_k.
        n: number of subsets, at least 2.
        fraction: share of each set in a subset, in (0, 1). Values depend on sample size: they describe sets of this
            size, and the spread of halves is close to that of new full sets.
        seed: seed of the subsets.

    Returns:
        One row per metric with columns mean, std, low, high (2.5 and 97.5 % quantiles) and the n of subsets.
    """
    if n < 2 or not 0 < fraction < 1:
        raise ValueError(f"need n >= 2 and 0 < fraction < 1, got n={n} and fraction={fraction}")
    real, fake = as_features(real, "real"), as_features(fake, "fake")
    rng = np.random.default_rng(seed)

    def part(x: Tensor) -> Tensor:
        return x[np.sort(rng.choice(len(x), max(1, int(len(x) * fraction)), replace=False))]

    return _intervals([prdc(part(real), part(fake), (k,)).values[k] for _ in range(n)])


def relabelled_intervals(real: Features, fake: Features, k: int = 5, *, n: int = 20, seed: int = 0) -> pd.DataFrame:
    """What identical distributions give on these points: pooled, then split at random into N reals and M fakes.

    If distances tie, the closed forms do not hold, and precision and recall have none; use these means instead.

    Args:
        real: (N, D).
        fake: (M, D).
        k: nearest_k.
        n: number of random splits, at least 2.
        seed: seed of the splits.

    Returns:
        As `subsample_intervals`.
    """
    if n < 2:
        raise ValueError(f"need n >= 2, got n={n}")
    real, fake = as_features(real, "real"), as_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real has {real.shape[1]} dimensions and fake {fake.shape[1]}")
    pool = torch.cat([real, fake.to(real.device)])
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(pool)) for _ in range(n)]
    return _intervals([prdc(pool[o[: len(real)]], pool[o[len(real) :]], (k,)).values[k] for o in orders])


def _intervals(each: list[dict[str, float]]) -> pd.DataFrame:
    values = pd.DataFrame(each, columns=list(METRICS))
    return pd.DataFrame(
        {
            "mean": values.mean(),
            "std": values.std(),
            "low": values.quantile(0.025),
            "high": values.quantile(0.975),
            "n": len(each),
        }
    )
