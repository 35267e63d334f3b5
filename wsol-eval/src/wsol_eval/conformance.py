"""Fixtures for other code bases: the reference's own answers, and a check of somebody else's against them.

`write` puts score maps and boxes into a folder; whoever wants to know whether their evaluator is the paper's writes
an answers.json beside them; `check` names every number that differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from wsol_eval.localization import BoxLocalization
from wsol_eval.pixels import PixelAP
from wsol_eval.sweep import Contours

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-9  # percent
CURVES: dict[Contours, str] = {"all": "multi", "largest": "largest"}  # contours: name in the fixtures


def box_cases() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, score map (H, W) float64 and boxes (k, 4) in the map's own pixels, of each of the 28 box fixtures."""
    with np.load(FIXTURES / "box_metrics.npz") as stored:
        for i, name in enumerate(stored["names"].tolist()):
            yield name, stored[f"map_{i:02d}"].astype(np.float64) / 65535, stored[f"gt_{i:02d}"]


def pixel_cases() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score map (48, 48) float64 and mask {0, 1, 255} of each of the 10 pixel fixtures."""
    with np.load(FIXTURES / "pxap.npz") as stored:
        for i in range(10):
            yield stored[f"map_{i:02d}"], stored[f"gt_{i:02d}"]


def expected() -> dict[str, float]:
    """The reference's answers at interval .001, in percent."""
    found: dict[str, float] = {}
    with np.load(FIXTURES / "box_metrics.npz") as stored:
        for contours, key in CURVES.items():
            maxima = stored[f"max_box_acc_{key}_001"]
            for percent, value in zip(stored["iou_percent"].tolist(), maxima.tolist(), strict=True):
                found[f"max_box_acc_{contours}_iou{percent}"] = value
            found[f"mean_{contours}"] = float(maxima.mean())
    with np.load(FIXTURES / "pxap.npz") as stored:
        return found | {"pxap": float(stored["pxap_001"])}


def ours() -> dict[str, float]:
    """This package's answers to the same."""
    found: dict[str, float] = {}
    for contours in CURVES:
        metric = BoxLocalization(contours=contours, resolution="native")
        for name, score_map, boxes in box_cases():
            metric.update([score_map], [boxes], image_ids=[name], image_sizes=[score_map.shape[::-1]])
        result = metric.compute()
        for delta, value in result.max_box_acc.items():
            found[f"max_box_acc_{contours}_iou{round(100 * delta)}"] = value
        found[f"mean_{contours}"] = result.max_box_acc_v2
    pixels = PixelAP()
    for score_map, mask in pixel_cases():
        pixels.update(score_map[None], mask[None])
    return found | {"pxap": pixels.compute().pxap}


def write(folder: Path) -> None:
    """Score maps as .npy, boxes and masks, README.txt, and an answers.json to be filled in."""
    for part in ("boxes", "pixels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    truth = {}
    for name, score_map, boxes in box_cases():
        np.save(folder / "boxes" / f"{name}.npy", score_map)
        truth[name] = boxes.tolist()
    (folder / "boxes.json").write_text(json.dumps(truth, indent=1))
    for i, (score_map, mask) in enumerate(pixel_cases()):
        np.save(folder / "pixels" / f"{i}.npy", score_map)
        np.save(folder / "pixels" / f"{i}-mask.npy", mask)
    (folder / "answers.json").write_text(json.dumps(dict.fromkeys(expected()), indent=2) + "\n")
    (folder / "README.txt").write_text(
        "boxes/*.npy: float64 score maps of many sizes; boxes.json: their boxes x0, y0, x1, y1 in the map's pixels.\n"
        "pixels/*.npy: float64 score maps and masks (1 foreground, 0 background, 255 ignored).\n"
        "Fill in answers.json, percent over all images, thresholds np.arange(0, 1, .001), maximum over thresholds\n"
        "per IoU: contours 'all' is MaxBoxAccV2, 'largest' is MaxBoxAcc, mean_* the mean over IoU 30, 50 and 70.\n"
        "Then: wsol-eval conformance --check answers.json\n"
    )


def check(answers: Mapping[str, float | None]) -> list[str]:
    """One line per answer that is missing or differs by more than 1e-9 points; empty when all agree."""
    problems = []
    for name, value in expected().items():
        given = answers.get(name)
        if not isinstance(given, int | float):
            problems.append(f"{name}: no answer (expected {value:.6f})")
        elif not abs(given - value) <= TOLERANCE:
            problems.append(f"{name}: expected {value:.6f}, got {given:.6f}")
    return problems
