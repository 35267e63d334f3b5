"""PxAP: pixel-wise average precision, all pixels of a split pooled (the paper's section 4), by exact binning.

Precision and recall need only how many foreground and background pixels have a score in each bin between thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsol_eval.scoremaps import Maps, as_maps
from wsol_eval.streaming import Streaming
from wsol_eval.sweep import as_tensor, check_range, thresholds

try:
    from numba import njit
except ImportError:  # torch gives the same counts
    njit = None  # type: ignore[assignment]

IGNORED = 255
BLOCK = 4096  # pixels


@dataclass(frozen=True)
class PixelResult:
    """PxAP in percent, and the curve behind it from high thresholds to low ones."""

    pxap: float
    precision: np.ndarray
    """(T + 2,) NaN where no pixel has been counted yet."""
    recall: np.ndarray
    """(T + 2,)"""
    taus: np.ndarray
    """(T + 2,) lower edges of the bins, from high to low."""
    n: int
    """Images."""
    foreground: float
    """Share of foreground among the pixels that count, in percent: the PxAP of a constant map."""
    images: np.ndarray | None = field(default=None, repr=False)
    """(n, 2, T + 2) int32: background and foreground pixels of each image by bin; with keep_images only."""
    image_ids: tuple[str, ...] = field(default=(), repr=False)

    def at(self, tau: float) -> dict[str, float]:
        """Precision, recall and IoU of all pixels, in percent, at the threshold next to tau in [0, 1)."""
        if not 0 <= tau < 1:
            raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
        place = int(np.abs(self.taus - tau).argmin())
        precision, recall = float(self.precision[place]), float(self.recall[place])
        iou = 1 / (1 / precision + 1 / recall - 1) if precision > 0 and recall > 0 else 0.0
        return {"precision": 100 * precision, "recall": 100 * recall, "iou": 100 * iou}


def merge_masks(instances: Sequence[np.ndarray], ignore: np.ndarray | None = None) -> np.ndarray:
    """One mask of an image: 1 where any instance is, else 255 where it is to be ignored, else 0; (H, W) uint8."""
    foreground = np.any(np.stack([np.asarray(each, bool) for each in instances]), axis=0)
    mask = foreground.astype(np.uint8)
    if ignore is not None:
        mask[np.asarray(ignore, bool) & ~foreground] = IGNORED
    return mask


def bin_edges(interval: float) -> np.ndarray:
    """Thresholds, then 1, 2, 3: a score of exactly 1 has its own bin."""
    return np.append(thresholds(interval), [1.0, 2.0, 3.0])


def _place(scores: np.ndarray, masks: np.ndarray, interval: float, bins: int, cells: np.ndarray) -> None:
    """Cell of each pixel: its bin, plus `bins` for foreground and twice that for ignored ones.

    A division gives the bin or a neighbour; np.arange's edges are the products k * interval, which decide. No branch:
    the loop becomes vector instructions.
    """
    inverse, last = 1.0 / interval, np.int32(bins - 3)
    for i in range(len(cells)):
        score = np.float64(scores[i])
        k = np.int32(score * inverse)
        k -= np.int32(np.float64(k) * interval > score)
        k += np.int32(np.float64(k + np.int32(1)) * interval <= score)
        k = min(k, last) + np.int32(score >= 1.0)
        cells[i] = k + np.int32(min(masks[i], np.uint8(2))) * np.int32(bins)


def _tally(cells: np.ndarray, counts: np.ndarray) -> None:
    """Count cells in four tables in turn, so that equal neighbours do not wait for each other."""
    four = np.uint64(4)
    for i in range(np.uint64(len(cells)) // four):
        j = np.uint64(i) * four
        counts[0, cells[j]] += 1
        counts[1, cells[j + np.uint64(1)]] += 1
        counts[2, cells[j + np.uint64(2)]] += 1
        counts[3, cells[j + np.uint64(3)]] += 1
    for rest in range(len(cells) // 4 * 4, len(cells)):
        counts[0, cells[rest]] += 1


def _count_pixels(scores: np.ndarray, masks: np.ndarray, interval: float, bins: int) -> np.ndarray:
    """(3, bins) int64: background, foreground, ignored."""
    counts, cells = np.zeros((4, 3 * bins), np.int64), np.empty(BLOCK, np.uint32)
    for begin in range(0, len(scores), BLOCK):
        part = cells[: min(BLOCK, len(scores) - begin)]
        _place(scores[begin : begin + BLOCK], masks[begin : begin + BLOCK], interval, bins, part)
        _tally(part, counts)
    return counts.sum(0).reshape(3, bins)


if njit is not None:
    _place, _tally = (njit(cache=True, nogil=True, error_model="numpy")(kernel) for kernel in (_place, _tally))
    _count_pixels = njit(cache=True, nogil=True)(_count_pixels)


def score_histogram(scores: Tensor, masks: Tensor, interval: float, backend: str | None = None) -> np.ndarray:
    """How many background and foreground pixels lie in each bin.

    Args:
        scores: (...) floating in [0, 1], on any device; compared with the edges in float64.
        masks: (...) uint8, 0, 1 or 255 (not counted), on the same device.
        interval: of `bin_edges`.
        backend: "numba" or "torch"; default numba on the CPU. Both give the same.

    Returns:
        (2, len(edges) - 1) int64: background, foreground.
    """
    edges = bin_edges(interval)
    if (backend or ("numba" if njit is not None and scores.device.type == "cpu" else "torch")) == "numba":
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.double()
        return _count_pixels(scores.ravel().numpy(), masks.ravel().numpy(), interval, len(edges) - 1)[:2]
    counted = masks != IGNORED
    boundaries = torch.from_numpy(edges).to(scores.device)
    bins = torch.bucketize(scores[counted].double(), boundaries, right=True) - 1
    index = bins + (len(edges) - 1) * masks[counted].long()
    return torch.bincount(index, minlength=2 * (len(edges) - 1)).reshape(2, -1).cpu().numpy()


def average_precision(counts: np.ndarray) -> np.ndarray:
    """PxAP in percent of histograms (..., 2, bins) of background and foreground; NaN without foreground."""
    fp, tp = np.moveaxis(counts[..., ::-1].cumsum(-1), -2, 0)  # from high scores to low ones
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = tp / (tp + fp), tp / tp[..., -1:]
    steps = np.diff(recall) * precision[..., 1:]
    return 100 * np.where((tp + fp)[..., 1:] > 0, steps, 0).sum(-1)


class PixelAP(Streaming):
    """Streaming PxAP: `update` with maps and masks, `merge` with another one, `compute` a `PixelResult`.

    Args:
        cam_curve_interval: width of the bins.
        resolution: side or (height, width) that maps must have; None accepts every size.
        keep_images: keep each image's histogram (`PixelResult.images`) for bootstrap intervals: 8 kB at step .001.
    """

    def __init__(
        self,
        cam_curve_interval: float = 0.001,
        resolution: int | tuple[int, int] | None = None,
        keep_images: bool = False,
    ):
        self.interval, self.keep_images = cam_curve_interval, keep_images
        self.edges = bin_edges(cam_curve_interval)
        self.resolution = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._counts = np.zeros((2, len(self.edges) - 1), np.int64)
        self._n = 0
        self._ids: dict[str, None] = {}
        self._images: list[np.ndarray] = []

    def update(
        self,
        score_maps: Maps,
        masks: np.ndarray | Tensor,
        image_ids: Sequence[str] | None = None,
    ) -> None:
        """Add images.

        Args:
            score_maps: (N, H, W) floating in [0, 1].
            masks: (N, H, W) uint8 of 0, 1 and 255, as `merge_masks` makes them.
            image_ids: N names, in all updates or in none; one that comes twice is an error.

        Raises:
            TypeError: maps or masks of another kind.
            ValueError: NaN, values outside the range, shapes that differ, an id that was there before, another number
                of ids than of maps, ids in only some of the updates.
        """
        scores = as_maps(score_maps)
        if not isinstance(scores, Tensor):
            raise ValueError("score_maps: expected maps of one size")
        if scores.dtype == torch.uint8:
            raise TypeError("score_maps: PxAP is computed on floating maps, got uint8")
        masks = as_tensor(masks, "masks").to(scores.device)
        if masks.dtype != torch.uint8:
            raise TypeError(f"masks: expected uint8, got {masks.dtype}")
        if scores.ndim != 3 or scores.shape != masks.shape:
            found = f"{tuple(scores.shape)} and {tuple(masks.shape)}"
            raise ValueError(f"score_maps and masks: expected one shape (N, H, W), got {found}")
        if self.resolution is not None and tuple(scores.shape[1:]) != self.resolution:
            raise ValueError(f"score_maps: expected maps of {self.resolution}, got {tuple(scores.shape[1:])}")
        check_range(scores, "score_maps")
        if ((masks > 1) & (masks != IGNORED)).any():
            raise ValueError("masks: expected 0, 1 and 255, got other values")
        if image_ids is not None and len(image_ids) != len(scores):
            raise ValueError(f"image_ids: expected {len(scores)} names, got {len(image_ids)}")
        if self._n and (image_ids is None) == bool(self._ids):
            raise ValueError("image_ids: give names in all updates or in none")
        self.check_new(image_ids or ())
        self._ids |= dict.fromkeys(image_ids or ())
        if self.keep_images:
            each = [score_histogram(*pair, self.interval) for pair in zip(scores, masks, strict=True)]
            self._images += [part[None].astype(np.int32) for part in each]
            self._counts += np.sum(each, axis=0, dtype=np.int64)
        else:
            self._counts += score_histogram(scores, masks, self.interval)
        self._n += len(scores)

    def compute(self) -> PixelResult:
        """The result over all images so far. RuntimeError when there is no foreground pixel."""
        background, foreground = self._counts[:, ::-1]  # from high scores to low ones
        if not foreground.sum():
            raise RuntimeError("no foreground pixel was added: PxAP is not defined")
        tp, fp = foreground.cumsum(), background.cumsum()
        with np.errstate(invalid="ignore"):
            precision, recall = tp / (tp + fp), tp / tp[-1]
        share = 100 * float(tp[-1] / (tp[-1] + fp[-1]))
        kept = np.concatenate(self._images) if self._images else None
        pxap = float(average_precision(self._counts))
        return PixelResult(pxap, precision, recall, self.edges[-2::-1], self._n, share, kept, tuple(self._ids))

    def state_dict(self) -> dict[str, Any]:
        """Counts and ids, as tensors and plain values that torch.load(weights_only=True) accepts."""
        counts = torch.from_numpy(self._counts.copy())
        state = {"interval": self.interval, "counts": counts, "n": self._n, "image_ids": list(self._ids)}
        return state | {"images": [torch.from_numpy(each) for each in self._images]}

    def load_state_dict(self, state: dict[str, Any], add: bool = False) -> None:
        """Take over a state, or add it to this one. ValueError for another interval or known ids."""
        if state["interval"] != self.interval:
            raise ValueError(f"expected a state with interval {self.interval}, got {state['interval']}")
        if not add:
            self.reset()
        if state["n"] and self._n and bool(state["images"]) != bool(self._images):
            raise ValueError("expected two states with images (keep_images), or two without")
        self.check_new(state["image_ids"])
        self._counts += state["counts"].numpy()
        self._n += state["n"]
        self._images += [each.numpy() for each in state["images"]]
        self._ids |= dict.fromkeys(state["image_ids"])
