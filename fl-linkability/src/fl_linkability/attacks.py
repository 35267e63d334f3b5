"""Who sent this update? Were these two sent by the same user?

An attack sees only features, never the device or user id of what it scores.

`paper-*` are the paper's attacks (section 5.2); the others are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC

from fl_linkability.features import cosine, device_means, unit
from fl_linkability.neural_attacks import Pairs, mlp_probabilities, product_of_probabilities, siamese

Attack = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def identify(
    aux: np.ndarray, aux_labels: np.ndarray, probe: np.ndarray, attack: str = "paper-mlp", seed: int = 0
) -> np.ndarray:
    """Score every known user for every probe.

    Args:
        aux: (n_aux, d) features of updates whose sender is known.
        aux_labels: (n_aux,) sender, 0 .. n_known - 1, each at least once.
        probe: (n_probe, d).
        attack: one of IDENTIFY.
        seed: for attacks that use random numbers.

    Returns:
        float64 (n_probe, n_known), higher means more likely.

    Raises:
        ValueError: unknown attack, mismatched shapes, missing labels, non-finite features.
    """
    if attack not in IDENTIFY:
        raise ValueError(f"attack must be one of {', '.join(IDENTIFY)}, got {attack!r}")
    aux, probe, aux_labels = np.asarray(aux), np.asarray(probe), np.asarray(aux_labels)
    if aux.ndim != 2 or probe.ndim != 2 or aux.shape[1] != probe.shape[1] or len(aux) != len(aux_labels):
        raise ValueError(f"aux (n, d), labels (n,) and probe (m, d) needed: {aux.shape, aux_labels.shape, probe.shape}")
    if len(aux) == 0 or len(np.unique(aux_labels)) != aux_labels.max() + 1 or aux_labels.min() < 0:
        raise ValueError("aux_labels must contain each of 0 .. n_known - 1")
    if not (np.isfinite(aux).all() and np.isfinite(probe).all()):
        raise ValueError("features must be finite")
    if aux_labels.max() == 0:
        return np.ones((len(probe), 1))
    return IDENTIFY[attack](aux, aux_labels, probe, seed)


def _nearest(k: int) -> Attack:
    def attack(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
        return KNeighborsClassifier(min(k, len(aux))).fit(aux, labels).predict_proba(probe)

    return attack


def _svm(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    scores = LinearSVC(C=1.0, random_state=seed).fit(aux, labels).decision_function(probe)
    return scores if scores.ndim == 2 else np.stack([-scores, scores], 1)


def _svm_votes(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    scores = _svm(aux, labels, probe, seed)
    return (scores == scores.max(1, keepdims=True)).astype(float)


def _paper_mlp(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    return mlp_probabilities(aux, labels, int(labels.max()) + 1, seed)(probe)


def _centroid(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    return cosine(probe, device_means(unit(aux), labels)[0])


def _logistic_regression(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    """Fitted on up to 96 principal components of the known updates, all scaled by one factor."""
    pca = PCA(min(96, len(aux) - 1, aux.shape[1]), random_state=seed).fit(aux)
    known, unknown = pca.transform(aux), pca.transform(probe)
    scale = np.sqrt((known**2).mean()) or 1.0
    model = LogisticRegression(C=1.0, max_iter=200).fit(known / scale, labels)
    scores = model.decision_function(unknown / scale)
    return scores if scores.ndim == 2 else np.stack([-scores, scores], 1)


def _mlp(aux: np.ndarray, labels: np.ndarray, probe: np.ndarray, seed: int) -> np.ndarray:
    """Adam, with early stopping on part of the known updates."""
    model = MLPClassifier((128,), early_stopping=True, n_iter_no_change=20, max_iter=300, random_state=seed)
    return model.fit(aux * np.sqrt(aux.shape[1]), labels).predict_proba(probe * np.sqrt(aux.shape[1]))


IDENTIFY: dict[str, Attack] = {
    "paper-knn": _nearest(10),
    "paper-svm": _svm,
    "paper-svm-votes": _svm_votes,
    "paper-mlp": _paper_mlp,
    "chance": lambda aux, labels, probe, seed: np.ones((len(probe), int(labels.max()) + 1)),
    "centroid": _centroid,
    "knn-1": _nearest(1),
    "knn-5": _nearest(5),
    "logreg": _logistic_regression,
    "mlp": _mlp,
}
MATCH = ("paper-mlp", "paper-siamese", "cosine", "chance")


def pair_scorer(attack: str, aux: np.ndarray, aux_labels: np.ndarray, seed: int = 0) -> Pairs:
    """Train a matching attack on updates whose sender is known.

    Args:
        attack: one of MATCH.
        aux: (n, d) features.
        aux_labels: (n,) sender, 0 .. n_known - 1.
        seed: for attacks that use random numbers.

    Returns:
        a function from features of pairs, (m, d) and (m, d), to scores (m,).
    """
    if attack == "paper-mlp":
        return product_of_probabilities(mlp_probabilities(aux, aux_labels, int(aux_labels.max()) + 1, seed))
    if attack == "paper-siamese":
        return siamese(aux, aux_labels, seed)
    if attack == "cosine":
        return lambda a, b: (unit(a) * unit(b)).sum(1)
    if attack == "chance":
        rng = np.random.default_rng(seed)
        return lambda a, b: rng.random(len(a))
    raise ValueError(f"attack must be one of {', '.join(MATCH)}, got {attack!r}")


def match(
    a: np.ndarray, b: np.ndarray, attack: str = "cosine", aux: np.ndarray | None = None,
    aux_labels: np.ndarray | None = None, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Scores of all pairs, (n_a, n_b); attacks other than cosine and chance learn from aux. See `pair_scorer`.

    Raises:
        ValueError: features that are not finite, an unknown attack, or one that lacks aux.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite")
    if attack == "cosine":
        return cosine(a, b)
    if aux is None or aux_labels is None:
        if attack in MATCH and attack != "chance":
            raise ValueError(f"attack {attack!r} learns from known updates: aux and aux_labels are needed")
        aux = aux_labels = np.zeros(0)
    score = pair_scorer(attack, aux, aux_labels, seed)
    return np.stack([score(np.broadcast_to(row, b.shape).copy(), b) for row in a])
