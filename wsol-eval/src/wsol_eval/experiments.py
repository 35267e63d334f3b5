"""From the settings of a table's row to the outcome of a run: every row is a view on the protocol's reports."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, load_tables, settings_hash
from wsol_eval import protocol
from wsol_eval.data import FolderSource, SceneSource, Source, WSOLDataset
from wsol_eval.evaluate import Report, evaluate_center
from wsol_eval.localization import BoxLocalization
from wsol_eval.metadata import Metadata, read_metadata
from wsol_eval.models import WSOLNetwork
from wsol_eval.recipe import Recipe
from wsol_eval.scenes import CLASSES, TEST_SCENES, TRAIN_SCENES, Scenes, make_split
from wsol_eval.scoremaps import center_gaussian, resize_normalize
from wsol_eval.train import fit, make_fabric

PROJECT = Path(__file__).parents[2]
PACKAGES = ("numpy", "numba", "torchvision")
FIXTURES = Path(__file__).parent / "fixtures"
SCENES = ("scenes", "scenes-ill-posed")
SHOWN = 4  # test images whose score maps are kept for the qualitative figure


@dataclass(frozen=True)
class Settings:
    """Everything a table file may set."""

    experiment: str = "report"
    """report, tau, trials or center; max or mean of `parts`"""
    parts: tuple[dict, ...] = ()
    """of max and mean: what each part sets on top of this row"""
    dataset: str = "scenes"
    """scenes, scenes-ill-posed; CUB, ILSVRC or OpenImages under the data root; cubv2-sample (shipped boxes)"""
    split: str = "test"
    """evaluated split of `center`"""
    method: str = "cam"
    """cam, has, acol, spg, adl, cutmix, fsl or center"""
    arch: str = "small"
    """vgg16, inception_v3, resnet50 or small"""
    space: str = "scenes"
    """hyperparameters searched: scenes, paper, or fixed (as set below)"""
    trials: int = 30
    """of the random search, equal for all methods"""
    per_class: int = 5
    """fully labelled images per class"""
    criterion: str = "max_box_acc_v2"
    """of the search: max_box_acc_v2 or pxap"""
    interval: float = 0.001
    """step between thresholds"""
    tau: float = -1.0
    """fixed threshold of `tau`; below 0 the best one"""
    sigma: float = 0.5
    """of the centre Gaussian"""
    feature_map: int = 14
    """side of the score map"""
    lr: float = 1e-3
    """learning rate"""
    lr_classifier_ratio: float = 10.0
    """of new layers"""
    weight_decay: float = 5e-4
    """of SGD"""
    epochs: int = 50
    """passes over train-weaksup"""
    lr_decay_frequency: int = 15
    """epochs"""
    batch_size: int = 32
    """over all ranks"""
    has_grid_size: int = 56
    """HaS, pixels"""
    has_drop_rate: float = 0.5
    """HaS"""
    acol_threshold: float = 0.6
    """ACoL"""
    adl_drop_rate: float = 0.75
    """ADL"""
    adl_threshold: float = 0.9
    """ADL"""
    spg: tuple = ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1))
    """SPG"""
    cutmix_beta: float = 1.0
    """CutMix"""
    cutmix_prob: float = 1.0
    """CutMix"""
    fsl_epochs: int = 100
    """passes of fsl over train-fullsup; its learning rate falls once, after half of them"""
    fsl_batch_size: int = 10
    """batch of fsl"""
    keep_maps: bool = False
    """keep score maps and curves in the record, for the figures"""

    @classmethod
    def of(cls, raw: dict) -> Settings:
        """Settings of a table file; lists become tuples."""
        tuples = {name: tuple(map(tuple, raw[name])) for name in ("spg",) if name in raw}
        return cls(**raw | tuples | ({"parts": tuple(raw["parts"])} if "parts" in raw else {}))

    def recipe(self) -> Recipe:
        """How a model of `method` is trained."""
        shared = {field.name for field in fields(Recipe)} & {field.name for field in fields(self)}
        recipe = Recipe(**{name: getattr(self, name) for name in shared})
        if self.method == "fsl":
            decay = max(1, self.fsl_epochs // 2)
            recipe = replace(recipe, epochs=self.fsl_epochs, lr_decay_frequency=decay, batch_size=self.fsl_batch_size)
        return recipe


def tables() -> list[Table]:
    """The project's table files. FileNotFoundError outside a source checkout."""
    if not (PROJECT / "tables").is_dir():
        raise FileNotFoundError("the tables are in the source checkout: run from an editable install of it")
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    data_root: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
) -> RunLog:
    """Run what runs/ lacks of the chosen tables at a scale; returns that log.

    All rows of a seed on the same scenes are one unit of work: they share their searches.
    """
    log = RunLog(PROJECT / "runs" / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    execute = partial(execute_together, data_root=data_root)
    run_missing(
        "wsol-eval",
        runs,
        log,
        execute,
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        group=unit_of,
    )
    return log


def unit_of(run: Run) -> tuple:
    """Runs with the same value are executed together."""
    dataset = run.settings.get("dataset", "scenes")
    return (dataset, run.seed) if dataset in SCENES else run.key


def execute_together(settings: Sequence[dict], seeds: Sequence[int], data_root: Path) -> list[Outcome]:
    """Several runs, one after the other; what they have in common is computed once."""
    torch.set_num_threads(1 if settings[0].get("dataset", "scenes") in SCENES else torch.get_num_threads())
    return [execute(each, seed, data_root) for each, seed in zip(settings, seeds, strict=True)]


def execute(settings: dict, seed: int, data_root: Path) -> Outcome:
    """One run."""
    s = Settings.of(settings)
    dataset = {"name": s.dataset, "seed": seed if s.dataset in SCENES else None}
    plain = replace(s, experiment="report", tau=-1.0, keep_maps=False)
    match s.experiment:
        case "center":
            return Outcome(*_center_on_boxes(s, data_root), dataset)
        case "trials":
            values = _protocol(plain, seed, data_root)[0]
            kept = [value for value in values if value is not None]
            metrics = {"best_trial": max(kept), "median_trial": float(np.median(kept)), "worst_trial": min(kept)}
            return Outcome(metrics, {"values": values}, dataset)
        case "tau":
            return Outcome(_at_tau(plain, s.tau, seed, data_root), {}, dataset)
        case "max" | "mean":
            whole = {name: value for name, value in settings.items() if name not in ("experiment", "parts")}
            each = [execute(whole | part, seed, data_root).metrics for part in s.parts]
            combine = max if s.experiment == "max" else np.mean
            names = sorted(set.intersection(*map(set, each)))
            return Outcome({name: float(combine([found[name] for found in each])) for name in names}, {}, dataset)
        case "report":
            values, _, details = _protocol(plain, seed, data_root)
            shown: dict[str, Any] = {"values": values} | (details if s.keep_maps else {})
            if s.dataset in SCENES and s.method != "center":
                shown |= _chosen(plain, seed) | (_shown(plain, seed) if s.keep_maps else {})
            return Outcome(_metrics(plain, seed, data_root), shown, dataset)
    raise ValueError(f"unknown experiment {s.experiment!r}")


def _protocol(s: Settings, seed: int, data_root: Path) -> tuple[list, dict[str, float], dict[str, Any]]:
    """Criterion of every trial on train-fullsup, metrics and details of the one report on test."""
    if s.dataset not in SCENES:
        return _protocol_on_disk(s, seed, data_root)
    report = _report(s, seed)
    values = [] if s.method == "center" else list(_searched(s, seed)[0].values)
    return values, report.metrics(), report.details()


def _metrics(s: Settings, seed: int, data_root: Path) -> dict[str, float]:
    """A method's numbers on test, and beside those of the centre, CAM and FSL on the same images."""
    found = dict(_protocol(s, seed, data_root)[1])
    if s.dataset not in SCENES:
        return found
    center = _protocol(replace(s, method="center"), seed, data_root)[1]
    found["v2_over_center"] = found["max_box_acc_v2"] - center["max_box_acc_v2"]
    found["pxap_over_center"] = found["pxap"] - center["pxap"]
    found["pxap_over_constant"] = found["pxap"] - found["pxap_constant_map"]
    if s.dataset == "scenes":
        cam, fsl = (_protocol(replace(s, method=name), seed, data_root)[1]["max_box_acc_v2"] for name in ("cam", "fsl"))
        found["share_of_fsl_gap"] = (found["max_box_acc_v2"] - cam) / (fsl - cam)
    return found


def _at_tau(s: Settings, tau: float, seed: int, data_root: Path) -> dict[str, float]:
    """GT-known accuracy (largest contour, IoU 50) at a threshold of the stored curve, or at the best one."""
    _, metrics, details = _protocol(s, seed, data_root)
    if tau < 0:
        return {"gt_known_accuracy": metrics["max_box_acc"], "tau": details["tau_star_largest"]}
    place = int(np.abs(np.array(details["taus"]) - tau).argmin())
    return {"gt_known_accuracy": details["curve_largest_50"][place], "tau": details["taus"][place]}


# ---- scenes ------------------------------------------------------------


@lru_cache(maxsize=16)
def _split(dataset: str, name: str, seed: int, per_class: int = 5) -> Scenes:
    count = {"train": TRAIN_SCENES, "val": per_class * CLASSES, "test": TEST_SCENES}[name]
    return make_split(name, count, seed, ill_posed=dataset == "scenes-ill-posed")


@lru_cache(maxsize=1)
def _cpu() -> Fabric:
    return make_fabric("cpu")


@lru_cache(maxsize=256)
def _trained(dataset: str, recipe: Recipe, seed: int) -> WSOLNetwork:
    """A model of one trial; how many fully labelled images judge it does not matter for its training."""
    return fit(recipe, SceneSource(_split(dataset, "train", seed)), seed, _cpu())


@lru_cache(maxsize=256)
def _searched(s: Settings, seed: int) -> tuple[protocol.Search, WSOLNetwork, protocol.Ledger]:
    ledger, val = protocol.Ledger(), SceneSource(_split(s.dataset, "val", seed, s.per_class))
    options = (s.space, s.trials, seed)
    if s.method == "fsl":
        found, network = protocol.search_fsl(
            s.recipe(), *options, val, _cpu(), ledger, s.criterion, s.interval,
        )  # fmt: skip
        return found, network, ledger

    def train(recipe: Recipe, trial: int) -> WSOLNetwork:
        return _trained(s.dataset, recipe, seed)

    found = protocol.search(s.recipe(), *options, train, val, _cpu(), ledger, s.criterion, s.interval)
    return found, train(found.recipe, found.best), ledger


@lru_cache(maxsize=256)
def _report(s: Settings, seed: int) -> Report:
    """The one report on test of a method."""
    test = SceneSource(_split(s.dataset, "test", seed))
    if s.method == "center":
        return evaluate_center(test, _cpu(), s.interval)
    _, network, ledger = _searched(s, seed)
    return protocol.report_once(s.method, network, test, _cpu(), ledger, s.interval)[0]


def _chosen(s: Settings, seed: int) -> dict[str, Any]:
    """The chosen trial, and how much full supervision it took."""
    found, _, ledger = _searched(s, seed)
    return {"hyperparameters": protocol.draw(s.space, s.method, seed, found.best), "ledger": ledger.counts()}


def _shown(s: Settings, seed: int) -> dict[str, str]:
    """Score maps of the first test images, (SHOWN, 32, 32) uint8, compressed."""
    network, test = _searched(s, seed)[1], _split(s.dataset, "test", seed)[:SHOWN]
    maps = resize_normalize(network.predict(test.images, test.labels)[1], test.masks.shape[1:])
    packed = zlib.compress((maps * 255).to(torch.uint8).numpy().tobytes(), 9)
    return {"maps": base64.b64encode(packed).decode()}


# ---- the paper's data sets ------------------------------------------------------------


def sources_of(dataset: str, data_root: Path, per_class: int, workers: int = 8) -> dict[str, Source]:
    """train, val and test of a data set under the data root, with metadata in <data root>/metadata/<dataset>."""
    images, metadata = data_root / dataset, data_root / "metadata" / dataset
    found: dict[str, Source] = {}
    for split in ("train", "val", "test"):
        limit = per_class if split == "val" else None
        part = WSOLDataset(images, metadata, split, full_supervision_per_class=limit)
        found[split] = FolderSource(part, workers)
    return found


@lru_cache(maxsize=1024)
def _protocol_on_disk(s: Settings, seed: int, data_root: Path) -> tuple[list, dict[str, float], dict[str, Any]]:
    """The whole protocol on CUDA, resumable: its folder is named by its settings."""
    sources, fabric = sources_of(s.dataset, data_root, s.per_class), make_fabric()
    if s.method == "center":
        report = evaluate_center(sources["test"], fabric, s.interval)
        return [], report.metrics(), report.details()
    weights = data_root / "weights" / f"{s.arch}.pth"
    recipe = replace(s.recipe(), pretrained=str(weights) if weights.is_file() else "imagenet")
    name = settings_hash({field.name: getattr(s, field.name) for field in fields(s)} | {"seed": seed})
    folder = PROJECT / "runs" / "protocol" / f"{s.dataset}-{s.arch}-{s.method}-{name}"
    options = (recipe, s.space, s.trials, seed, sources, fabric, folder, s.criterion, s.interval)
    found, entry = protocol.run_in_folder(*options)
    return list(found.values), entry["metrics"], entry["details"]


def _center_on_boxes(s: Settings, data_root: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The centre baseline on boxes alone: no image is read."""
    shipped = s.dataset == "cubv2-sample"
    folder = FIXTURES / "CUBV2" if shipped else data_root / "metadata" / s.dataset / s.split
    metadata = read_metadata(folder)
    both = center_on_boxes(metadata, s.sigma, s.interval)
    checksum = hashlib.sha256((folder / "localization.txt").read_bytes()).hexdigest()
    metrics = {f"v2_iou{round(100 * delta)}": value for delta, value in both["all"].max_box_acc.items()}
    metrics |= {"max_box_acc_v2": both["all"].max_box_acc_v2, "max_box_acc": both["largest"].max_box_acc[0.5]}
    return metrics, {"images": both["all"].n, "localization_sha256": checksum}


def center_on_boxes(metadata: Metadata, sigma: float = 0.5, interval: float = 0.001) -> dict[str, Any]:
    """BoxResult of the centre Gaussian, for contours "all" and "largest"."""
    gaussian, found = center_gaussian(224, sigma), {}
    for contours in ("all", "largest"):
        metric = BoxLocalization(contours=contours, cam_curve_interval=interval)
        for begin in range(0, len(metadata.image_ids), 500):
            names = metadata.image_ids[begin : begin + 500]
            boxes = [metadata.boxes_at(name, 224) for name in names]
            metric.update(np.broadcast_to(gaussian, (len(names), 224, 224)), boxes, image_ids=names)
        found[contours] = metric.compute()
    return found
