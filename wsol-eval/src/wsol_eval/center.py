"""The centre baseline (the paper's section 5): one Gaussian for every image. On boxes it needs no image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shared_utils.runlog import Outcome
from wsol_eval.boxes import box_iou_inclusive
from wsol_eval.conformance import FIXTURES
from wsol_eval.evaluate import Report
from wsol_eval.localization import BoxResult
from wsol_eval.metadata import Metadata, read_metadata
from wsol_eval.scoremaps import center_gaussian
from wsol_eval.sources import smaller_than_the_papers
from wsol_eval.sweep import Contours, boxes_at_level, check_maps, thresholds


def center_outcome(dataset: str, split: str, data_root: Path, sigma: float, interval: float) -> Outcome:
    """The centre baseline on boxes alone: no image is read."""
    folder = FIXTURES / "CUBV2" if dataset == "cubv2-sample" else data_root / "metadata" / dataset / split
    metadata = read_metadata(folder)
    both = center_on_boxes(metadata, sigma, interval)
    report = Report(both["all"], both["largest"], None, None, None, both["all"].n)
    metrics = report.metrics()
    first = replace(metadata, boxes={name: each[:1] for name, each in metadata.boxes.items()})
    metrics["max_box_acc_first_box"] = center_on_boxes(first, sigma, interval, ("largest",))["largest"].max_box_acc[0.5]
    counts, boxes = {split: both["all"].n}, file_checksum(folder / "localization.txt")
    facts = {"name": dataset, "split": split, "images": counts, "checksum": boxes}
    return Outcome(metrics, report.details(), facts, caveats=smaller_than_the_papers(dataset, counts))


def center_on_boxes(
    metadata: Metadata, sigma: float = 0.5, interval: float = 0.001, modes: Sequence[Contours] = ("all", "largest")
) -> dict[str, BoxResult]:
    """BoxResult of the centre Gaussian, for each way to take contours.

    The map is the same for every image: its boxes at a level are found once, then compared with all of the split.
    """
    grey, taus, deltas = check_maps(center_gaussian(224, sigma)), thresholds(interval), (0.3, 0.5, 0.7)
    known = [metadata.boxes_at(name, 224) for name in metadata.image_ids]
    truth, firsts = np.concatenate(known), np.cumsum([0, *map(len, known[:-1])])
    found: dict[str, BoxResult] = {}
    for contours in modes:
        best = np.empty((256, len(known)))
        for level in range(256):
            iou = box_iou_inclusive(boxes_at_level(grey, level, contours), truth).max(0)
            best[level] = np.maximum.reduceat(iou, firsts)
        levels = (taus * float(grey.max())).astype(np.int64)
        curve = 100 * np.stack([(best >= delta).mean(1)[levels] for delta in deltas])
        found[contours] = BoxResult(deltas, taus, curve, None, None, len(known), contours, "reference")
    return found


@lru_cache(maxsize=8)
def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
