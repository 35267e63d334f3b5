"""Score maps on disk against boxes or masks: sizes, conventions, and a report on all of a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from wsol_eval.boxes import crop_boxes
from wsol_eval.data import CROP, RESIZED, read_mask
from wsol_eval.evaluate import Report, make_report
from wsol_eval.localization import BoxLocalization
from wsol_eval.metadata import Metadata
from wsol_eval.pixels import PixelAP
from wsol_eval.scoremaps import ScoreMaps, resize_normalize
from wsol_eval.sweep import Convention

Fit = Literal["as-is", "resize", "native"]
View = Literal["resize", "center-crop"]


@dataclass(frozen=True)
class Scoring:
    """How maps meet boxes and masks."""

    interval: float = 0.001
    """step between thresholds"""
    iou_thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
    """deltas"""
    fit: Fit = "as-is"
    """as-is: maps are 224 x 224; resize: of any size and range, bicubic, then min-max; native: of the image's size"""
    view: View = "resize"
    """what the model saw: the image at 224 x 224, or its middle 224 x 224 after the shorter side became 256"""
    convention: Convention = "reference"
    """see `BoxLocalization`"""
    keep_images: bool = False
    """for bootstrap intervals and results per class"""

    def read(self, store: ScoreMaps, name: str, size: tuple[int, int] | None) -> np.ndarray:
        """The map of an image of this (width, height), in [0, 1]. ValueError for one of the wrong size."""
        found = store.read(name)
        if self.fit == "resize":
            return resize_normalize(torch.from_numpy(found.astype(np.float64)), CROP)[0].numpy()
        height, width = found.shape
        if self.fit == "as-is" and found.shape != (CROP, CROP):
            raise ValueError(f"{name}: expected a map of {CROP} x {CROP}, got {height} x {width}; pass --resize")
        if self.fit == "native" and (width, height) != size:
            wanted = "of unknown size (image_sizes.txt)" if size is None else f"{size[1]} x {size[0]}"
            raise ValueError(f"{name}: a native map has its image's size, {wanted}, got {height} x {width}; "
                             "pass --resize instead of --native")  # fmt: skip
        return found

    def boxes(self, name: str, metadata: Metadata) -> np.ndarray:
        """Boxes of an image in pixels of its map. ValueError for an image without boxes or size."""
        scaled = metadata.boxes_at(name, CROP)
        if self.fit == "native":
            return metadata.boxes[name]
        if self.view == "center-crop":
            return crop_boxes(metadata.boxes[name], metadata.image_sizes[name], RESIZED, CROP)
        return scaled


def score_maps(
    store: ScoreMaps,
    metadata: Metadata,
    scoring: Scoring = Scoring(),  # frozen
    predictions: dict[str, list[int]] | None = None,
    mask_root: Path = Path(),
    workers: int = 2,
) -> Report:
    """A report on score maps on disk.

    Args:
        store: one map per image of the split.
        metadata: of the split, with boxes or masks.
        scoring: sizes, thresholds and conventions.
        predictions: classes of each image, best first, for top-1 and top-5.
        mask_root: folder that mask paths are relative to; default the working directory.
        workers: threads.

    Raises:
        FileNotFoundError: an image without a map.
        BrokenFile: a mask that is missing or broken.
        ValueError: an image without boxes or predictions; a damaged map, or one of the wrong size.
    """
    native = scoring.fit == "native"
    options: dict[str, Any] = {"cam_curve_interval": scoring.interval, "keep_images": scoring.keep_images}
    pixels = PixelAP(**options) if metadata.masks else None
    options |= {"box_convention": scoring.convention, "iou_thresholds": scoring.iou_thresholds, "workers": workers}
    options |= {"resolution": "native" if native else CROP}
    boxes = [BoxLocalization(contours=each, **options) for each in ("all", "largest")] if metadata.boxes else []
    right = np.zeros(2, np.int64)
    for begin in range(0, len(metadata.image_ids), 64):
        names = metadata.image_ids[begin : begin + 64]
        first, top5 = _flags_of(names, metadata, predictions)
        if boxes:
            sizes = [metadata.image_sizes.get(name) for name in names]
            maps = [scoring.read(store, name, size) for name, size in zip(names, sizes, strict=True)]
            known = [scoring.boxes(name, metadata) for name in names]
            for metric in boxes:
                metric.update(maps, known, first, top5, names, sizes if native else None)  # type: ignore[arg-type]
        for name in names if pixels is not None else ():
            mask = read_mask(metadata, name, mask_root, None if native else CROP)
            score_map = scoring.read(store, name, mask.shape[::-1])
            pixels.update(score_map[None], mask[None], [name])  # type: ignore[union-attr]
        if first is not None and top5 is not None:
            right += [first.sum(), top5.sum()]
    return make_report(boxes, pixels, None if predictions is None else right.tolist(), len(metadata.image_ids))


def _flags_of(
    names: list[str], metadata: Metadata, predictions: dict[str, list[int]] | None
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Whether the right class is first, and among the first five, for each image; None without predictions."""
    if predictions is None:
        return None, None
    missing = [name for name in names if name not in predictions]
    if missing:
        raise ValueError(f"image {missing[0]!r} has no prediction")
    truth = [metadata.class_labels[name] for name in names]
    first = np.array([predictions[name][0] == label for name, label in zip(names, truth, strict=True)])
    return first, np.array([label in predictions[name][:5] for name, label in zip(names, truth, strict=True)])
