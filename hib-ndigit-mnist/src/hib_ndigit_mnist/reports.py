"""What a run reports: the metrics of its table, and the arrays for its figure (stored in the run log)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.evaluate import CONDITIONS, PAIR_TOLERANCE, Evaluation, class_centroids, component_distance, embed
from hib_ndigit_mnist.metrics import expected_calibration_error
from hib_ndigit_mnist.occlusion import OcclusionInfo, apply_occlusion

MAP_IMAGES = 60
STRIP_IMAGES = 24
SWEEP_IMAGES = 200
RMS_PAIRS, RMS_DRAWS = 500, 40

Report = tuple[dict[str, float], dict]


def verification(e: Evaluation) -> Report:
    """Table 1."""
    return e.verification() | e.identification(), dict(zip("ab", e.match.values(), strict=True))


def uncertainty(e: Evaluation) -> Report:
    """Table 2, with p-values and sigma."""
    return e.uncertainty() | e.spread(), {}


def mixture(e: Evaluation) -> Report:
    """Figure 1: one ambiguous image, among the class centroids of the clean images."""
    apart = component_distance(e.embeddings["corrupt"])
    number = int(apart.argmax())
    centroids, numbers = class_centroids(e.embeddings["clean"], e.test.labels)
    details: dict[str, Any] = {"label": int(e.test.labels[number])}
    details |= dict(zip("ab", e.match.values(), strict=True))
    details |= {"centroids": rounded(centroids), "numbers": numbers.tolist()}
    for condition in CONDITIONS:
        details[condition] = _gaussians(e.embeddings[condition][[number]])
        details[condition]["pixels"] = e.test.images[condition][number, 0].tolist()
    return e.spread(), details


def ellipses(e: Evaluation) -> Report:
    """Figures 3 and 8: the same images clean and corrupted, as Gaussians."""
    details: dict[str, Any] = {"labels": e.test.labels[:MAP_IMAGES].tolist()}
    for condition in CONDITIONS:
        details[condition] = _gaussians(e.embeddings[condition][:MAP_IMAGES])
        details[condition]["eta"] = rounded(e.eta[condition][:MAP_IMAGES])
    return e.spread(), details


def centroids(e: Evaluation) -> Report:
    """Figure 4."""
    where, numbers = class_centroids(e.embeddings["clean"], e.test.labels)
    return e.structure(), {"centroids": rounded(where), "numbers": numbers.tolist()}


def bins(e: Evaluation) -> Report:
    """Figure 5."""
    details = {}
    for condition in CONDITIONS:
        for task in ("ap", "knn"):
            tau = e.tau(condition, task)
            details[f"{task}_{condition}"] = {"eta": rounded(tau.bin_x, 4), "y": rounded(tau.bin_y, 4), "tau": tau.tau}
    return e.uncertainty(), details


def sweep(e: Evaluation) -> Report:
    """An occluder in the middle of every digit grows from nothing to the whole tile."""
    images = e.test.images["clean"][:SWEEP_IMAGES]
    tile, tiles = images.shape[2], images.shape[3] // images.shape[2]
    shown, mean_eta, mean_sigma = [], [], []
    for side in range(tile + 1):
        embedding = embed(e.encoder, apply_occlusion(images, _centred(side, tile, (len(images), tiles))))
        eta = e.match.self_mismatch(embedding, **e.options, tolerance=PAIR_TOLERANCE)
        mean_eta.append(float(eta.mean()))
        mean_sigma.append(float(embedding.variance().sqrt().mean()))
        shown.append(_gaussians(embedding[[0]]) | {"eta": round(float(eta[0]), 4)})
    trend = float(stats.spearmanr(range(tile + 1), mean_eta).statistic)
    growth = mean_sigma[3 * tile // 4] / mean_sigma[0]
    details: dict[str, Any] = {
        "one": shown,
        "eta": rounded(torch.tensor(mean_eta)),
        "sigma": rounded(torch.tensor(mean_sigma)),
    }
    details |= {"pixels": images[0, 0].tolist(), "label": int(e.test.labels[0])}
    return {"eta_trend": trend, "sigma_growth": growth, "ink": e.uncertainty()["ink"]}, details


def strip(e: Evaluation) -> Report:
    """Corrupted images from the most certain to the least."""
    order = e.eta["corrupt"].argsort()
    chosen = order[torch.linspace(0, len(order) - 1, STRIP_IMAGES).long()]
    info = e.test.occluders[chosen]
    details = {"pixels": e.test.images["corrupt"][chosen, 0].tolist(), "labels": e.test.labels[chosen].tolist()}
    details |= {"eta": rounded(e.eta["corrupt"][chosen])}
    details |= {name: getattr(info, name).tolist() for name in ("side", "top", "left")}
    metrics = e.uncertainty()
    return {name: metrics[name] for name in ("auc", "ink", "eta_clean", "eta_corrupt")}, details


def calibration(e: Evaluation) -> Report:
    """Reliability of p(m), with average precision."""
    details = {}
    for condition, p in e.pair_scores.items():
        curve = expected_calibration_error(p, e.test.pairs[2])
        filled = curve.weight > 0
        details[condition] = {
            name: rounded(getattr(curve, name)[filled], 4) for name in ("confidence", "frequency", "weight")
        }
    return e.calibration() | e.verification(), details


def divergence(e: Evaluation) -> Report:
    """Metrics of the sweep over beta."""
    return e.verification() | e.identification() | e.divergence() | e.spread(), {}


def hedging(e: Evaluation) -> Report:
    """How an objective or a beta changes sigma and eta."""
    return e.verification() | e.spread() | e.uncertainty(), {}


def estimator(e: Evaluation) -> Report:
    """The error of the K x K estimate against quadrature."""
    first, second, _ = (part[:: max(1, len(part) // RMS_PAIRS)] for part in e.test.pairs)
    embedding, generator = e.embeddings["corrupt"], e.draws()
    pair = embedding[first], embedding[second]
    exact = e.match.prob(*pair, method="quadrature", tolerance=PAIR_TOLERANCE)
    samples = e.options["samples"]
    draws = torch.stack([e.match.prob(*pair, samples=samples, generator=generator) for _ in range(RMS_DRAWS)])
    error = draws - exact
    metrics = {"rms_error": float(error.square().mean().sqrt()), "bias": float(error.mean())}
    return metrics, {"bias_standard_error": float(error.mean(0).std() / len(exact) ** 0.5)}


REPORTS: dict[str, Callable[[Evaluation], Report]] = {
    each.__name__: each
    for each in (
        verification, uncertainty, mixture, ellipses, centroids, bins, sweep, strip, calibration, divergence, hedging,
        estimator,
    )
}  # fmt: skip


def rounded(values: Tensor | np.ndarray, digits: int = 3) -> list:
    """Values as nested lists, rounded for the run log."""
    return torch.as_tensor(values).double().mul(10**digits).round().div(10**digits).tolist()


def _gaussians(embedding: GaussianMixtureEmbedding) -> dict[str, list]:
    return {"mu": rounded(embedding.mu), "sigma": rounded(embedding.variance().sqrt())}


def _centred(side: int, tile: int, shape: tuple[int, int]) -> OcclusionInfo:
    corner = torch.full(shape, (tile - side) // 2)
    return OcclusionInfo(torch.ones(shape, dtype=torch.bool), torch.full(shape, side), corner, corner)
