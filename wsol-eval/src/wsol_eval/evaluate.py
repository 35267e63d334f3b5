"""The paper's evaluation of a model, of the centre baseline, or of score maps on disk: one report with every number."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.backends import cudnn

from wsol_eval.data import Batch, Source
from wsol_eval.intervals import bootstrap
from wsol_eval.localization import BoxLocalization, BoxResult
from wsol_eval.pixels import PixelAP, PixelResult
from wsol_eval.scoremaps import ScoreMaps, center_gaussian, resize_normalize
from wsol_eval.sweep import check_maps

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from wsol_eval.models import Network

WORKERS = 2  # threads that score boxes while the device computes the next batch


@dataclass(frozen=True)
class Report:
    """Everything measured on one split; percentages."""

    all: BoxResult | None
    """every contour: MaxBoxAccV2"""
    largest: BoxResult | None
    """the largest contour: MaxBoxAcc"""
    pixels: PixelResult | None
    """PxAP"""
    top1_accuracy: float | None
    top5_accuracy: float | None
    n: int

    def metrics(self) -> dict[str, float]:
        """The main numbers by name; those that the ground truth does not allow are absent.

        `localization` is the one that Table 8 of the paper takes: V2 on boxes, PxAP on masks.
        """
        found: dict[str, float] = {}
        if self.all is not None and self.largest is not None:
            found["max_box_acc_v2"] = self.all.max_box_acc_v2
            found |= {"max_box_acc": self.largest.max_box_acc[0.5]} if 0.5 in self.largest.max_box_acc else {}
            found |= {f"v2_iou{round(100 * delta)}": value for delta, value in self.all.max_box_acc.items()}
        if self.pixels is not None:
            found |= {"pxap": self.pixels.pxap, "pxap_constant_map": self.pixels.foreground}
        found["localization"] = found.get("max_box_acc_v2", found.get("pxap", float("nan")))
        if self.top1_accuracy is not None and self.top5_accuracy is not None:
            found |= {"top1_accuracy": self.top1_accuracy, "top5_accuracy": self.top5_accuracy}
        if self.largest is not None and self.largest.top1_loc is not None and self.largest.top5_loc is not None:
            at_half = {"top1_loc": self.largest.top1_loc.get(0.5), "top5_loc": self.largest.top5_loc.get(0.5)}
            found |= {name: value for name, value in at_half.items() if value is not None}
        return found

    def intervals(self) -> dict[str, float]:
        """Ends of the 95 % bootstrap intervals over images of `max_box_acc_v2`, `max_box_acc` and `pxap`.

        The images must have been kept.
        """
        measured = (
            ("max_box_acc_v2", self.all, "v2"),
            ("max_box_acc", self.largest, "0.5"),
            ("pxap", self.pixels, "pxap"),
        )
        found: dict[str, float] = {}
        for name, result, key in measured:
            if result is not None:
                interval = bootstrap(result)[key]
                found |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        return found

    def details(self, curve_step: float = 0.05) -> dict[str, Any]:
        """Thresholds and thinned curves for figures."""
        if self.all is None or self.largest is None:
            return {"n": self.n}
        stride = max(1, round(curve_step / self.largest.taus[1]))
        half = self.largest.iou_thresholds.index(0.5)
        return {
            "n": self.n,
            "tau_star": {str(delta): tau for delta, tau in self.all.tau_star.items()},
            "tau_star_largest": self.largest.tau_star[0.5],
            "taus": self.largest.taus[::stride].round(6).tolist(),
            "curve_largest_50": self.largest.curve[half, ::stride].round(4).tolist(),
        }


class Evaluator:
    """Both box metrics and PxAP at once; `update` per batch, `report` at the end.

    Args:
        source: the split, for its resolution and kind of ground truth.
        interval: step between thresholds.
        keep_images: for bootstrap intervals.

    Raises:
        ValueError: a split without boxes and masks.
    """

    def __init__(self, source: Source, interval: float = 0.001, keep_images: bool = False):
        if not (source.has_boxes or source.has_masks):
            raise ValueError("the split has neither boxes nor masks to measure score maps against")
        options: dict[str, Any] = {"cam_curve_interval": interval, "resolution": source.resolution}
        options |= {"keep_images": keep_images, "workers": WORKERS}
        self.boxes = (
            [BoxLocalization(contours=each, **options) for each in ("all", "largest")] if source.has_boxes else []
        )
        self.pixels = PixelAP(interval, source.resolution, keep_images) if source.has_masks else None
        self.right, self.n, self.classified = np.zeros(2, np.int64), 0, True

    def update(self, batch: Batch, maps: Tensor | np.ndarray, logits: Tensor | None) -> None:
        """Add a batch: maps (B, H, W) in [0, 1], logits (B, classes) or None."""
        first = top5 = None
        if logits is not None and logits.shape[1] > 1:
            best = logits.topk(min(5, logits.shape[1]), 1).indices == batch.labels[:, None]  # (B, 5)
            first, top5 = best[:, 0].cpu().numpy(), best.any(1).cpu().numpy()
            self.right += [first.sum(), top5.sum()]
        else:
            self.classified = False
        if self.boxes:
            assert batch.boxes is not None
            levels = check_maps(maps)  # once for both, on the device: bytes are copied, not floats
            for metric in self.boxes:
                metric.update(levels, batch.boxes, first, top5, batch.image_ids)
        if self.pixels is not None:
            assert batch.masks is not None
            self.pixels.update(maps, batch.masks, batch.image_ids)
        self.n += len(batch.labels)

    def report(self, fabric: Fabric | None = None) -> Report:
        """The report over all batches, and over all ranks of `fabric`."""
        metrics = [*self.boxes, *([self.pixels] if self.pixels is not None else [])]
        totals = torch.tensor([self.n, *self.right])
        if fabric is not None and fabric.world_size > 1:
            totals = cast(Tensor, fabric.all_reduce(totals, reduce_op="sum"))
            for metric in metrics:
                metric.reduce(fabric)
        n, *right = totals.tolist()
        return make_report(self.boxes, self.pixels, right if self.classified else None, n)


def evaluate(
    network: Network,
    source: Source,
    fabric: Fabric,
    interval: float = 0.001,
    batch_size: int = 128,
    keep_images: bool = False,
    store: ScoreMaps | None = None,
) -> Report:
    """Score maps of the true class and logits from one forward pass, resized, normalised and measured.

    Boxes are scored in threads while the device works on the next batch. Ground-truth classes choose the maps
    (GT-known), as in the paper. Everything here is float32, whatever the precision of training: bf16 moves V2.

    Args:
        network: in eval mode.
        source: the split.
        fabric: device and ranks; every image counts once.
        interval: step between thresholds.
        batch_size: images per forward pass and rank.
        keep_images: for bootstrap intervals.
        store: also write the maps there.
    """
    evaluator = Evaluator(source, interval, keep_images)
    network = network.to(fabric.device, torch.float32)
    for batch in source.evaluation(batch_size, fabric):
        with torch.no_grad(), torch.autocast(fabric.device.type, enabled=False), _no_tf32():
            logits, maps = network.predict(batch.images, batch.labels)
        maps = resize_normalize(maps, source.resolution)
        evaluator.update(batch, maps, logits)
        if store is not None:
            store.write(batch.image_ids, maps)
    return evaluator.report(fabric)


def _no_tf32() -> AbstractContextManager:
    """Convolutions in float32, where CUDA would round their inputs to 10 bits."""
    return cudnn.flags(enabled=True, deterministic=cudnn.deterministic, allow_tf32=False)


def evaluate_center(source: Source, fabric: Fabric, interval: float = 0.001, keep_images: bool = False) -> Report:
    """The centre baseline: the same Gaussian for every image."""
    evaluator = Evaluator(source, interval, keep_images)
    gaussian = center_gaussian(source.resolution)
    for batch in source.evaluation(256, fabric):
        evaluator.update(batch, np.broadcast_to(gaussian, (len(batch.labels), *gaussian.shape)), None)
    return evaluator.report(fabric)


def make_report(boxes: list[BoxLocalization], pixels: PixelAP | None, right: list[int] | None, n: int) -> Report:
    """`right`: how often the right class was first, and among the first five."""
    every, largest = [metric.compute() for metric in boxes] or (None, None)
    pooled = pixels.compute() if pixels is not None else None
    top1, top5 = (None, None) if right is None else (100 * each / n for each in right)
    return Report(every, largest, pooled, top1, top5, n)
