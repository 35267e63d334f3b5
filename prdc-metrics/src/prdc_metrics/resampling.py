"""Intervals from subsamples. Without replacement: a point drawn twice is its own neighbour and breaks the radii."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from prdc_metrics.metrics import METRICS, Features, as_features, prdc


def subsample_intervals(
    real: Features, fake: Features, k: int = 5, *, n: int = 20, fraction: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """Metrics over n random subsets of both sets.

    Args:
        real: (N, D).
        fake: (M, D).
        k: nearest_k.
        n: number of subsets, at least 2.
        fraction: share of each set in a subset, in (0, 1). Values depend on sample size: they describe sets of this
            size, and the spread of halves is close to that of full sets drawn anew.
        seed: of the subsets.

    Returns:
        One row per metric with columns mean, std, low, high (2.5 and 97.5 % quantiles) and the n of subsets.
    """
    if n < 2 or not 0 < fraction < 1:
        raise ValueError(f"need n >= 2 and 0 < fraction < 1, got n={n} and fraction={fraction}")
    real, fake = as_features(real, "real"), as_features(fake, "fake")
    rng = np.random.default_rng(seed)

    def half(x: Tensor) -> Tensor:
        return x[np.sort(rng.choice(len(x), max(1, int(len(x) * fraction)), replace=False))]

    values = pd.DataFrame([prdc(half(real), half(fake), (k,)).values[k] for _ in range(n)], columns=list(METRICS))
    return pd.DataFrame(
        {
            "mean": values.mean(),
            "std": values.std(),
            "low": values.quantile(0.025),
            "high": values.quantile(0.975),
            "n": n,
        }
    )
