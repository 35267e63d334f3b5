"""The paper's toy data (sections 3 and 4.1.1): seeded samplers of float64 arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MODES = 10


def identical(law: str, num_real: int, num_fake: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Real (N, D) and fake (M, D) of the same distribution: "normal", "uniform" or "cauchy" (heavy-tailed)."""
    rng = np.random.default_rng(seed)
    draws: dict[str, Callable[[tuple[int, int]], np.ndarray]]
    draws = {"normal": rng.standard_normal, "uniform": rng.random, "cauchy": rng.standard_cauchy}
    return draws[law]((num_real, dim)), draws[law]((num_fake, dim))


def shift(
    mu: float, outlier: str, num_real: int, num_fake: int, dim: int, seed: int, outlier_value: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Figure 3: X ~ N(0, I), Y ~ N(mu 1, I), one outlier added to the "real" or the "fake" set, or to "none".

    The text puts the outlier at the all-ones vector, the caption at 3; only 1.0 gives the drawn curves.
    """
    real, fake = identical("normal", num_real, num_fake, dim, seed)
    fake = fake + mu
    point = np.full((1, dim), outlier_value)
    if outlier == "real":
        real = np.concatenate([real, point])
    elif outlier == "fake":
        fake = np.concatenate([fake, point])
    return real, fake


def mode_counts(dropping: str, share: float, num_fake: int, redistribute: str = "equal") -> list[int]:
    """Fakes per mode when the first mode holds `share` of them (figure 4).

    "sequential" keeps floor(1 / share) modes: with equal shares, or ("first") with the dropped mass on the first mode.
    "simultaneous" shares the rest equally over the other nine.
    """
    if dropping == "simultaneous":
        first = round(share * num_fake)
        return [first, *_equal(num_fake - first, MODES - 1)]
    kept = int(1 / share + 1e-9)
    if redistribute == "first":
        each = num_fake // MODES
        return [num_fake - each * (kept - 1), *[each] * (kept - 1), *[0] * (MODES - kept)]
    return [*_equal(num_fake, kept), *[0] * (MODES - kept)]


def modes(counts: list[int], num_real: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten far modes, means N(0, 3^2 I), unit noise; reals share them equally, fakes as `counts` says."""
    rng = np.random.default_rng(seed)
    means = 3 * rng.standard_normal((MODES, dim))
    real = np.repeat(means, _equal(num_real, MODES), 0)
    fake = np.repeat(means, counts, 0)
    return real + rng.standard_normal(real.shape), fake + rng.standard_normal(fake.shape)


def _equal(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
