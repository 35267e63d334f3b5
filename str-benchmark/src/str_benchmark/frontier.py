"""Trade-off frontiers (figure 4): the upper convex hull that the paper draws, and the non-dominated models."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def upper_hull(cost: ArrayLike, accuracy: ArrayLike) -> list[int]:
    """Indices of the upper convex hull from the cheapest point to the most accurate one, by rising cost.

    Points on a line between two corners are not corners. ValueError for vectors of different or no length, or NaN.
    """
    x, y = _vectors(cost, accuracy)
    hull: list[int] = []
    for index in non_dominated(x, y):  # a corner that rises is never dominated
        while len(hull) >= 2 and _turn(hull[-2], hull[-1], index, x, y) >= 0:
            hull.pop()
        hull.append(index)
    return hull


def non_dominated(cost: ArrayLike, accuracy: ArrayLike) -> list[int]:
    """Indices of the non-dominated points (no other is as cheap and as good, and better in one); by rising cost."""
    x, y = _vectors(cost, accuracy)
    kept: list[int] = []
    for index in np.lexsort((-y, x)):
        if not kept or y[index] > y[kept[-1]]:
            kept.append(int(index))
    return kept


def _vectors(cost: ArrayLike, accuracy: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(cost, dtype=float), np.asarray(accuracy, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"cost and accuracy: expected two vectors of one length, got {x.shape}, {y.shape}")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("cost and accuracy must not be NaN")
    return x, y


def _turn(a: int, b: int, c: int, x: np.ndarray, y: np.ndarray) -> float:
    """Positive where a, b, c turn left: b lies below the line from a to c."""
    return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])
