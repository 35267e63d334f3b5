"""Speed against the reference's way: a contour search at every threshold. Equality is checked first.

Maps are 224 x 224, bicubic from random 14 x 14 or 28 x 28 maps, with one ground-truth box.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from shared_utils.benchmark import Timing, in_turn, report
from wsol_eval.boxes import box_iou_inclusive
from wsol_eval.contours import contour_boxes
from wsol_eval.experiments import PACKAGES, PROJECT
from wsol_eval.localization import BoxLocalization
from wsol_eval.pixels import bin_edges, score_histogram
from wsol_eval.scoremaps import resize_normalize
from wsol_eval.sweep import best_iou_per_threshold, check_maps, level_iou, thresholds

IMAGENET_TEST = 50_000
MAPS = 10  # per case
FULL = 2_000  # maps of the extrapolation to ImageNet's
NAMES: dict[Literal["largest", "all"], str] = {"largest": "MaxBoxAcc", "all": "MaxBoxAccV2"}
TARGETS = {(14, 0.001): ">= 10", (28, 0.001): ">= 15", (14, 0.01): ">= 1", (28, 0.01): ">= 1"}


def run(repeats: int, threads: int) -> None:
    """Measure every case into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    report("wsol-eval", _timings(repeats), PROJECT, (*PACKAGES, "opencv-python-headless"), {"repeats": repeats})


def _timings(repeats: int) -> Iterator[Timing]:
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    for side, interval in TARGETS:
        for contours in NAMES:
            yield _boxes(side, interval, contours, repeats)
    yield _pixels(repeats)
    yield from _imagenet()


def make_maps(side: int, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Score maps (count, 224, 224) float64 and a box for each."""
    rng = np.random.default_rng(side)
    raw = torch.from_numpy(rng.standard_normal((count, side, side)))
    x0, y0 = rng.integers(0, 112, (2, count))
    x1, y1 = rng.integers(112, 224, (2, count))
    boxes = [np.array([box]) for box in np.stack([x0, y0, x1, y1], 1)]
    return torch.cat([resize_normalize(part.relu(), 224) for part in raw.split(200)]).numpy(), boxes


def reference_iou(score_map: np.ndarray, boxes: np.ndarray, taus: np.ndarray, largest: bool) -> np.ndarray:
    """The peer: quantise, then contours, boxes and IoU at every threshold."""
    grey = (score_map * 255).astype(np.uint8)
    best = np.empty(len(taus))
    for place, tau in enumerate(taus):
        found = contour_boxes(grey, int(tau * grey.max()), largest, True)
        best[place] = box_iou_inclusive(found if len(found) else np.zeros((1, 4)), boxes).max()
    return best


def reference_histogram(score_map: np.ndarray, mask: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The peer of PxAP: np.histogram on foreground and background."""
    return np.stack([np.histogram(score_map[mask == kind], edges)[0] for kind in (0, 1)])


def _boxes(side: int, interval: float, contours: Literal["largest", "all"], repeats: int) -> Timing:
    maps, boxes = make_maps(side, MAPS)
    taus = thresholds(interval)

    def ours() -> list[np.ndarray]:
        return [best_iou_per_threshold(m, b, taus, contours) for m, b in zip(maps, boxes, strict=True)]

    def peer() -> list[np.ndarray]:
        return [reference_iou(m, b, taus, contours == "largest") for m, b in zip(maps, boxes, strict=True)]

    what = f"{NAMES[contours]}, from {side} x {side}, interval {interval}"
    return _per_map(what, "contours at every threshold", ours, peer, repeats, TARGETS[side, interval])


def _pixels(repeats: int) -> Timing:
    rng = np.random.default_rng(0)
    maps = make_maps(28, MAPS)[0]
    masks = rng.choice(np.array([0, 1, 255], np.uint8), maps.shape, p=[0.7, 0.2, 0.1])
    edges = bin_edges(0.001)
    tensors = torch.from_numpy(maps), torch.from_numpy(masks)

    def ours() -> np.ndarray:
        return score_histogram(*tensors, 0.001)

    def peer() -> np.ndarray:
        return np.sum([reference_histogram(m, mask, edges) for m, mask in zip(maps, masks, strict=True)], axis=0)

    return _per_map("PxAP, interval 0.001", "np.histogram", ours, peer, repeats, ">= 20")


def _per_map(
    what: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, target: str
) -> Timing:
    if not np.array_equal(ours(), theirs()):
        raise RuntimeError(f"{what}: ours and {peer} differ")
    mine, peers = ([ms / MAPS for ms in each] for each in in_turn(ours, theirs, repeats, torch.device("cpu")))
    return Timing(what, peer, mine, peers, target=target)


def _imagenet() -> Iterator[Timing]:
    """Wall seconds of the whole evaluator (quantisation included) on all cores, extrapolated."""
    cores = os.cpu_count() or 1
    for side in (14, 28):
        maps, boxes = make_maps(side, FULL)
        maps = maps.astype(np.float32)
        level_iou(check_maps(maps[:2]), boxes[:2])
        for contours, name in NAMES.items():
            metric = BoxLocalization(contours=contours, workers=cores)
            begin = time.perf_counter()
            for start in range(0, FULL, 100):
                metric.update(maps[start : start + 100], boxes[start : start + 100])
            metric.compute()
            seconds = (time.perf_counter() - begin) * IMAGENET_TEST / FULL
            what = f"{IMAGENET_TEST:,} maps (ImageNet test), {name}, from {side} x {side}, {cores} cores"
            yield Timing(what, None, [seconds], unit="s", target="<= 120", note=f"extrapolated from {FULL:,}")
