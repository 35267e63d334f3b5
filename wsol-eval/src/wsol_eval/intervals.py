"""Bootstrap intervals over images, and paired comparison of two methods on the same images (ours, not the paper's).

Images are drawn with replacement; the maximum over thresholds is taken anew in every draw, since choosing tau on the
evaluated split is part of the metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from wsol_eval.localization import BoxResult

CHUNK = 1024  # images unpacked at a time


@dataclass(frozen=True)
class Interval:
    """A value in percent with its 95 % percentile interval; `p` is the two-sided bootstrap p-value of a difference."""

    value: float
    low: float
    high: float
    p: float | None = None


def bootstrap(result: BoxResult, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Intervals of MaxBoxAcc at each delta (keys such as "0.5") and of their mean ("v2").

    Args:
        result: of a `BoxLocalization` with keep_images.
        draws: bootstrap samples.
        seed: of the draws.
    """
    sampled = _maxima(result, draws, seed)
    exact = [*result.max_box_acc.values(), result.max_box_acc_v2]
    return {name: _interval(value, draw) for name, value, draw in zip(_names(result), exact, sampled.T, strict=True)}


def paired(result: BoxResult, baseline: BoxResult, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """The same for the difference result - baseline, both resampled with the same images.

    Raises:
        ValueError: other images, another order, or other options.
    """
    if result.n != baseline.n or result.image_ids != baseline.image_ids or not result.image_ids:
        raise ValueError("paired: both results need image_ids, the same ones in the same order")
    if (result.iou_thresholds, result.contours) != (baseline.iou_thresholds, baseline.contours):
        raise ValueError("paired: both results need the same iou_thresholds and contours")
    sampled = _maxima(result, draws, seed) - _maxima(baseline, draws, seed)
    ours, theirs = [*result.max_box_acc.values(), result.max_box_acc_v2], [*baseline.max_box_acc.values()]
    exact = np.subtract(ours, [*theirs, baseline.max_box_acc_v2])
    found = {}
    for name, value, draw in zip(_names(result), exact, sampled.T, strict=True):
        tail = min((draw <= 0).mean(), (draw >= 0).mean())
        found[name] = _interval(float(value), draw, p=float(min(1.0, 2 * max(tail, 1 / draws))))
    return found


def _names(result: BoxResult) -> list[str]:
    return [*map(str, result.iou_thresholds), "v2"]


def _interval(value: float, draws: np.ndarray, p: float | None = None) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high), p)


def _maxima(result: BoxResult, draws: int, seed: int) -> np.ndarray:
    """(draws, D + 1) percent: the maxima over tau of each resampled split, and their mean."""
    if result.images is None:
        raise ValueError("intervals need each image's bits: BoxLocalization(keep_images=True)")
    weights = np.random.default_rng(seed).multinomial(result.n, np.full(result.n, 1 / result.n), draws)
    deltas, taus = result.curve.shape
    counts = torch.zeros(draws, deltas * taus)
    for begin in range(0, result.n, CHUNK):
        bits = np.unpackbits(result.images[begin : begin + CHUNK], axis=-1, count=taus)  # (n, D, T)
        share = torch.from_numpy(weights[:, begin : begin + CHUNK]).float()
        counts += share @ torch.from_numpy(bits).flatten(1).float()  # whole numbers, exact in float32
    best = 100 * counts.reshape(draws, deltas, taus).amax(-1).double().numpy() / result.n
    return np.concatenate([best, best.mean(1, keepdims=True)], axis=1)
