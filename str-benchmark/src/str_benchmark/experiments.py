"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from shared_utils.logging import get_logger
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.seeding import seed_everything
from shared_utils.tables import Table, load_tables, settings_hash
from str_benchmark.aggregate import failures_of_runs, mean_of_runs
from str_benchmark.data import names
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.mixture import BalancedBatchSampler, TrainingData, lmdb_weights
from str_benchmark.data.rendered import RENDERED, rendered_lmdb
from str_benchmark.data.sets import open_set
from str_benchmark.evaluate import Reading, evaluate, latency_ms
from str_benchmark.metrics import total_accuracy
from str_benchmark.models import Recognizer, build_model, count_parameters
from str_benchmark.models.cost import gflops
from str_benchmark.models.inference import for_inference
from str_benchmark.models.pretrained import load_pretrained
from str_benchmark.settings import Settings
from str_benchmark.train import fit, load_checkpoint, make_fabric

logger = get_logger("str-benchmark")

PROJECT = Path(__file__).parents[2]
PACKAGES = ("torchvision", "lightning", "numpy", "pillow", "lmdb")
CURVE_POINTS = 100  # of a record
AGGREGATES = {"mean": mean_of_runs, "failures": failures_of_runs}


def tables() -> list[Table]:
    """All table files, checked against the settings. FileNotFoundError outside a source checkout."""
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
    workers: int = 0,
    skip_broken: bool = False,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks of the tables; those computed from other runs come last."""
    log = RunLog(PROJECT / "runs" / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds or None)]
    combined = [run for run in runs if run.settings.get("measure") in AGGREGATES]
    common: dict[str, Any] = {"repository": PROJECT, "packages": PACKAGES, "force": force}
    act = partial(execute, data_root=data_root, workers=workers, skip_broken=skip_broken)
    run_missing("str-benchmark", [run for run in runs if run not in combined], log, act, jobs=jobs, **common)
    logs = [RunLog(PROJECT / folder / f"{scale}.jsonl") for folder in ("results", "runs")]
    run_missing("str-benchmark", combined, log, partial(_combine, scale=scale, logs=logs), **common)
    return log


def execute(settings: dict, seed: int, *, data_root: Path, workers: int = 0, skip_broken: bool = False) -> Outcome:
    """One run of a table; killed and started again, it goes on from runs/checkpoints."""
    resolved = Settings(**settings)
    if resolved.measure == "cost":
        return _cost(resolved, seed)
    checkpoint = PROJECT / "runs" / "checkpoints" / f"{settings_hash(settings)}-{seed}.pt"
    source = Source(data_root, workers, skip_broken)
    _, outcome = train_and_evaluate(resolved, seed, source, _fabric(), checkpoint)
    for path in (checkpoint, _base(checkpoint)):
        path.unlink(missing_ok=True)
    return outcome


def _base(checkpoint: Path) -> Path:
    """Checkpoint of the training that comes before fine-tuning."""
    return checkpoint.with_suffix(".base.pt")


def _combine(settings: dict, seed: int, *, scale: str, logs: list[RunLog]) -> Outcome:
    resolved = Settings(**settings)
    table = next((table for table in tables() if table.id == resolved.of[0]), None)
    if table is None:
        raise ValueError(f"of: there is no table {resolved.of[0]!r}")
    return AGGREGATES[resolved.measure](table, scale, seed, resolved.of[1:], logs)


class Source:
    """Where sets come from: the renderer, the data root, or a folder; opened with what a run needs."""

    def __init__(self, data_root: Path, workers: int = 0, skip_broken: bool = False):
        self.data_root, self.workers, self.skip_broken = Path(data_root), workers, skip_broken

    def open(self, name: str, **options: Any) -> list[LMDBDataset]:
        """The LMDBs of a set."""
        if name in RENDERED:
            return [LMDBDataset(rendered_lmdb(name, PROJECT / "runs" / "rendered"), **options)]
        return open_set(name, self.data_root, **options)

    def for_evaluation(self, sets: Sequence[str], s: Settings) -> dict[str, list[LMDBDataset]]:
        """Sets by name, unfiltered, labels on the test charset; one whose name ends in ? is left out if missing."""
        found = {}
        for name in sets:
            plain = name.removesuffix("?")
            try:
                found[plain] = self.open(plain, charset=s.test_charset, filter="off", channels=3 if s.rgb else 1)
            except FileNotFoundError:
                if name == plain:
                    raise
        return found

    def for_training(self, sets: Sequence[str], s: Settings) -> tuple[list[LMDBDataset], list[int]]:
        """Non-empty LMDBs of all sets, and which set each belongs to.

        Raises:
            ValueError: a set of which the filter leaves nothing; the message says which rule took what.
        """
        found, owners = [], []
        options = {"charset": s.charset, "max_length": s.max_length, "filter": s.filter}
        for number, name in enumerate(sets):
            parts = self.open(name, channels=3 if s.rgb else 1, **options)
            parts = [part.take(s.data_fraction) for part in parts]
            for part in parts:
                logger.info("%s: %s", part.path.name, part.report)
            if not any(len(part) for part in parts):
                raise ValueError(f"{name}: no sample is left for training: {parts[0].report}")
            kept = [part for part in parts if len(part)]
            found += kept
            owners += [number] * len(kept)
        return found, owners


def train_and_evaluate(
    s: Settings,
    seed: int,
    source: Source,
    fabric: Fabric,
    checkpoint: Path | None,
    *,
    checkpoint_every: int = 1000,
    compile: bool = False,
) -> tuple[Recognizer, Outcome]:
    """Train from scratch (or on from the checkpoint), fine-tune where asked, and evaluate."""
    sets = source.for_evaluation(s.evaluate, s)  # a missing set shows now, not after hours
    seed_everything(seed)
    model = build_model(s.config).to(fabric.device).to(memory_format=torch.channels_last)
    validation = source.for_evaluation(s.validation, s)

    def accuracy(model: Recognizer) -> float:
        frame = evaluate(model, validation, test_charset=s.test_charset, pad=s.pad, skip_broken=source.skip_broken)[0]
        return float(frame.correct.sum() / frame.n.sum())

    mixture = _training_data(s, s.train, s.ratios, seed, source, fabric, model)
    run = {"settings": json.loads(json.dumps(asdict(s))), "seed": seed, "phase": "train"}
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "compile": compile}
    first = checkpoint and (_base(checkpoint) if s.finetune else checkpoint)
    curve = fit(
        model, mixture, s, fabric, run=run, validate=accuracy if validation else None, checkpoint=first, **options
    )
    dataset = {"train": [_describe(each) for each in mixture.datasets]}
    if s.finetune:  # the last weights are kept: the validation set is what it trains on
        mixture = _training_data(s, s.finetune, None, seed, source, fabric, model)
        steps = max(1, s.finetune_epochs * sum(map(len, mixture.datasets)) // s.batch_size)
        run = run | {"phase": "finetune"}
        curve += fit(model, mixture, s, fabric, run=run, steps=steps, checkpoint=checkpoint, **options)
        dataset["finetune"] = [_describe(each) for each in mixture.datasets]
    outcome = score(model, s, sets, source.skip_broken)
    shown = curve[:: -(-len(curve) // CURVE_POINTS)]
    outcome.details["curve"] = [{name: float(f"{value:.5g}") for name, value in point.items()} for point in shown]
    outcome.dataset.update(dataset)
    return model, outcome


def _training_data(
    s: Settings,
    sets: Sequence[str],
    ratios: Sequence[float] | None,
    seed: int,
    source: Source,
    fabric: Fabric,
    model: Recognizer,
) -> TrainingData:
    """Sets mixed by ratio (each shared by its LMDBs according to their size), or by size alone."""
    datasets, owners = source.for_training(sets, s)
    weights = lmdb_weights([len(each) for each in datasets], owners, ratios)
    return TrainingData(
        datasets,
        BalancedBatchSampler(datasets, weights, s.batch_size, seed, fabric.global_rank, fabric.world_size),
        model.tokenizer,
        s.max_length,
        s.config.img_size,
        fabric.device,
        pad=s.pad,
        resident=s.resident,
        workers=source.workers,
        skip_broken=source.skip_broken,
    )


def score(model: Recognizer, s: Settings, sets: dict[str, list[LMDBDataset]], skip_broken: bool = False) -> Outcome:
    """Metrics of the tables: every set, their groups, time and parameters. Accuracies in %."""
    frame, correct, readings = evaluate(model, sets, test_charset=s.test_charset, pad=s.pad, skip_broken=skip_broken)
    counts = {row.set: (row.n, row.correct) for row in frame.itertuples()}
    metrics = {row.set.replace("-", "_"): 100 * row.accuracy for row in frame.itertuples()}
    groups = {
        "total_accuracy": s.regular + s.irregular,
        "regular_accuracy": s.regular,
        "irregular_accuracy": s.irregular,
        "in_distribution": names.IN_DISTRIBUTION,
        "out_distribution": names.OUT_OF_DISTRIBUTION,
    }
    details = {"n": {row.set: row.n for row in frame.itertuples()}}
    for name, parts in groups.items():
        if parts and all(part in counts for part in parts):
            accuracy, details["n"][name] = total_accuracy(counts, parts)
            metrics[name] = 100 * accuracy
    if "total_accuracy" in metrics:
        logger.info("total accuracy %.2f %% of n = %d", metrics["total_accuracy"], details["n"]["total_accuracy"])
    metrics["ned"] = float(np.average(frame.ned, weights=frame.n))
    metrics["time_ms"] = latency_ms(for_inference(model))
    metrics["params_M"] = count_parameters(model) / 1e6
    shares = [reading.blank_share for reading in readings.values() if reading.blank_share is not None]
    if shares:
        metrics["blank_share"] = float(np.average(shares, weights=frame.n))
    details["read"] = {name: _first_words(reading) for name, reading in readings.items()}
    details["correct"] = {name: np.packbits(hits).tobytes().hex() for name, hits in correct.items()}
    details["intervals"] = {row.set: [round(row.low, 4), round(row.high, 4)] for row in frame.itertuples()}
    evaluated = [{"set": row.set, "n": row.n, "broken": row.broken} for row in frame.itertuples()]
    return Outcome(metrics, details, {"evaluation": evaluated})


def _first_words(reading: Reading, n: int = 4) -> list[tuple[str, float]]:
    """Texts and confidences of a set's first images, for the sheet."""
    return [(text, round(p, 3)) for text, p in zip(reading.texts[:n], reading.confidences[:n], strict=True)]


def _cost(s: Settings, seed: int) -> Outcome:
    """Parameters, FLOPs and milliseconds of a network that nobody trained."""
    seed_everything(seed)
    model = Recognizer(s.config).to(_fabric().device)
    parameters = count_parameters(model)
    released, printed = (Recognizer(replace(s.config, feat="RCNN", ctc_head=head)) for head in ("released", "paper"))
    as_printed = parameters - count_parameters(released) + count_parameters(printed)
    time_ms = latency_ms(for_inference(model), repeats=5, warmup=2)
    metrics = {"params_M": as_printed / 1e6, "parameters": parameters, "gflops": gflops(model), "time_ms": time_ms}
    return Outcome(metrics)


def _describe(data: LMDBDataset) -> dict:
    digest = hashlib.sha256(data.indices.tobytes() + str(data.path.joinpath("data.mdb").stat().st_size).encode())
    return {"name": data.path.name, "total": data.total, "used": len(data), "sha256": digest.hexdigest()[:16]}


def load_trained(path: Path, device: str = "auto") -> tuple[Recognizer, Settings]:
    """Model (its best weights) and settings of a training checkpoint. ValueError where its weights do not fit."""
    content = load_checkpoint(path)
    s = Settings(**content["run"]["settings"])
    model = Recognizer(s.config)
    best = content["state"]["best"]
    try:
        model.load_state_dict(best["weights"] if best else content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: holds no weights of {s.config.name} ({error})") from error
    return model.to(make_fabric(device).device).eval(), s


def load_any(path: Path, model: str = "", charset: str = "36", device: str = "auto") -> tuple[Recognizer, Settings]:
    """A training checkpoint, or with a model name a public one; with its settings."""
    if not model:
        return load_trained(path, device)
    settings = Settings(model=model, charset=charset)
    return load_pretrained(path, settings.config).model.to(make_fabric(device).device), settings


def evaluate_checkpoint(model: Recognizer, s: Settings, source: Source, sets: Sequence[str] = ()) -> Outcome:
    """Metrics of a loaded checkpoint, on its own sets or on others."""
    return score(model, s, source.for_evaluation(tuple(sets) or s.evaluate, s), source.skip_broken)


@lru_cache(maxsize=1)
def _fabric() -> Fabric:
    return make_fabric()
