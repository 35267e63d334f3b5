"""Bootstrap intervals over images, and paired comparison of two methods on the same images (ours, not the paper's).

Images are drawn with replacement; the maximum over thresholds is taken anew in every draw, since choosing tau on the
evaluated split is part of the metric. PxAP pools the pixels of the drawn images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from wsol_eval.localization import BoxResult
from wsol_eval.pixels import PixelResult, average_precision

CHUNK = 1024  # images unpacked at a time
Result = BoxResult | PixelResult


@dataclass(frozen=True)
class Interval:
    """A value in percent with its 95 % percentile interval; `p` is the two-sided bootstrap p-value of a difference."""

    value: float
    low: float
    high: float
    p: float | None = None


def bootstrap(result: Result, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Intervals of MaxBoxAcc at each delta (keys such as "0.5") and of their mean ("v2"), or of "pxap".

    Args:
        result: of a `BoxLocalization` or `PixelAP` with keep_images.
        draws: bootstrap samples.
        seed: of the draws.
    """
    sampled, exact = _sampled(result, draws, seed), _exact(result)
    return {name: _interval(value, draw) for (name, value), draw in zip(exact.items(), sampled.T, strict=True)}


def paired(result: Result, baseline: Result, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """The same for the difference result - baseline, both resampled with the same images.

    Raises:
        ValueError: other images, another order, or other options.
    """
    if result.n != baseline.n or result.image_ids != baseline.image_ids or not result.image_ids:
        raise ValueError("paired: both results need image_ids, the same ones in the same order")
    ours, theirs = _exact(result), _exact(baseline)
    same_contours = getattr(result, "contours", None) == getattr(baseline, "contours", None)
    if ours.keys() != theirs.keys() or not same_contours:
        raise ValueError("paired: both results need the same iou_thresholds and contours")
    difference = _sampled(result, draws, seed) - _sampled(baseline, draws, seed)  # the seed draws the same images
    found = {}
    for name, draw in zip(ours, difference.T, strict=True):
        tail = min((draw <= 0).mean(), (draw >= 0).mean())
        p = float(min(1.0, 2 * max(tail, 1 / draws)))
        found[name] = _interval(ours[name] - theirs[name], draw, p)
    return found


def _exact(result: Result) -> dict[str, float]:
    if isinstance(result, PixelResult):
        return {"pxap": result.pxap}
    return {str(delta): value for delta, value in result.max_box_acc.items()} | {"v2": result.max_box_acc_v2}


def _interval(value: float, draws: np.ndarray, p: float | None = None) -> Interval:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high), p)


def _sampled(result: Result, draws: int, seed: int) -> np.ndarray:
    """(draws, metrics) percent: each metric of each resampled split."""
    if result.images is None:
        raise ValueError("intervals need each image's part: keep_images=True")
    weights = np.random.default_rng(seed).multinomial(result.n, np.full(result.n, 1 / result.n), draws)
    if isinstance(result, PixelResult):
        pooled = weights.astype(np.float64) @ result.images.reshape(result.n, -1).astype(np.float64)
        return average_precision(pooled.reshape(draws, *result.images.shape[1:]))[:, None]
    return _maxima(result, weights)


def _maxima(result: BoxResult, weights: np.ndarray) -> np.ndarray:
    """(draws, D + 1): the maxima over tau of each resampled split, and their mean."""
    assert result.images is not None
    deltas, taus = result.curve.shape
    counts = torch.zeros(len(weights), deltas * taus)
    for begin in range(0, result.n, CHUNK):
        bits = np.unpackbits(result.images[begin : begin + CHUNK], axis=-1, count=taus)  # (n, D, T)
        share = torch.from_numpy(weights[:, begin : begin + CHUNK]).float()
        counts += share @ torch.from_numpy(bits).flatten(1).float()  # whole numbers, exact in float32
    best = 100 * counts.reshape(len(weights), deltas, taus).amax(-1).double().numpy() / result.n
    return np.concatenate([best, best.mean(1, keepdims=True)], axis=1)
