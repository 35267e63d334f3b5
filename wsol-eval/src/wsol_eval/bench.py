"""Speed on one thread against the reference's way: a contour search at every threshold. Equality is checked first.

Maps are 224 x 224, bicubic from random 14 x 14 or 28 x 28 maps, with one ground-truth box. CPU seconds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table

from shared_utils.logging import console
from wsol_eval.boxes import box_iou_inclusive
from wsol_eval.contours import contour_boxes
from wsol_eval.experiments import PROJECT
from wsol_eval.localization import BoxLocalization
from wsol_eval.pixels import bin_edges, score_histogram
from wsol_eval.scoremaps import resize_normalize
from wsol_eval.sweep import best_iou_per_threshold, check_maps, level_iou, thresholds

IMAGENET_TEST = 50_000
REACH = {(14, 0.001): ">= 10", (28, 0.001): ">= 15", (14, 0.01): ">= 1", (28, 0.01): ">= 1"}


def bench(count: int, repeats: int, full: int) -> None:
    """Measure every case, print the table, write runs/bench.json."""
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows = []
    for side in (14, 28):
        maps, boxes = make_maps(side, count)
        for interval in (0.001, 0.01):
            for contours in ("largest", "all"):
                rows.append(_boxes_case(maps, boxes, side, interval, contours, repeats))
    rows.append(_pixels_case(make_maps(28, count)[0], repeats))
    found = {"machine": _machine(), "opencv": cv2.__version__, "rows": rows}
    if full:
        found["imagenet"] = [_full_case(side, full) for side in (14, 28)]
    path = PROJECT / "runs" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    _print(found)


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


def _boxes_case(maps: np.ndarray, boxes: list, side: int, interval: float, contours: str, repeats: int) -> dict:
    taus = thresholds(interval)
    some = max(4, len(maps) // (10 if interval < 0.01 else 2))  # the peer is slow

    def ours() -> list[np.ndarray]:
        return [best_iou_per_threshold(m, b, taus, contours) for m, b in zip(maps, boxes, strict=True)]

    def peer() -> list[np.ndarray]:
        return [reference_iou(m, b, taus, contours == "largest") for m, b in zip(maps[:some], boxes, strict=False)]

    same = all(np.array_equal(a, b) for a, b in zip(ours(), peer(), strict=False))
    name = f"{'MaxBoxAccV2' if contours == 'all' else 'MaxBoxAcc'}, from {side} x {side}, interval {interval}"
    return _row(name, ours, len(maps), peer, some, repeats, REACH[side, interval], same)


def _pixels_case(maps: np.ndarray, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    masks = rng.choice(np.array([0, 1, 255], np.uint8), maps.shape, p=[0.7, 0.2, 0.1])
    edges = bin_edges(0.001)
    tensors = torch.from_numpy(maps), torch.from_numpy(masks)

    def ours() -> np.ndarray:
        return score_histogram(*tensors, 0.001)

    def peer() -> np.ndarray:
        return sum(reference_histogram(m, mask, edges) for m, mask in zip(maps, masks, strict=True))

    return _row(
        "PxAP, interval 0.001", ours, len(maps), peer, len(maps), repeats, ">= 20", np.array_equal(ours(), peer())
    )


def _row(name: str, ours: Callable, n: int, peer: Callable, some: int, repeats: int, reach: str, same: bool) -> dict:
    """Milliseconds of CPU per map, in turn."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for key, work, count in (("ours", ours, n), ("peer", peer, some)):
            begin = time.process_time()
            work()
            times[key].append(1000 * (time.process_time() - begin) / count)
    return {"work": name, "reach": reach, "equal": bool(same)} | times


def _full_case(side: int, count: int) -> dict:
    """Wall seconds of the whole evaluator (V2 and V1, quantisation included) on all cores, extrapolated."""
    maps, boxes = make_maps(side, count)
    maps = maps.astype(np.float32)
    cores = os.cpu_count() or 1
    level_iou(check_maps(maps[:2]), boxes[:2])
    seconds = {}
    for contours in ("all", "largest"):
        metric = BoxLocalization(contours=contours, workers=cores)
        begin = time.perf_counter()
        for start in range(0, count, 100):
            metric.update(maps[start : start + 100], boxes[start : start + 100])
        metric.compute()
        seconds[contours] = (time.perf_counter() - begin) * IMAGENET_TEST / count
    return {"side": side, "maps": count, "cores": cores, "seconds": seconds}


def _print(found: dict) -> None:
    title = f"CPU ms per map, one thread, medians ({found['machine']}; OpenCV {found['opencv']})"
    table = Table("work", "ours", "contours at every threshold", "ratio (min to max)", "to reach", "equal", title=title)
    for row in found["rows"]:
        ours, peer = row["ours"], row["peer"]
        ratios = [b / a for a, b in zip(ours, peer, strict=True)]
        shown = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        times = [f"{statistics.median(each):.2f}" for each in (ours, peer)]
        table.add_row(row["work"], *times, shown, row["reach"], "yes" if row["equal"] else "NO")
    console().print(table)
    for case in found.get("imagenet", ()):
        seconds = ", ".join(f"contours {name} {value:.0f} s" for name, value in case["seconds"].items())
        console().print(
            f"50,000 maps (ImageNet test) from {case['side']} x {case['side']} on {case['cores']} cores, "
            f"extrapolated from {case['maps']}: {seconds} (to reach: under 120 s)"
        )


def _machine() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
