"""Closed forms for real and fake samples of the same continuous distribution, any (paper, Lemmas 1 and 2).

They do not hold if distances tie: two sets of 1,000 rows of 60 bits (each bit is 1 with probability .2) give density
.59 and coverage .88 for k = 5, not 1 and .97, since a ball is open and excludes the points on its sphere. For such
features `resampling.relabelled_intervals` gives the expectations.
"""

from __future__ import annotations

import math


def expected_density(n_real: int, n_fake: int, k: int) -> float:
    """E[density] = 1 for every N, M and 1 <= k < N (Lemma 1)."""
    _check(n_real, n_fake, k)
    return 1.0


def expected_coverage(n_real: int, n_fake: int, k: int) -> float:
    """E[coverage] = 1 - prod_{i=1..k} (N - i) / (M + N - i) (Lemma 2).

    A real is uncovered iff the k nearest of the N - 1 + M other points are all real, hence N in the numerator.

    Args:
        n_real: N, number of real samples.
        n_fake: M, number of fake samples.
        k: number of neighbours, 1 <= k <= N - 1.

    Raises:
        ValueError: for sizes below 1 or k out of range.
    """
    _check(n_real, n_fake, k)
    return 1.0 - math.prod((n_real - i) / (n_fake + n_real - i) for i in range(1, k + 1))


def smallest_k(n_real: int, n_fake: int, target: float = 0.95) -> int:
    """Smallest k whose expected coverage exceeds `target` (paper, section 3.4).

    Raises:
        ValueError: if no k < N does, or target is outside [0, 1).
    """
    if not 0 <= target < 1:
        raise ValueError(f"target must lie in [0, 1), got {target}")
    _check(n_real, n_fake, 1)
    uncovered = 1.0
    for k in range(1, n_real):
        uncovered *= (n_real - k) / (n_fake + n_real - k)
        if 1.0 - uncovered > target:
            return k
    raise ValueError(f"no k below {n_real} reaches an expected coverage above {target} for N={n_real}, M={n_fake}")


def _check(n_real: int, n_fake: int, k: int) -> None:
    if n_real < 2 or n_fake < 1:
        raise ValueError(f"need at least 2 real and 1 fake samples, got {n_real} and {n_fake}")
    if not 1 <= k < n_real:
        raise ValueError(f"k must lie in 1..{n_real - 1} for {n_real} real samples, got {k}")
