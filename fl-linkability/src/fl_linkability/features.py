"""From updates to what an attack sees: one layer or all, optionally centred within the round, of unit length."""

from __future__ import annotations

import numpy as np


def leave_one_out(deltas: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Each update minus the mean of the other updates of its round, in float64; one alone in its round is unchanged.

    Args:
        deltas: (n, D).
        rounds: (n,) round of each update.
    """
    deltas = np.asarray(deltas, dtype=np.float64)
    _, group = np.unique(rounds, return_inverse=True)
    size = np.bincount(group)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    totals = np.add.reduceat(deltas[order], starts, axis=0)
    others = np.maximum(size - 1, 1)[group][:, None]
    return deltas - (totals[group] - deltas) / others


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; a zero row stays zero."""
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of a with every row of b, (n_a, n_b); 0 for a zero vector."""
    return unit(a) @ unit(b).T


def device_means(features: np.ndarray, devices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean feature of each device, and the devices in ascending order."""
    ids, group = np.unique(devices, return_inverse=True)
    totals = np.zeros((len(ids), features.shape[1]))
    np.add.at(totals, group, features)
    return totals / np.bincount(group)[:, None], ids
