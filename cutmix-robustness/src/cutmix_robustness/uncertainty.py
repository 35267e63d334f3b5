"""Calibration of the confidence, and out-of-distribution detection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from cutmix_robustness.attacks import input_gradient

TPR = 0.95
ROUNDING = 1e-5  # how far a mean of float32 probabilities may leave [0, 1]
ODIN_TEMPERATURE, ODIN_STEP = 1000.0, 0.0014


def confidence(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Largest softmax probability and its class, (N,) each, in float64: half precision would tie at 1.0."""
    top, label = torch.softmax(logits.double(), 1).max(1)
    return top.cpu().numpy(), label.cpu().numpy()


def confidence_bins(conf: np.ndarray, bins: int) -> np.ndarray:
    """Bin (k / bins, (k + 1) / bins] of each confidence; 0 belongs to the first, 1 to the last."""
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, conf, side="left") - 1, 0, bins - 1)


def calibration_error(conf: np.ndarray, correct: np.ndarray, bins: int = 15, norm: str = "l1") -> float:
    """Expected (l1), root mean square (l2) or maximum (max) calibration error over equal-width bins.

    Args:
        conf: (N,) confidence of the predicted class, in [0, 1].
        correct: (N,) whether the prediction is right.
        bins: number of bins; 15, or 20 as in the tables of 2003.03879.
        norm: how the gaps between confidence and accuracy are summed.

    Raises:
        ValueError: empty input, NaN or confidences outside [0, 1], different lengths, an unknown norm.
    """
    conf, correct = _checked(conf, correct)
    index = confidence_bins(conf, bins)
    count = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, conf, bins) - np.bincount(index, correct, bins))
    gap = gap[count > 0] / count[count > 0]
    return _norm(gap, count[count > 0] / len(conf), norm)


def adaptive_calibration_error(conf: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass (stable order among ties)."""
    conf, correct = _checked(conf, correct)
    groups = [group for group in np.array_split(np.argsort(conf, kind="stable"), bins) if len(group)]
    gap = np.array([abs(conf[group].mean() - correct[group].mean()) for group in groups])
    return _norm(gap, np.array([len(group) for group in groups]) / len(conf), "l1")


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """All calibration metrics of (N, K) logits and (N,) labels: errors and confidence in %, NLL and Brier plain."""
    probabilities = torch.softmax(logits.double(), 1)
    conf, predicted = confidence(logits)
    correct = predicted == labels.cpu().numpy()
    nll = torch.nn.functional.cross_entropy(logits.double(), labels)
    target = torch.nn.functional.one_hot(labels, logits.shape[1])
    return {
        "ece": 100 * calibration_error(conf, correct, 15),
        "ece20": 100 * calibration_error(conf, correct, 20),
        "max_calibration_error": 100 * calibration_error(conf, correct, 15, "max"),
        "adaptive_ece": 100 * adaptive_calibration_error(conf, correct),
        "nll": nll.item(),
        "brier": (probabilities - target).square().sum(1).mean().item(),
        "mean_confidence": 100 * float(conf.mean()),
    }


def temperature(logits: Tensor, labels: Tensor) -> float:
    """T in [e^-5, e^5] that minimises the NLL of logits / T (Guo et al. 2017), of (N, K) logits and (N,) labels.

    Raises:
        ValueError: no logits, or some that are not finite.
    """
    logits, labels = logits.double().cpu(), labels.cpu()
    if not len(logits) or not logits.isfinite().all():
        raise ValueError("logits must be (N, K), N > 0, and finite")

    def nll(log_t: float) -> float:
        return torch.nn.functional.cross_entropy(logits / float(np.exp(log_t)), labels).item()

    return float(np.exp(minimize_scalar(nll, bounds=(-5, 5), method="bounded").x))


def ood_scores(logits: Tensor) -> dict[str, np.ndarray]:
    """Scores (N,) of (N, K) logits, higher for known inputs: largest softmax probability, energy, largest logit."""
    logits = logits.double().cpu()
    energy, largest = torch.logsumexp(logits, 1), logits.amax(1)
    return {"msp": confidence(logits)[0], "energy": energy.numpy(), "max_logit": largest.numpy()}


def odin_scores(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """ODIN (Liang et al. 2018): largest softmax probability at temperature 1000 after a step of 0.0014 towards it.

    Temperature and step are its authors' for CIFAR and are not tuned: tuning would need out-of-distribution inputs.

    Args:
        model: images in [0, 1] to logits, in evaluation mode.
        images: (N, 3, H, W) float in [0, 1].

    Returns:
        (N,) float64, higher for known inputs.
    """
    with torch.no_grad():
        predicted = model(images).argmax(1)
    gradient = input_gradient(model, images, predicted, ODIN_TEMPERATURE)
    with torch.no_grad():
        logits = model(images - ODIN_STEP * gradient.sign()).double()
    return torch.softmax(logits / ODIN_TEMPERATURE, 1).amax(1)


def mahalanobis_scores(train: np.ndarray, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Minus the squared Mahalanobis distance to the nearest class mean, one covariance for all (Lee et al. 2018).

    Args:
        train: (N, D) features of training images.
        labels: (N,) their classes, any integers.
        features: (M, D) features of the images to score.

    Returns:
        (M,) float64, higher for known inputs.
    """
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([train[index == number].mean(0, dtype=np.float64) for number in range(len(classes))])
    scatter = EmpiricalCovariance(assume_centered=True).fit(train - means[index])
    return -np.min([scatter.mahalanobis(features - mean) for mean in means], axis=0)


def ood_metrics(score_in: np.ndarray, score_out: np.ndarray) -> dict[str, float]:
    """How well a score separates known inputs (positive, higher) from unknown ones (appendix E of 1905.04899).

    Args:
        score_in: (N,) scores of known inputs.
        score_out: (M,) scores of unknown ones.

    Returns:
        Fractions: `auroc` (ties count half), `tnr95` at the largest threshold of a true positive rate >= 95 %,
        `detection_accuracy` = max over thresholds of (TPR + TNR) / 2, `aupr_in`, `aupr_out`.

    Raises:
        ValueError: an empty array, or NaN.
    """
    score_in, score_out = np.asarray(score_in, float).ravel(), np.asarray(score_out, float).ravel()
    for name, score in (("score_in", score_in), ("score_out", score_out)):
        if len(score) == 0 or np.isnan(score).any():
            raise ValueError(f"{name} must hold at least one score and no NaN, got {len(score)} scores")
    scores = np.concatenate([score_in, score_out])
    ranks = np.unique(scores, return_inverse=True)[1]  # the metrics depend on order alone: infinite scores are fine
    known = np.arange(len(scores)) < len(score_in)
    fpr, tpr, _ = roc_curve(known, ranks, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(known, ranks)),
        "tnr95": float(1 - fpr[np.argmax(tpr >= TPR)]),
        "detection_accuracy": float(((tpr + 1 - fpr) / 2).max()),
        "aupr_in": float(average_precision_score(known, ranks)),
        "aupr_out": float(average_precision_score(~known, -ranks)),
    }


def _checked(conf: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    conf, correct = np.asarray(conf, float), np.asarray(correct, float)
    if conf.ndim != 1 or conf.shape != correct.shape or len(conf) == 0:
        raise ValueError(f"conf and correct must be (N,), N > 0, got shapes {conf.shape} and {correct.shape}")
    if not ((conf >= -ROUNDING) & (conf <= 1 + ROUNDING)).all():
        raise ValueError("conf must lie in [0, 1] and contain no NaN")
    return conf.clip(0, 1), correct


def _norm(gap: np.ndarray, weight: np.ndarray, norm: str) -> float:
    if norm == "max":
        return float(gap.max())
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be l1, l2 or max, got {norm!r}")
    return float((weight * gap).sum()) if norm == "l1" else float(np.sqrt((weight * gap**2).sum()))
