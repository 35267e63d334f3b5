"""Scores of section 4: average precision, nearest neighbours by match probability, tau of uncertainty, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor


def average_precision(match: Tensor, scores: Tensor) -> float:
    """Non-interpolated average precision; ties share a threshold, a constant score gives the positive rate.

    Args:
        match: (P,) bool.
        scores: (P,) floating point, higher for a more likely match.

    Raises:
        ValueError: no matching pair, NaN scores.
    """
    if not match.any():
        raise ValueError("match: average precision needs a matching pair, but there is none")
    _check_finite("scores", scores)
    return float(average_precision_score(match.cpu().numpy(), scores.cpu().numpy()))


def knn_predict(match_prob: Tensor, gallery_labels: Tensor, k: int | Tensor = 5, own: Tensor | None = None) -> Tensor:
    """Majority vote of the k gallery images with the highest match probability.

    Neighbour ties go to the lower gallery index; vote ties to the larger summed match probability, then to the smaller
    class.

    Args:
        match_prob: (Q, G).
        gallery_labels: (G,) integers.
        k: number of neighbours; one for all, or one per query (Q,).
        own: (Q,) gallery index of the query itself, which is excluded.

    Returns:
        (Q,) labels.

    Raises:
        ValueError: k outside 1 .. number of gallery images, NaN match probabilities.
    """
    _check_finite("match_prob", match_prob)
    available = match_prob.shape[1] - (own is not None)
    k = torch.as_tensor(k, device=match_prob.device).expand(len(match_prob))
    least, most = int(k.min()), int(k.max())
    if least < 1 or most > available:
        raise ValueError(f"k: expected 1 to {available} gallery images, got {least if least < 1 else most}")
    if own is not None:
        match_prob = match_prob.scatter(1, own[:, None], -1.0)
    scores, neighbours = match_prob.sort(dim=1, descending=True, stable=True)
    scores, neighbours = scores[:, :most], neighbours[:, :most]
    counted = (torch.arange(most, device=k.device) < k[:, None]).double()  # (Q, most)
    classes, which = gallery_labels.unique(return_inverse=True)
    votes = torch.zeros(len(scores), len(classes), dtype=torch.float64, device=scores.device)
    support = votes.scatter_add(1, which[neighbours], scores.double() * counted)
    votes = votes.scatter_add(1, which[neighbours], counted)
    support[votes < votes.amax(1, keepdim=True)] = -1
    return classes[support.argmax(1)]  # argmax takes the first: the smaller class


def count_partners(query_labels: Tensor, gallery_labels: Tensor, own: Tensor | None = None) -> Tensor:
    """(Q,) number of other gallery images of the query's class; without one, no vote can be right."""
    return (query_labels[:, None] == gallery_labels).sum(1) - (0 if own is None else 1)


def knn_accuracy(
    match_prob: Tensor, query_labels: Tensor, gallery_labels: Tensor, k: int = 5, own: Tensor | None = None
) -> float:
    """Share of correct votes among queries that have a partner in the gallery; arguments as in `knn_predict`.

    If a query has fewer than k partners, only that number of neighbours vote, as in R-precision: a perfect embedding
    scores 1, however small the classes.

    Raises:
        ValueError: no query has a partner, or as in `knn_predict`.
    """
    partners = count_partners(query_labels, gallery_labels, own)
    asked = partners > 0
    if not asked.any():
        raise ValueError("query_labels: no query has an image of its class in the gallery")
    right = knn_predict(match_prob, gallery_labels, partners.clamp(1, k), own) == query_labels
    return float(right[asked].double().mean())


class BinnedCorrelation(NamedTuple):
    """Kendall's tau between uncertainty and performance over bins, with the paper's sign: positive = worse if unsure.

    NaN if either is constant (print n/a, not 0).
    """

    tau: float
    bin_x: np.ndarray  # (bins,) mean uncertainty; fewer bins than requested if many values are equal
    bin_y: np.ndarray  # (bins,) performance
    p_value: float  # one-sided, by permutation of the bins
    dropped: int  # bins without a matching pair


def binned_correlation(
    uncertainty: Tensor,
    performance: Tensor,
    bins: int = 20,
    match: Tensor | None = None,
    permutations: int = 9999,
) -> BinnedCorrelation:
    """Minus tau-b between uncertainty and performance of bins of equal count, sorted by uncertainty.

    Equal uncertainties stay in one bin, so the order of the rows does not matter; ties wider than a bin result in
    fewer bins.

    Args:
        uncertainty: (n,) eta.
        performance: (n,) correctness, averaged per bin; if `match` is given, match scores: the performance of a bin is
            then its average precision.
        bins: number of bins.
        match: (n,) bool.
        permutations: number of permutations for the p-value.

    Raises:
        ValueError: fewer values than bins, different lengths, NaN.
    """
    if not len(uncertainty) == len(performance) >= bins:
        raise ValueError(f"expected at least {bins} values of each, got {len(uncertainty)}, {len(performance)}")
    _check_finite("uncertainty", uncertainty)
    _check_finite("performance", performance)
    eta = uncertainty.cpu().numpy()
    order = np.argsort(eta, kind="stable")
    borders = np.cumsum([len(part) for part in np.array_split(order, bins)])[:-1]
    borders = np.unique(np.searchsorted(eta[order], eta[order[borders - 1]], side="right"))  # after the tie
    parts = [part for part in np.split(order, borders) if len(part)]
    etas: list[float] = []
    performances: list[float] = []
    for part in parts:
        if match is not None and not match[part].any():
            continue
        values = performance[part]
        etas.append(float(uncertainty[part].double().mean()))
        performances.append(float(values.double().mean()) if match is None else average_precision(match[part], values))
    x, y = np.array(etas), np.array(performances)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return BinnedCorrelation(float("nan"), x, y, float("nan"), len(parts) - len(x))
    return BinnedCorrelation(
        -float(stats.kendalltau(x, y).statistic), x, y, _p_value(x, y, permutations), len(parts) - len(x)
    )


def _p_value(x: np.ndarray, y: np.ndarray, permutations: int) -> float:
    """Probability of a sum of concordances at least as negative under a random assignment of bins."""
    sign_x, sign_y = (np.sign(v[:, None] - v) for v in (x, y))
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(np.arange(len(x)), (permutations, 1)), axis=1)  # (R, n)
    sums = np.einsum("ij,rij->r", sign_x, sign_y[shuffled[:, :, None], shuffled[:, None]])
    return float((1 + (sums <= (sign_x * sign_y).sum()).sum()) / (1 + permutations))


# ---- as in the URL benchmark of transferable uncertainty (arXiv 2307.03810) ----


def recall_at_1(features: Tensor, labels: Tensor) -> Tensor:
    """Whether each image's nearest other image by cosine is of the same class: (n, D), (n,) -> (n,) bool.

    Its mean is R@1. An image without a partner counts as wrong, as in that benchmark.
    """
    _check_finite("features", features)
    unit = torch.nn.functional.normalize(features, dim=-1)
    nearest = torch.cat([(part @ unit.T).scatter(1, own[:, None], -2.0).argmax(1) for part, own in _parts(unit)])
    itself = torch.arange(len(unit), device=unit.device)
    return (labels[nearest] == labels) & (nearest != itself)  # a single image has no other


def _parts(unit: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    index = torch.arange(len(unit), device=unit.device)
    return zip(unit.split(1024), index.split(1024), strict=True)


def r_auroc(uncertainty: Tensor, correct: Tensor) -> float:
    """R-AUROC: how well a low uncertainty (n,) predicts that R@1 is right (n,); 0.5 is chance, NaN without both."""
    _check_finite("uncertainty", uncertainty)
    if correct.bool().all() or not correct.any():
        return float("nan")
    return float(roc_auc_score(correct.bool().cpu().numpy(), -uncertainty.cpu().numpy()))


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """How well the uncertainty separates outside images (m,) from those of the training distribution (n,)."""
    both = torch.cat([inside, outside])
    _check_finite("uncertainty", both)
    return float(roc_auc_score((torch.arange(len(both)) >= len(inside)).numpy(), both.cpu().numpy()))


def accuracy_rejection_area(uncertainty: Tensor, correct: Tensor) -> float:
    """Area under the accuracy-rejection curve: mean accuracy over the k most certain images, k = 1 .. n.

    1 for a perfect model, and the accuracy for a constant, uninformative uncertainty (ties count as if in random
    order).
    """
    if len(uncertainty) != len(correct) or not len(correct):
        raise ValueError(f"expected equally many uncertainties and outcomes, got {len(uncertainty)}, {len(correct)}")
    _check_finite("uncertainty", uncertainty)
    _, which, counts = uncertainty.unique(return_inverse=True, return_counts=True)  # sorted
    right = torch.zeros(len(counts), dtype=torch.float64, device=correct.device).index_add_(0, which, correct.double())
    expected = (right / counts).repeat_interleave(counts)
    return float((expected.cumsum(0) / torch.arange(1, len(expected) + 1, device=expected.device)).mean())


class Calibration(NamedTuple):
    """Reliability of p(m) in equal-width bins; empty bins have NaN and weight 0."""

    error: float  # expected calibration error
    confidence: np.ndarray  # (bins,) mean p(m)
    frequency: np.ndarray  # (bins,) share of matches
    weight: np.ndarray  # (bins,) share of pairs


def expected_calibration_error(match_prob: Tensor, match: Tensor, bins: int = 15) -> Calibration:
    """Weighted mean of |share of matches - mean p(m)| over equal-width bins of p(m) in [0, 1].

    Args:
        match_prob: (P,) in [0, 1].
        match: (P,) bool.
        bins: number of bins.

    Raises:
        ValueError: probabilities outside [0, 1] or NaN.
    """
    p, truth = match_prob.double().cpu().numpy(), match.double().cpu().numpy()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"match_prob: expected values in [0, 1], got {p.min():g} to {p.max():g}")
    which = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, p, bins) / count
        frequency = np.bincount(which, truth, bins) / count
    weight = count / len(p)
    gap = np.nan_to_num(np.abs(confidence - frequency))
    return Calibration(float((weight * gap).sum()), confidence, frequency, weight)


def _check_finite(name: str, values: Tensor) -> None:
    wrong = values.isnan().sum()
    if wrong:
        raise ValueError(f"{name}: expected numbers, but {int(wrong)} of {values.numel()} are NaN")
