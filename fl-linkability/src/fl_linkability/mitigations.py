"""What devices do so that their updates reveal less about them (section 7), and what the server can do.

A mitigation has up to three parts: `prepare_data` changes what a device trains on, `transform_update` what it sends,
`aggregate` how the server averages. `who` says which devices take part: "anon" (as in the paper: only the anonymous
devices; the adversary's shadow devices do not mitigate) or "both".

Differential privacy depends on who observes. `LocalDP` hides an update from the server: neighbours are any two updates
that a device might send, which after clipping to C lie at most 2C apart. `CentralDP` hides a device from those who see
only the model: neighbours are the same round with and without one device's clipped update in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fl_linkability import privacy
from fl_linkability.data.bundle import Rows, task_of
from fl_linkability.styles import apply_styles, random_styles

KINDS = ("repl", "random", "cluster", "calibrated", "adversarial")


class Mitigation:
    """Base class of all mitigations; does nothing.

    Args:
        who: "anon" or "both".
        refresh: "fixed" (data are drawn once per device) or "round" (drawn again in every round).
    """

    def __init__(self, who: str = "anon", refresh: str = "fixed"):
        _one_of("who", who, ("anon", "both"))
        _one_of("refresh", refresh, ("fixed", "round"))
        self.who, self.refresh = who, refresh

    def prepare_data(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The device's training data, (n, ...) and (n,) or (n, labels), before a round."""
        return x, y

    def transform_update(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What is sent instead of the update, float32 (D,)."""
        return delta

    def aggregate(self, deltas: np.ndarray, n_examples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The server's mean of (K, D) updates, float64 (D,): by examples, as federated averaging does."""
        return weighted_mean(deltas, n_examples)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that a device adds to each weight of its update."""
        return 0.0

    def epsilon_of(self, releases: int) -> float:
        """Epsilon towards the server of a device that answers this often; infinite without a mechanism."""
        return math.inf

    def model_epsilon_of(self, releases: int) -> float:
        """The same towards those who see only the model; what is hidden from the server is hidden from them too."""
        return self.epsilon_of(releases)


def weighted_mean(deltas: np.ndarray, n_examples: np.ndarray) -> np.ndarray:
    """FedAvg: sum of n_k / n times update k, in float64, in the order of the rows."""
    weights = np.asarray(n_examples, dtype=np.float64)
    return weights @ np.asarray(deltas, dtype=np.float64) / weights.sum()


# ---- the paper's four (section 7.1) and further choices of background data ------------------------------------


class Background(Mitigation):
    """Train on background data as well.

    Args:
        x: background samples (n, ...).
        y: their labels, (n,) classes or (n, labels).
        kind: repl (a share of the device's own data is replaced), random (ratio * n_k samples are added), cluster
            (mm-aug: all added samples from one cluster that the device draws once), calibrated (added so that the
            classes become as even as possible), adversarial (added with class shares of a Dirichlet(0.5) draw).
        ratio: a, relative to the device's own data.
        cluster: (n,) mode of each sample, for kind "cluster".

    Raises:
        ValueError: unknown kind, negative ratio, replacing more than all data, no samples, another number of labels, no
            clusters, or a kind that needs one class per sample on other data.
    """

    def __init__(
        self, x: Tensor | Rows, y: Tensor, kind: str, ratio: float, cluster: np.ndarray | None = None,
        who: str = "anon", refresh: str = "fixed",
    ):  # fmt: skip
        super().__init__(who, refresh)
        _one_of("kind", kind, KINDS)
        if not 0 <= ratio < math.inf or (kind == "repl" and ratio > 1):
            raise ValueError(f"ratio must lie in [0, {'1]' if kind == 'repl' else 'inf)'}, got {ratio}")
        if len(x) == 0:
            raise ValueError("the background is empty")
        if len(x) != len(y):
            raise ValueError(f"the background needs as many labels as samples, got {len(y)} for {len(x)}")
        if kind == "cluster" and (cluster is None or len(cluster) != len(x)):
            raise ValueError(f"kind 'cluster' needs the cluster of each of the {len(x)} background samples")
        if kind in ("calibrated", "adversarial"):
            if (task := task_of(y)) != "class":
                raise ValueError(f"kind {kind!r} needs one class per sample, but the background has {task}")
            self.by_class = [np.flatnonzero(y.numpy() == c) for c in range(int(y.max()) + 1)]
        self.x, self.y, self.kind, self.ratio, self.cluster = x, y, kind, ratio, cluster

    def prepare_data(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        n = round(self.ratio * len(x))
        if n == 0:
            return x, y
        rows = torch.from_numpy(self._rows(n, y, rng))
        if self.kind == "repl":
            kept = torch.from_numpy(np.sort(rng.permutation(len(x))[n:]))
            x, y = x[kept], y[kept]
        return torch.cat([x, self.x[rows].to(x.device)]), torch.cat([y, self.y[rows].to(y.device)])

    def _rows(self, n: int, y: Tensor, rng: np.random.Generator) -> np.ndarray:
        if self.kind in ("repl", "random"):
            return rng.integers(0, len(self.x), n)
        if self.kind == "cluster" and self.cluster is not None:
            members = np.flatnonzero(self.cluster == rng.choice(np.unique(self.cluster)))
            return rng.choice(members, n)
        available = np.array([len(rows) > 0 for rows in self.by_class])
        if self.kind == "adversarial":
            shares = np.where(available, rng.dirichlet([0.5] * len(self.by_class)), 0)
            classes = rng.choice(len(self.by_class), n, p=shares / shares.sum())
        else:
            counts = np.bincount(y.cpu().numpy(), minlength=len(self.by_class))
            counts = np.where(available, counts[: len(available)], np.iinfo(np.int64).max // 2)
            classes = np.repeat(np.arange(len(counts)), water_filling(counts, n))
        return np.array([self.by_class[c][rng.integers(len(self.by_class[c]))] for c in classes])


def water_filling(counts: Sequence[int] | np.ndarray, m: int) -> np.ndarray:
    """How many samples each class gets if the smallest class gets one more, m times (ties: the lowest class)."""
    held = np.array(counts, dtype=np.int64)
    added = np.zeros_like(held)
    for _ in range(m):
        added[np.argmin(held + added)] += 1
    return added


class GaussianNoise(Mitigation):
    """Add N(0, std^2) to every weight of the update (`noise`)."""

    def __init__(self, std: float, who: str = "anon"):
        super().__init__(who)
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be finite and not negative, got {std}")
        self.std = std

    @property
    def noise_std(self) -> float:
        return self.std

    def transform_update(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return delta + np.float32(self.std) * rng.standard_normal(len(delta), dtype=np.float32)


# ---- ours ---------------------------------------------------------------------------------------------------


class StyleJitter(Mitigation):
    """Redraw each image of the device in a random style, a new one in every round."""

    def __init__(self, who: str = "anon"):
        super().__init__(who, "round")

    def prepare_data(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"style jitter needs grey images (n, 1, H, W), got {tuple(x.shape)}")
        return apply_styles(x.cpu(), random_styles(len(x), rng), rng).to(x.device), y


class Clip(Mitigation):
    """Scale the update to at most this norm."""

    def __init__(self, norm: float, who: str = "anon"):
        super().__init__(who)
        privacy.clip(np.zeros(1), norm)  # checks the norm
        self.norm = norm

    def transform_update(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return privacy.clip(delta, self.norm)


class LocalDP(Mitigation):
    """Clip to C, then the analytic Gaussian mechanism for one round's (epsilon, delta); the sensitivity is 2C."""

    def __init__(self, norm: float, epsilon: float, delta: float = 1e-5, who: str = "anon"):
        super().__init__(who)
        privacy.clip(np.zeros(1), norm)
        self.norm, self.epsilon, self.delta = norm, epsilon, delta
        self.sigma = privacy.gaussian_sigma(epsilon, delta, sensitivity=2 * norm)

    @property
    def noise_std(self) -> float:
        return self.sigma

    def transform_update(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = rng.standard_normal(len(delta), dtype=np.float32)
        return privacy.clip(delta, self.norm) + np.float32(self.sigma) * noise

    def epsilon_of(self, releases: int) -> float:
        """Epsilon of all its answers together; one round's epsilon is not the budget."""
        return privacy.gaussian_epsilon(self.sigma / (2 * self.norm), releases, self.delta)


class CentralDP(Mitigation):
    """The server clips updates and adds noise to the mean: no protection against the server, which has raw updates."""

    def __init__(self, norm: float, noise_multiplier: float, delta: float = 1e-5):
        super().__init__("both")
        privacy.clip(np.zeros(1), norm)
        if not noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must not be negative, got {noise_multiplier}")
        self.norm, self.noise_multiplier, self.delta = norm, noise_multiplier, delta

    def aggregate(self, deltas: np.ndarray, n_examples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mean = np.mean([privacy.clip(delta, self.norm).astype(np.float64) for delta in deltas], axis=0)
        return mean + self.sigma_of_mean(len(deltas)) * rng.standard_normal(len(mean))

    def sigma_of_mean(self, n_clients: int) -> float:
        """Standard deviation of the noise on the mean: that of the sum, divided by the clients of the round."""
        return self.noise_multiplier * self.norm / n_clients

    def model_epsilon_of(self, releases: int) -> float:
        return privacy.gaussian_epsilon(self.noise_multiplier, releases, self.delta)


class Compose(Mitigation):
    """Mitigations applied in order, all with the same `who`; the last with its own `aggregate` does the averaging."""

    def __init__(self, *parts: Mitigation):
        if len({part.who for part in parts}) != 1:
            raise ValueError("composed mitigations must have the same who")
        super().__init__(parts[0].who, "round" if any(part.refresh == "round" for part in parts) else "fixed")
        self.parts = parts

    def prepare_data(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            x, y = part.prepare_data(x, y, rng)
        return x, y

    def transform_update(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for part in self.parts:
            delta = part.transform_update(delta, rng)
        return delta

    @property
    def noise_std(self) -> float:
        """Independent noise adds up; clipping after the noise is not taken into account."""
        return math.hypot(*(part.noise_std for part in self.parts))

    def epsilon_of(self, releases: int) -> float:
        """The smallest of the parts': what follows a mechanism sees only its output."""
        return min(part.epsilon_of(releases) for part in self.parts)

    def model_epsilon_of(self, releases: int) -> float:
        return min(part.model_epsilon_of(releases) for part in self.parts)

    def aggregate(self, deltas: np.ndarray, n_examples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        own = [part for part in self.parts if type(part).aggregate is not Mitigation.aggregate]
        return (own[-1].aggregate if own else super().aggregate)(deltas, n_examples, rng)


def group_sums(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What secure aggregation leaves the adversary: the sum of each group's updates, (n_groups, D)."""
    sums = np.zeros((int(groups.max()) + 1, features.shape[1]))
    np.add.at(sums, groups, features)
    return sums


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
