"""What the command line does with a user's own data: score maps, train, evaluate, search. Not tied to any table.

Training is imported where it is needed: scoring maps does not wait for it.
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsol_eval.data import FolderSource, SceneSource, Source, WSOLDataset
from wsol_eval.evaluate import Report, evaluate, score_maps
from wsol_eval.intervals import Interval, bootstrap, paired
from wsol_eval.metadata import Metadata, read_metadata
from wsol_eval.recipe import OnData, Recipe
from wsol_eval.scenes import CLASSES, TEST_SCENES, TRAIN_SCENES, make_split
from wsol_eval.scoremaps import ScoreMaps
from wsol_eval.sweep import Convention

if TYPE_CHECKING:
    from wsol_eval.protocol import FslValidation


def source_of(on: OnData, split: str) -> Source:
    """A split of the scenes, or of a data set under the data root."""
    if on.dataset.startswith("scenes"):
        if on.dataset not in ("scenes", "scenes-ill-posed"):
            raise ValueError(f"dataset: scenes or scenes-ill-posed was expected, got {on.dataset!r}")
        count = {"train": TRAIN_SCENES, "val": max(1, on.per_class) * CLASSES, "test": TEST_SCENES}[split]
        return SceneSource(make_split(split, count, on.seed, on.dataset == "scenes-ill-posed"), split)
    dataset = WSOLDataset(
        on.data_root / on.dataset,
        on.data_root / "metadata" / on.dataset,
        split,
        full_supervision_per_class=on.per_class or None,
        proxy=on.proxy,
        cache=on.cache,
        skip_broken=on.skip_broken,
    )
    return FolderSource(dataset, on.workers)


def train(recipe: Recipe, on: OnData, output: Path, checkpoint_every: int, compile_model: bool) -> None:
    """Train one model; fsl is fitted on train-fullsup, the others on train-weaksup."""
    from wsol_eval.train import fit, make_fabric

    fabric = make_fabric(on.device, on.precision)
    source = source_of(on, "val" if recipe.method == "fsl" else "train")
    fit(recipe, source, on.seed, fabric, output, checkpoint_every, compile_model)


def evaluate_checkpoint(
    checkpoint: Path,
    on: OnData,
    split: str,
    cam_curve_interval: float,
    tau: float | None,
    scoremap_root: Path | None,
    scoremap_dtype: str,
) -> dict[str, Any]:
    """Everything measured of a checkpoint on a split."""
    from wsol_eval.train import load_trained, make_fabric

    source = source_of(on, split)
    network, recipe = load_trained(checkpoint, source.num_classes)
    fabric = make_fabric(on.device, on.precision)
    store = ScoreMaps(scoremap_root, scoremap_dtype) if scoremap_root else None
    report = evaluate(network, source, fabric, cam_curve_interval, store=store)
    facts = {"dataset": on.dataset, "split": split, "method": recipe.method, "arch": recipe.arch}
    return facts | describe(report, tau)


def search(
    output: Path,
    recipe: Recipe,
    on: OnData,
    trials: int,
    space: str,
    criterion: str,
    cam_curve_interval: float,
    fsl_validation: FslValidation,
) -> dict[str, Any]:
    """The protocol of one method; the ledger's counts stand beside the result."""
    from wsol_eval.protocol import Ledger, run_in_folder
    from wsol_eval.train import make_fabric

    sources = {split: source_of(on, split) for split in ("train", "val", "test")}
    options = (
        sources,
        make_fabric(on.device, on.precision),
        output,
        criterion,
        cam_curve_interval,
        fsl_validation,
    )
    found, entry = run_in_folder(recipe, space, trials, on.seed, *options)
    ledger = Ledger(output / "ledger.jsonl")
    chosen = ledger.find("trial", method=found.method, trial=found.best)[0]["hyperparameters"]
    return {
        "method": found.method,
        "trials": list(found.values),
        "chosen": chosen,
        "test": entry["metrics"],
    } | ledger.counts()


def score(
    scoremap_root: Path,
    metadata_root: Path,
    split: str,
    dataset_name: str,
    *,
    mask_root: Path | None,
    cam_curve_interval: float,
    native: bool,
    box_convention: Convention,
    predictions: Path | None,
    tau: float | None,
    tau_from: Path | None,
    intervals: bool,
    baseline_root: Path | None,
    overlays: Path | None,
    image_root: Path | None,
) -> dict[str, Any]:
    """Everything measured of score maps on disk."""
    if overlays and image_root is None:
        raise ValueError("overlays: image_root is needed as well")
    metadata = read_metadata(metadata_root / split)
    if not metadata.boxes and not metadata.masks:
        raise ValueError(f"{metadata_root / split}: no boxes or masks in localization.txt")
    resampled = intervals or baseline_root is not None
    measure = partial(
        score_maps,
        metadata=metadata,
        interval=cam_curve_interval,
        native=native,
        convention=box_convention,
        keep_images=resampled,
        mask_root=mask_root or scoremap_root,
    )
    report = measure(ScoreMaps(scoremap_root), predictions=read_predictions(predictions) if predictions else None)
    transferred = json.loads(tau_from.read_text()) if tau_from else None
    result = {"dataset": dataset_name, "split": split} | describe(report, tau, transferred)
    if resampled and report.all is not None:
        result["intervals"] = _intervals(bootstrap(report.all))
        if baseline_root:
            baseline = measure(ScoreMaps(baseline_root)).all
            assert baseline is not None  # the same metadata
            result["difference_to_baseline"] = _intervals(paired(report.all, baseline))
    if overlays and image_root:
        shown_at = report.largest.tau_star[0.5] if report.largest else 0.5
        write_overlays(overlays, image_root, ScoreMaps(scoremap_root), metadata, shown_at)
    return result


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
        return result | {"metric": "PxAP, all pixels pooled", "bins": len(report.pixels.taus)}
    result["metric"] = "max_box_acc: largest contour, IoU 50; max_box_acc_v2: all contours, mean over IoU 30, 50, 70"
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
                raise ValueError(f"{path}, line {number}: id and whole numbers of classes were expected, got {row}")
            found[row[0]] = [int(value) for value in row[1:]]
    return found


def write_overlays(output: Path, image_root: Path, store: ScoreMaps, metadata: Metadata, tau: float) -> None:
    """Every image of the split under its map, with the box at `tau`."""
    from PIL import Image

    from wsol_eval.overlays import overlay, save_overlay

    for name in metadata.image_ids:
        path = image_root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image")
        score_map = store.read(name)
        shown = score_map / 255 if score_map.dtype == np.uint8 else score_map.astype(np.float64)
        boxes = metadata.boxes_at(name, shown.shape) if metadata.boxes else np.zeros((0, 4), np.int64)
        with Image.open(path) as image:
            save_overlay(output / f"{name}.png", overlay(image, shown, boxes, tau))
