"""Trade-off frontiers (figure 4): the upper convex hull that the paper draws, and the models nothing dominates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def upper_hull(cost: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Indices of the upper convex hull from the cheapest point to the most accurate one, by rising cost.

    Points on a line between two corners are no corners. ValueError for vectors of different or no length, or NaN.
    """
    cost, accuracy = _vectors(cost, accuracy)
    hull: list[int] = []
    for index in non_dominated(cost, accuracy):  # a corner that rises is never dominated
        while len(hull) >= 2 and _turn(hull[-2], hull[-1], index, cost, accuracy) >= 0:
            hull.pop()
        hull.append(index)
    return hull


def non_dominated(cost: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Indices of the points with no other that costs no more and is no worse, and better in one; by rising cost."""
    cost, accuracy = _vectors(cost, accuracy)
    kept: list[int] = []
    for index in np.lexsort((-accuracy, cost)):
        if not kept or accuracy[index] > accuracy[kept[-1]]:
            kept.append(int(index))
    return kept


def _vectors(cost: Sequence[float], accuracy: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    cost, accuracy = np.asarray(cost, dtype=float), np.asarray(accuracy, dtype=float)
    if cost.shape != accuracy.shape or cost.ndim != 1 or not len(cost):
        raise ValueError(f"cost and accuracy: expected two vectors of one length, got {cost.shape}, {accuracy.shape}")
    if np.isnan(cost).any() or np.isnan(accuracy).any():
        raise ValueError("cost and accuracy must not be NaN")
    return cost, accuracy


def _turn(a: int, b: int, c: int, x: np.ndarray, y: np.ndarray) -> float:
    """Positive where a, b, c turn left: b lies below the line from a to c."""
    return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])
