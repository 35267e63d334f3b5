"""From the settings of a table's row to the outcome of a run: every row is a view on the protocol's reports."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from shared_utils.folders import project_folder, runs_folder
from shared_utils.preflight import Need, disk_space, package
from shared_utils.preflight import file as need_file
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, load_tables, settings_hash
from wsol_eval import kangaroo_raccoon, protocol
from wsol_eval.center import center_outcome, file_checksum
from wsol_eval.cutouts import DATASETS, SIDE
from wsol_eval.evaluate import evaluate_center
from wsol_eval.models import Network, efficientnet
from wsol_eval.models.build import PRETRAINED
from wsol_eval.recipe import OnData, OnDevice, Recipe
from wsol_eval.scoremaps import resize_normalize
from wsol_eval.sources import (
    METADATA_REMEDY,
    SPLITS,
    MemorySource,
    needs_of,
    smaller_than_the_papers,
    source_of,
    sources_of,
)
from wsol_eval.train import fit, make_fabric

PROJECT = project_folder(__file__)
PACKAGES = ("numpy", "numba", "torchvision", "scikit-image", "scikit-learn")
SHOWN = 4  # test images whose score maps are kept for the qualitative figure
WEIGHTS_REMEDY = "`wsol-eval data weights --data-root ...` puts torchvision's there, checked by hash"


@dataclass(frozen=True)
class Settings:
    """Everything a table file may set."""

    experiment: str = "report"
    """report, tau, trials or center; max or mean of `parts`"""
    parts: tuple[dict, ...] = ()
    """of max and mean: what each part sets on top of this row"""
    dataset: str = "photographs"
    """see `OnData`; cubv2-sample: the shipped boxes"""
    split: str = "test"
    """evaluated split of `center`"""
    method: str = "cam"
    """cam, has, acol, spg, adl, cutmix, fsl or center"""
    arch: str = "small"
    """vgg16, inception_v3, resnet50, efficientnet_lite0 or small"""
    space: str = "photographs"
    """hyperparameters searched: photographs, paper, fine-tuning, or fixed (as set below)"""
    trials: int = 30
    """of the random search, equal for all methods"""
    per_class: int = 0
    """fully labelled images per class; 0: the paper's"""
    criterion: str = "auto"
    """of the search: max_box_acc_v2, pxap, or auto: as the data allow"""
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
    acol_threshold: float = 0.7
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
    """The project's table files."""
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    on: OnData,
    device: OnDevice,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
) -> RunLog:
    """Run what runs/ lacks of the chosen tables at a scale; returns that log.

    All rows of a seed on the same built-in images are one unit of work: they share their searches.

    Raises:
        Missing: data, weights or disk space that any of the runs lacks, all of it at once.
    """
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    run_missing(
        "wsol-eval",
        runs,
        log,
        partial(execute_together, on=on, device=device),
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        group=unit_of,
        needs=partial(needs, on=on),
    )
    return log


def unit_of(run: Run) -> tuple:
    """Runs with the same value are executed together."""
    dataset = run.settings.get("dataset", "photographs")
    return (dataset, run.seed) if dataset in DATASETS else run.key


def needs(settings: dict, on: OnData) -> Iterator[Need]:
    """Data, weights and disk space of a run, and of all its parts."""
    whole = {name: value for name, value in settings.items() if name not in ("experiment", "parts")}
    for part in settings.get("parts", ()):
        yield from needs(whole | part, on)
    if settings.get("parts") or settings.get("dataset") == "cubv2-sample":
        return
    s = Settings.of(settings)
    on = replace(on, dataset=s.dataset, per_class=s.per_class)
    if s.experiment == "center" or (s.method == "center" and s.dataset not in (*DATASETS, kangaroo_raccoon.DATASET)):
        folder = on.data_root / "metadata" / s.dataset / s.split
        yield need_file(folder / "localization.txt", f"metadata of {s.dataset}, {s.split}", METADATA_REMEDY)
        if s.dataset == "OpenImages":
            yield from _needs_of_dataset(on, (s.split,))
        return
    yield from _needs_of_dataset(on)
    if s.dataset in DATASETS:
        return
    yield disk_space(runs_folder(PROJECT), 2_000)
    if s.arch in PRETRAINED:
        weights = on.data_root / "weights" / f"{s.arch}.pth"
        yield need_file(weights, f"ImageNet weights of {s.arch}", WEIGHTS_REMEDY)
    if s.arch == "efficientnet_lite0":
        yield from (package(name, efficientnet.REMEDY) for name in efficientnet.PACKAGES)


@lru_cache(maxsize=64)
def _needs_of_dataset(on: OnData, splits: tuple[str, ...] = SPLITS) -> tuple[Need, ...]:
    return tuple(needs_of(on, splits))


def execute_together(settings: Sequence[dict], seeds: Sequence[int], on: OnData, device: OnDevice) -> list[Outcome]:
    """Several runs, one after the other; what they have in common is computed once."""
    torch.set_num_threads(1 if settings[0].get("dataset", "photographs") in DATASETS else torch.get_num_threads())
    return [execute(each, replace(on, seed=seed), device) for each, seed in zip(settings, seeds, strict=True)]


def execute(settings: dict, on: OnData, device: OnDevice = OnDevice()) -> Outcome:  # noqa: B008  # frozen
    """One run: the settings of a table's row on the data root, seed and workers of `on`."""
    s = Settings.of(settings)
    on = replace(on, dataset=s.dataset, per_class=s.per_class)
    if s.experiment == "center":
        return center_outcome(s.dataset, s.split, on.data_root, s.sigma, s.interval)
    if s.experiment in ("max", "mean"):
        whole = {name: value for name, value in settings.items() if name not in ("experiment", "parts")}
        return _combined(s.experiment, [execute(whole | part, on, device) for part in s.parts])
    plain = replace(s, experiment="report", tau=-1.0, keep_maps=False)
    found = protocol_of(plain, on, device)
    match s.experiment:
        case "trials":
            values = found.details["values"]
            done = [value for value in values if value is not None]
            metrics = {"best_trial": max(done), "median_trial": float(np.median(done)), "worst_trial": min(done)}
            return replace(found, metrics=metrics, details={"values": values})
        case "tau":
            return replace(found, metrics=_at_tau(found, s.tau), details={})
        case "report":
            kept = found.details if s.keep_maps else {"values": found.details.get("values", [])}
            if s.dataset not in DATASETS:
                return replace(found, details=kept)
            shown = {} if s.method == "center" else chosen(plain, on)
            shown |= score_maps_shown(plain, on) if s.keep_maps and s.method != "center" else {}
            return replace(found, metrics=_beside_the_baselines(plain, on, found.metrics), details=kept | shown)
    raise ValueError(f"experiment: expected report, tau, trials, center, max or mean, got {s.experiment!r}")


def protocol_of(s: Settings, on: OnData, device: OnDevice) -> Outcome:
    """Metrics of the one report on test; details hold the criterion of every trial on train-fullsup."""
    if s.dataset in DATASETS:
        return in_memory(s, on)
    if s.method == "center" and s.dataset not in ("OpenImages", kangaroo_raccoon.DATASET):
        return center_outcome(s.dataset, "test", on.data_root, s.sigma, s.interval)
    return on_disk(s, on, device)


def _combined(how: str, each: list[Outcome]) -> Outcome:
    """Maximum or mean of each metric that all parts have; at a maximum, tau is that of the best part."""
    names = sorted(set.intersection(*(set(outcome.metrics) for outcome in each)))
    combine = max if how == "max" else np.mean
    datasets = list({outcome.dataset["name"]: outcome.dataset for outcome in each}.values())
    dataset = datasets[0] if len(datasets) == 1 else {"name": "several", "parts": datasets}
    weights = {name: checksum for outcome in each for name, checksum in outcome.weights.items()}
    caveats = list(dict.fromkeys(caveat for outcome in each for caveat in outcome.caveats))
    metrics = {name: float(combine([outcome.metrics[name] for outcome in each])) for name in names}
    if how == "max" and "tau" in names:
        metrics["tau"] = max(each, key=lambda outcome: outcome.metrics["gt_known_accuracy"]).metrics["tau"]
    return Outcome(metrics, {}, dataset, weights, each[0].precision, caveats)


def _beside_the_baselines(s: Settings, on: OnData, metrics: dict[str, float]) -> dict[str, float]:
    """A method's numbers on test, and beside those of the centre, CAM and FSL on the same images."""
    center = in_memory(replace(s, method="center"), on).metrics
    found = dict(metrics)
    found["v2_over_center"] = found["max_box_acc_v2"] - center["max_box_acc_v2"]
    found["pxap_over_center"] = found["pxap"] - center["pxap"]
    found["pxap_over_constant"] = found["pxap"] - found["pxap_constant_map"]
    return found


def _at_tau(found: Outcome, tau: float) -> dict[str, float]:
    """GT-known accuracy (largest contour, IoU 50) at a threshold of the stored curve, or at the best one."""
    details = found.details
    if tau < 0:
        return {"gt_known_accuracy": found.metrics["max_box_acc"], "tau": details["tau_star_largest"]}
    place = int(np.abs(np.array(details["taus"]) - tau).argmin())
    return {"gt_known_accuracy": details["curve_largest_50"][place], "tau": details["taus"][place]}


# ---- cut-outs in memory ------------------------------------------------------------


@lru_cache(maxsize=32)
def _split(on: OnData, split: str) -> MemorySource:
    source = source_of(on, split)
    assert isinstance(source, MemorySource)
    return source


@lru_cache(maxsize=1)
def _cpu() -> Fabric:
    return make_fabric("cpu")


@lru_cache(maxsize=256)
def _trained(on: OnData, recipe: Recipe) -> Network:
    """A model of one trial; how many fully labelled images judge it does not matter for its training."""
    return fit(recipe, _split(on, "train"), on.seed, _cpu())


@lru_cache(maxsize=256)
def _searched(s: Settings, on: OnData) -> tuple[protocol.Search, Network, protocol.Ledger]:
    ledger, val = protocol.Ledger(), _split(on, "val")
    options, judged = (s.space, s.trials, on.seed), protocol.criterion_of(s.criterion, val)
    if s.method == "fsl":
        found, network = protocol.search_fsl(s.recipe(), *options, val, _cpu(), ledger, judged, s.interval)
        return found, network, ledger

    def train(recipe: Recipe, trial: int) -> Network:
        return _trained(replace(on, per_class=0), recipe)

    found = protocol.search(s.recipe(), *options, train, val, _cpu(), ledger, judged, s.interval)
    return found, train(found.recipe, found.best), ledger


@lru_cache(maxsize=256)
def in_memory(s: Settings, on: OnData) -> Outcome:
    """The protocol on the CPU, or the centre baseline."""
    test = _split(on, "test")
    values: tuple[float | None, ...] = ()
    if s.method == "center":
        report = evaluate_center(test, _cpu(), s.interval)
    else:
        found, network, ledger = _searched(s, on)
        values = found.values
        report = protocol.report_once(s.method, network, test, _cpu(), ledger, s.interval)[0]
    counts = {split: len(_split(on, split)) for split in SPLITS}
    dataset = {"name": s.dataset, "seed": on.seed, "images": counts, "checksum": test.checksum()}
    return Outcome(report.metrics(), {"values": list(values)} | report.details(), dataset)


def chosen(s: Settings, on: OnData) -> dict[str, Any]:
    """The chosen trial, and how much full supervision it took."""
    found, _, ledger = _searched(s, on)
    return {"hyperparameters": protocol.draw(s.space, s.method, on.seed, found.best), "ledger": ledger.counts()}


def score_maps_shown(s: Settings, on: OnData) -> dict[str, str]:
    """Score maps of the first test images, (SHOWN, 32, 32) uint8, compressed."""
    network, test = _searched(s, on)[1], _split(on, "test").images[:SHOWN]
    maps = resize_normalize(network.predict(test.images, test.labels)[1], SIDE)
    packed = zlib.compress((maps * 255).to(torch.uint8).numpy().tobytes(), 9)
    return {"maps": base64.b64encode(packed).decode()}


# ---- the paper's data sets ------------------------------------------------------------


@lru_cache(maxsize=1024)
def on_disk(s: Settings, on: OnData, device: OnDevice) -> Outcome:
    """The whole protocol on CUDA, resumable: its folder is named by its settings."""
    sources, fabric = sources_of(on), make_fabric(device.device, device.precision)
    counts = {split: len(source) for split, source in sources.items()}
    caveats = smaller_than_the_papers(s.dataset, counts)
    dataset = {"name": s.dataset, "images": counts, "checksum": sources["test"].checksum()}
    if s.dataset == kangaroo_raccoon.DATASET:
        dataset["files"] = kangaroo_raccoon.checksums(on.data_root)
        caveats += kangaroo_raccoon.other_files(on.data_root)
    if s.method == "center":
        report = evaluate_center(sources["test"], fabric, s.interval, keep_images=True)
        return Outcome(report.metrics() | report.intervals(), report.details(), dataset, caveats=caveats)
    weights = on.data_root / "weights" / f"{s.arch}.pth"
    pretrained = str(weights) if s.arch in PRETRAINED else None
    if s.arch == "efficientnet_lite0":
        weights, pretrained = efficientnet.weights_file(), "imagenet"
    if pretrained is None:
        caveats.append("random weights in place of pretrained ones")
    recipe = replace(s.recipe(), pretrained=pretrained)
    name = settings_hash({field.name: getattr(s, field.name) for field in fields(s)} | {"seed": on.seed})
    folder = runs_folder(PROJECT) / "protocol" / f"{s.dataset}-{s.arch}-{s.method}-{name}"
    options = (recipe, s.space, s.trials, on.seed, sources, fabric, folder, s.criterion, s.interval)
    found, entry, _ = protocol.run_in_folder(*options, compile_model=device.compile)
    if entry["skipped"]:
        caveats.append(f"{entry['skipped']} files skipped")
    checksums = {weights.name: file_checksum(weights)} if pretrained else {}
    details, metrics = {"values": list(found.values)} | entry["details"], entry["metrics"]
    return Outcome(metrics, details, dataset, checksums, entry["precision"], caveats)
