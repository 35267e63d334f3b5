"""Score maps on disk as the reference's users score them, and more: errors, classes, intervals, differences."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wsol_eval.errors import breakdown
from wsol_eval.evaluate import Report
from wsol_eval.intervals import Interval, bootstrap, paired
from wsol_eval.metadata import Metadata, read_metadata
from wsol_eval.scoremaps import ScoreMaps
from wsol_eval.storedmaps import Scoring, score_maps


def score(
    scoremap_root: Path,
    metadata_root: Path,
    split: str,
    dataset_name: str,
    scoring: Scoring,
    *,
    mask_root: Path,
    multi_contour_eval: bool,
    multi_iou_eval: bool,
    predictions: Path | None,
    tau: float | None,
    tau_from: Path | None,
    intervals: bool,
    baseline_root: Path | None,
    per_class: bool,
    errors: bool,
    overlays: Path | None,
    image_root: Path | None,
) -> dict[str, Any]:
    """Everything measured of score maps on disk."""
    metadata = read_metadata(_metadata_folder(metadata_root, dataset_name, split))
    if overlays and image_root is None:
        raise ValueError("--overlays needs the folder of the images: pass --image-root as well")
    if not metadata.boxes and not metadata.masks:
        raise ValueError(f"{metadata_root}: no boxes or masks in localization.txt of {split}")
    of_boxes = {"tau-from": tau_from, "per-class": per_class, "errors": errors}
    of_boxes |= {"view": scoring.view != "resize", "box-convention": scoring.convention != "reference"}
    given = [f"--{name}" for name, value in of_boxes.items() if value]
    if metadata.masks and given:
        raise ValueError(f"{', '.join(given)}: this needs boxes, and the metadata has masks")
    if scoring.fit == "native" and scoring.view == "center-crop":
        raise ValueError("--native maps show the whole image: --view center-crop does not go with them")
    store, resampled = ScoreMaps(scoremap_root), intervals or baseline_root is not None
    masks = mask_root / dataset_name if (mask_root / dataset_name).is_dir() else mask_root
    scoring = replace(scoring, keep_images=resampled or per_class)
    measure = partial(score_maps, metadata=metadata, scoring=scoring, mask_root=masks)
    report = measure(store, predictions=read_predictions(predictions) if predictions else None)
    transferred = json.loads(tau_from.read_text()) if tau_from else None
    result = {"dataset": dataset_name, "split": split} | describe(report, tau, transferred)
    result["localization"] = reference_number(report, multi_contour_eval, multi_iou_eval)
    if resampled:
        result["intervals"] = _intervals(bootstrap(_main(report)))
    if baseline_root:
        result["difference_to_baseline"] = _intervals(paired(_main(report), _main(measure(ScoreMaps(baseline_root)))))
    best = report.largest.tau_star[_half(report)] if report.largest else 0.5
    if per_class:
        result["per_class"] = classes_of(report, metadata)
    if errors:
        at = best if tau is None else tau
        pairs = ((scoring.read(store, n, metadata.image_sizes[n]), scoring.boxes(n, metadata)) for n in metadata.boxes)
        result["errors"] = {"tau": at} | breakdown(pairs, at, scoring.convention)
    if overlays and image_root:
        write_overlays(overlays, image_root, store, metadata, scoring, best)
    return result


def _metadata_folder(root: Path, dataset_name: str, split: str) -> Path:
    """<root>/<data set>/<split>, as the reference has it, or else <root>/<split>."""
    nested = root / dataset_name / split
    return nested if nested.is_dir() else root / split


def _main(report: Report) -> Any:
    """The result that intervals are about: all contours on boxes, else pixels."""
    return report.pixels if report.all is None else report.all


def _half(report: Report) -> float:
    """The IoU threshold next to 0.5."""
    assert report.largest is not None
    return min(report.largest.iou_thresholds, key=lambda delta: abs(delta - 0.5))


def reference_number(report: Report, multi_contour_eval: bool, multi_iou_eval: bool) -> float:
    """The one number that the reference's evaluation.py prints for these flags. ValueError where it would end."""
    if report.all is None or report.largest is None:
        assert report.pixels is not None
        return report.pixels.pxap
    found = report.all if multi_contour_eval else report.largest
    if multi_iou_eval:
        return found.max_box_acc_v2
    if 0.5 not in found.max_box_acc:
        raise ValueError("iou_threshold_list: expected 50 among them; add it, or pass --multi_iou_eval")
    return found.max_box_acc[0.5]


def classes_of(report: Report, metadata: Metadata) -> dict[str, dict[str, float]]:
    """Images and V2 of each class, at the thresholds that are best for the whole split."""
    found = report.all
    assert found is not None and found.images is not None
    places = found.curve.argmax(1)
    bits = np.unpackbits(found.images, axis=-1, count=len(found.taus))  # (n, D, T)
    right = bits[:, np.arange(len(places)), places].mean(1)
    labels = np.array([metadata.class_labels[name] for name in found.image_ids])
    return {
        str(label): {"images": int((labels == label).sum()), "v2": 100 * float(right[labels == label].mean())}
        for label in np.unique(labels)
    }


def describe(report: Report, tau: float | None = None, transferred: dict | None = None) -> dict[str, Any]:
    """A report as plain values, with the names of metrics and conventions spelled out.

    Args:
        report: of one split.
        tau: fixed threshold to report at as well.
        transferred: the result of another split, whose best thresholds are applied to this one.
    """
    result: dict[str, Any] = {"images": report.n} | report.metrics()
    if report.all is None or report.largest is None:
        assert report.pixels is not None, "no boxes and no masks"
        result |= {"metric": "PxAP, all pixels pooled", "bins": len(report.pixels.taus)}
        return result | ({} if tau is None else {"fixed_tau_pixels": {"tau": tau} | report.pixels.at(tau)})
    deltas = ", ".join(f"{round(100 * delta)}" for delta in report.all.iou_thresholds)
    result["metric"] = f"max_box_acc: largest contour, IoU 50; max_box_acc_v2: all contours, mean over IoU {deltas}"
    result["protocol"] = "each maximum over tau is taken on this very split, as in the paper"
    result["box_convention"], result["thresholds"] = report.all.box_convention, len(report.all.taus)
    for name, box in (("all", report.all), ("largest", report.largest)):
        result[f"contours_{name}"] = _by_iou(box.max_box_acc)
        result[f"tau_star_{name}"] = _by_iou(box.tau_star)
        if box.top1_loc is not None and box.top5_loc is not None:
            result[f"top1_loc_{name}"], result[f"top5_loc_{name}"] = _by_iou(box.top1_loc), _by_iou(box.top5_loc)
        if tau is not None:
            result[f"fixed_tau_{name}"] = {"tau": tau} | _by_iou(box.at(tau))
        if transferred is not None:
            taus = {float(key[3:]) / 100: value for key, value in transferred[f"tau_star_{name}"].items()}
            moved = box.at(taus)
            result[f"transferred_tau_{name}"] = _by_iou(moved) | {"mean": float(np.mean(list(moved.values())))}
    return result


def _by_iou(values: dict[float, float]) -> dict[str, float]:
    return {f"iou{round(100 * delta)}": value for delta, value in values.items()}


def _intervals(found: dict[str, Interval]) -> dict[str, dict]:
    kept = {name: {"value": i.value, "low": i.low, "high": i.high, "p": i.p} for name, i in found.items()}
    return {name: {key: value for key, value in each.items() if value is not None} for name, each in kept.items()}


def read_predictions(path: Path) -> dict[str, list[int]]:
    """id,class,class,... best first. FileNotFoundError, or ValueError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of predictions")
    found = {}
    with open(path, newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) < 2 or not all(value.strip().lstrip("-").isdigit() for value in row[1:]):
                raise ValueError(f"{path}, line {number}: expected id and whole numbers of classes, got {row}")
            found[row[0]] = [int(value) for value in row[1:]]
    return found


def write_overlays(
    output: Path, image_root: Path, store: ScoreMaps, metadata: Metadata, scoring: Scoring, tau: float
) -> None:
    """Every image of the split under its map, with the box at `tau`."""
    from wsol_eval.data import read_annotated
    from wsol_eval.overlays import overlay, save_overlay

    if scoring.view == "center-crop":
        raise ValueError("--overlays shows whole images: --view center-crop does not go with it")
    for name in metadata.image_ids:
        size = metadata.image_sizes.get(name)
        image = read_annotated(image_root / name, size)
        score_map = scoring.read(store, name, size or image.size)
        shown = score_map / 255 if score_map.dtype == np.uint8 else score_map.astype(np.float64)
        boxes = scoring.boxes(name, metadata) if metadata.boxes else np.zeros((0, 4), np.int64)
        save_overlay(output / f"{name}.png", overlay(image, shown, boxes, tau))
