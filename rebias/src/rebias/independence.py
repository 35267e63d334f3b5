"""Hilbert-Schmidt independence criterion between two sets of features, in O(m^2) (section 3.2 of the paper).

Everything is computed in float32 or float64, whatever autocast says: HSIC is a small difference of large sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pdist

SIGMA_FLOOR = 1e-6  # constant features have a median distance of zero
MIN_BATCH = {"unbiased": 4, "biased": 2}


def rbf_gram(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Gram matrix of the RBF kernel k(a, b) = exp(-|a - b|^2 / (2 sigma^2)).

    Args:
        x: (m, ...) floating, flattened to (m, d).
        sigma: bandwidth, > 0.

    Returns:
        (m, m) float32, or float64 if x is float64; the diagonal is exactly 1.

    Raises:
        ValueError: m = 0, sigma <= 0, or NaN or infinity in x (of tensors only on the CPU, where a check costs no
            synchronisation).
        TypeError: x is not floating.
    """
    if not (isinstance(sigma, Tensor) and sigma.is_cuda) and not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    return torch.exp(squared_distances(x) / (-2 * sigma**2))


def squared_distances(x: Tensor) -> Tensor:
    """|a - b|^2 of all pairs of rows: (m, ...) -> (m, m), zero on the diagonal, never negative."""
    x = _as_matrix(x)
    with torch.autocast(x.device.type, enabled=False):
        x = x - x.mean(0)  # keeps distances, and keeps the squares below small
        norms = x.square().sum(1)
        distances = norms[:, None] + norms - 2 * x @ x.T
    return distances.clamp_min(0).masked_fill(_diagonal(x), 0)


def gram_hsic(k: Tensor, l: Tensor, estimator: str = "unbiased") -> Tensor:  # noqa: E741
    """HSIC from the Gram matrices of any two kernels.

    unbiased (Song et al. 2012), K~ and L~ being K and L with a zero diagonal:
    [tr(K~L~) + (1'K~1)(1'L~1) / ((m-1)(m-2)) - 2/(m-2) 1'K~L~1] / (m(m-3)); may be negative.
    biased (Gretton et al. 2005): tr(KHLH) / (m-1)^2 with H = I - 11'/m; never negative.

    Args:
        k: (m, m) symmetric.
        l: (m, m) symmetric.
        estimator: "unbiased" (m >= 4) or "biased" (m >= 2).

    Returns:
        0-d tensor.

    Raises:
        ValueError: unknown estimator, different sizes, or too few samples.
    """
    if estimator not in MIN_BATCH:
        raise ValueError(f"estimator must be one of {', '.join(MIN_BATCH)}, got {estimator!r}")
    m = len(k)
    if len(l) != m:
        raise ValueError(f"x and y must hold the same number of samples, got {m} and {len(l)}")
    if m < MIN_BATCH[estimator]:
        raise ValueError(f"the {estimator} estimator needs at least {MIN_BATCH[estimator]} samples, got {m}")
    if estimator == "biased":
        centred = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()  # HKH
        return (centred * l).sum() / (m - 1) ** 2
    diagonal = _diagonal(k)
    k, l = k.masked_fill(diagonal, 0), l.masked_fill(diagonal, 0)  # noqa: E741
    k_sums, l_sums = k.sum(0), l.sum(0)  # (m,): K~ and L~ are symmetric, so 1'K~L~1 = k_sums . l_sums
    cross = (k_sums * l_sums).sum()
    product = k_sums.sum() * l_sums.sum() / ((m - 1) * (m - 2))
    return ((k * l).sum() + product - 2 / (m - 2) * cross) / (m * (m - 3))


def hsic(
    x: Tensor,
    y: Tensor,
    sigma_x: float | Tensor = 1.0,
    sigma_y: float | Tensor | None = None,
    estimator: str = "unbiased",
) -> Tensor:
    """HSIC of two batches of features under RBF kernels (equation of section 3.2; Song et al. 2012).

    Args:
        x: (m, ...) floating features, flattened to (m, d).
        y: (m, ...) floating features of the same samples; d may differ.
        sigma_x: bandwidth of x.
        sigma_y: bandwidth of y; default: that of x.
        estimator: "unbiased" (m >= 4) or "biased" (m >= 2).

    Returns:
        0-d float32 (float64 if x or y is), differentiable in both.

    Raises:
        ValueError: different batch sizes, too few samples, sigma <= 0, an unknown estimator, NaN on the CPU.
        TypeError: integer features.
    """
    return gram_hsic(rbf_gram(x, sigma_x), rbf_gram(y, sigma_x if sigma_y is None else sigma_y), estimator)


def conditional_hsic(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    sigma_x: float | Tensor = 1.0,
    sigma_y: float | Tensor | None = None,
    estimator: str = "unbiased",
) -> Tensor:
    """Mean of HSIC within the classes that have enough samples (the first arXiv version's "separation").

    Args:
        x: as in `hsic`.
        y: as in `hsic`.
        labels: (m,) integer classes; those with fewer samples than the estimator needs are left out.
        sigma_x: as in `hsic`.
        sigma_y: as in `hsic`.
        estimator: as in `hsic`.

    Raises:
        ValueError: as `hsic`, or when no class is large enough.
    """
    if not len(labels) == len(x) == len(y):
        raise ValueError(f"x, y and labels must hold the same samples, got {len(x)}, {len(y)} and {len(labels)}")
    k, l = rbf_gram(x, sigma_x), rbf_gram(y, sigma_x if sigma_y is None else sigma_y)  # noqa: E741
    needed = MIN_BATCH.get(estimator, 4)
    groups = [members for label in labels.unique() if len(members := (labels == label).nonzero()[:, 0]) >= needed]
    if not groups:
        raise ValueError(f"no class has the {needed} samples that HSIC within classes needs")
    return torch.stack([gram_hsic(k[i][:, i], l[i][:, i], estimator) for i in groups]).mean()


@torch.no_grad()
def median_sigma(
    features: Tensor | Sequence[Tensor], *, include_diagonal: bool = True, floor: float = SIGMA_FLOOR
) -> Tensor:
    """Bandwidth sqrt(median of the squared distances within batches).

    Args:
        features: (m, ...) one batch, or several; distances are taken within each and pooled.
        include_diagonal: count the zero distance of every sample to itself, as the reference does.
        floor: smallest value returned (constant features).

    Returns:
        0-d tensor on the features' device; nothing is synchronised.

    Raises:
        ValueError: no pair of samples, or NaN on the CPU.
    """
    batches = [features] if isinstance(features, Tensor) else list(features)
    if not batches or any(len(batch) < 2 for batch in batches):
        raise ValueError("a median distance needs batches of at least 2 samples")
    distances = []
    for batch in map(_as_matrix, batches):
        pairs = pdist(batch).square()  # each pair once, by differences: also exact for near-copies
        distances += [batch.new_zeros(len(batch)), pairs, pairs] if include_diagonal else [pairs]
    return torch.cat(distances).quantile(0.5).sqrt().clamp_min(floor)


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Root mean square distance between the rows of (m, ...) features, 0-d."""
    x = _as_matrix(features)
    return (2 * (x - x.mean(0)).square().sum(1).mean()).sqrt()


def dimension_sigma(features: Tensor) -> float:
    """Bandwidth sqrt(d) of (m, ...) features with d numbers each."""
    return math.sqrt(features[0].numel())


def _as_matrix(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"features must be floating, got {x.dtype}")
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"features are (m, ...) with m >= 1, got {tuple(x.shape)}")
    if x.device.type == "cpu" and not x.isfinite().all():
        raise ValueError("features contain NaN or infinity")
    x = x.reshape(len(x), -1)
    return x if x.dtype == torch.float64 else x.float()


def _diagonal(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=torch.bool, device=x.device)
