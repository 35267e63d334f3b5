"""Speed against the released evaluator, and against its algorithm at its best. Equality is checked first.

Maps are 224 x 224, bicubic from random 14 x 14 or 28 x 28 maps, with one ground-truth box. The released code, a contour
search at every threshold, runs where `--reference` names a clone of it. Its best is one contour search per grey level,
as the foreground is the same in between; that one is ours (contours.py).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from shared_utils.benchmark import Timing, in_turn, report
from wsol_eval.data import load_mask
from wsol_eval.experiments import PACKAGES, PROJECT
from wsol_eval.localization import BoxLocalization
from wsol_eval.pixels import bin_edges, merge_masks, score_histogram
from wsol_eval.scoremaps import resize_normalize
from wsol_eval.sweep import best_iou_per_threshold, check_maps, level_iou, thresholds

IMAGENET_TEST = 50_000
MAPS = 10  # per case
FULL = 2_000  # maps of the extrapolation to ImageNet's
NAMES: dict[Literal["largest", "all"], str] = {"largest": "MaxBoxAcc", "all": "MaxBoxAccV2"}
TARGETS = {(14, 0.001): ">= 10", (28, 0.001): ">= 15", (14, 0.01): ">= 1", (28, 0.01): ">= 1"}
ONCE = "contours once per grey level"
HISTOGRAM_NOTE = "the target was set where np.histogram took 3.4 ms a map; both fill one bin per pixel"


def run(repeats: int, threads: int, reference: Path | None = None) -> None:
    """Measure every case into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    settings: dict[str, Any] = {"repeats": repeats}
    released = None
    if reference is not None:
        released = released_evaluator(reference)
        settings["evaluation.py"] = hashlib.sha256((reference / "evaluation.py").read_bytes()).hexdigest()[:16]
    report("wsol-eval", _timings(repeats, released), PROJECT, (*PACKAGES, "opencv-python-headless"), settings)


def released_evaluator(folder: Path) -> ModuleType:
    """The module evaluation.py of a clone. FileNotFoundError, or ValueError where it cannot be imported."""
    if not (folder / "evaluation.py").is_file():
        raise FileNotFoundError(f"{folder}: expected a clone of clovaai/wsolevaluation, found no evaluation.py")
    sys.path.insert(0, str(folder))
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]  # its name before NumPy 1.24, which that code uses
    try:
        return import_module("evaluation")
    except ImportError as error:
        raise ValueError(f"{folder / 'evaluation.py'}: cannot be imported ({error}); install what it needs") from error
    finally:
        sys.path.remove(str(folder))


def _timings(repeats: int, released: ModuleType | None) -> Iterator[Timing]:
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    for side in (14, 28):
        for contours in NAMES:
            yield _boxes(side, 0.001, contours, repeats, ONCE, once_per_level, ">= 3")
    if released is not None:
        peer = released_iou(released)
        for side, interval in TARGETS:
            for contours in NAMES:
                yield _boxes(side, interval, contours, repeats, "released code", peer, TARGETS[side, interval])
    yield from _pixels(repeats, released)
    yield from _imagenet()


def make_maps(side: int, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Score maps (count, 224, 224) float64 and a box for each."""
    rng = np.random.default_rng(side)
    raw = torch.from_numpy(rng.standard_normal((count, side, side)))
    x0, y0 = rng.integers(0, 112, (2, count))
    x1, y1 = rng.integers(112, 224, (2, count))
    boxes = [np.array([box]) for box in np.stack([x0, y0, x1, y1], 1)]
    return torch.cat([resize_normalize(part.relu(), 224) for part in raw.split(200)]).numpy(), boxes


Iou = Callable[[np.ndarray, np.ndarray, np.ndarray, Literal["largest", "all"]], np.ndarray]


def once_per_level(
    score_map: np.ndarray, boxes: np.ndarray, taus: np.ndarray, contours: Literal["largest", "all"]
) -> np.ndarray:
    """A peer: contours of each grey level that occurs, looked up for each threshold."""
    return best_iou_per_threshold(score_map, boxes, taus, contours, backend="opencv")


def released_iou(released: ModuleType) -> Iou:
    """A peer: what the released BoxEvaluator does with a map."""

    def iou(
        score_map: np.ndarray, boxes: np.ndarray, taus: np.ndarray, contours: Literal["largest", "all"]
    ) -> np.ndarray:
        found, counts = released.compute_bboxes_from_scoremaps(score_map, taus, contours == "all")
        best = released.calculate_multiple_iou(np.concatenate(found), boxes).max(1)
        return np.maximum.reduceat(best, np.cumsum([0, *counts[:-1]]))

    return iou


def reference_histogram(score_map: np.ndarray, mask: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The peer of PxAP: np.histogram on foreground and background."""
    return np.stack([np.histogram(score_map[mask == kind], edges)[0] for kind in (0, 1)])


def _boxes(
    side: int, interval: float, contours: Literal["largest", "all"], repeats: int, name: str, peer: Iou, target: str
) -> Timing:
    maps, boxes = make_maps(side, MAPS)
    taus = thresholds(interval)

    def ours() -> list[np.ndarray]:
        return [best_iou_per_threshold(m, b, taus, contours) for m, b in zip(maps, boxes, strict=True)]

    def theirs() -> list[np.ndarray]:
        return [peer(m, b, taus, contours) for m, b in zip(maps, boxes, strict=True)]

    what = f"{NAMES[contours]}, from {side} x {side}, interval {interval}"
    return _per_map(what, name, ours, theirs, repeats, target)


def _pixels(repeats: int, released: ModuleType | None) -> Iterator[Timing]:
    """PxAP with masks in memory, all pixels counted or some ignored; and with masks that are read from PNG."""
    rng = np.random.default_rng(0)
    maps, edges = make_maps(28, MAPS)[0], bin_edges(0.001)

    def histograms(masks: Iterable[np.ndarray]) -> np.ndarray:
        return np.sum([reference_histogram(m, mask, edges) for m, mask in zip(maps, masks, strict=True)], axis=0)

    for what, shares in (("every pixel counts", (0.8, 0.2, 0)), ("a tenth ignored", (0.7, 0.2, 0.1))):
        masks = rng.choice(np.array([0, 1, 255], np.uint8), maps.shape, p=shares)
        tensors = torch.from_numpy(maps), torch.from_numpy(masks)
        work = partial(score_histogram, *tensors, 0.001), partial(histograms, masks)
        yield _per_map(f"PxAP, interval 0.001, {what}", "np.histogram", *work, repeats, ">= 20", HISTOGRAM_NOTE)
    if released is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        for i in range(MAPS):
            for name in ("mask", "ignore"):
                blocks = rng.choice(np.array([0, 255], np.uint8), (12, 16), p=[0.8, 0.2]).repeat(64, 0).repeat(64, 1)
                Image.fromarray(blocks).save(Path(folder) / f"{name}{i}.png")

        def ours() -> np.ndarray:
            read = [[load_mask(Path(folder) / f"{name}{i}.png") for name in ("mask", "ignore")] for i in range(MAPS)]
            masks = np.stack([merge_masks([mask], ignore) for mask, ignore in read])
            return score_histogram(tensors[0], torch.from_numpy(masks), 0.001)

        def theirs() -> np.ndarray:
            return histograms([released.get_mask(folder, [f"mask{i}.png"], f"ignore{i}.png") for i in range(MAPS)])

        what = "PxAP, interval 0.001, two masks of 1024 x 768 read from PNG"
        yield _per_map(what, "released get_mask, np.histogram", ours, theirs, repeats, ">= 1")


def _per_map(
    what: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, target: str, note: str = ""
) -> Timing:
    if not np.array_equal(ours(), theirs()):
        raise RuntimeError(f"{what}: ours and {peer} differ")
    mine, peers = ([ms / MAPS for ms in each] for each in in_turn(ours, theirs, repeats, torch.device("cpu")))
    return Timing(what, peer, mine, peers, target=target, note=note)


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
