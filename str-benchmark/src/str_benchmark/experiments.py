"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from shared_utils.folders import project_folder, runs_folder
from shared_utils.logging import get_logger
from shared_utils.preflight import Need, disk_space, require
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.seeding import seed_everything
from shared_utils.tables import Run, Table, load_tables, settings_hash
from str_benchmark.aggregate import failures_of_runs, mean_of_runs, runs_behind, subset_of_runs
from str_benchmark.checkpoints import load_any, public_file, sha256, start_from, weights_needed
from str_benchmark.config import STRConfig
from str_benchmark.data import names
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.mixture import BalancedBatchSampler, TrainingData
from str_benchmark.data.rendered import RENDERED, rendered_lmdb
from str_benchmark.data.samples import WordDataset
from str_benchmark.data.sets import Parts, open_set, wanted
from str_benchmark.evaluation import evaluate, latency_ms, nothing_to_compare
from str_benchmark.models import Recognizer, build_model, count_parameters, output_columns
from str_benchmark.models.cost import gflops
from str_benchmark.models.inference import for_inference
from str_benchmark.scoring import described, score
from str_benchmark.settings import Settings
from str_benchmark.train import fit, make_fabric

logger = get_logger("str-benchmark")

NAME = "str-benchmark"
PROJECT = project_folder(__file__)
PACKAGES = ("torchvision", "lightning", "numpy", "pillow", "lmdb")
CURVE_POINTS = 100  # of a record
AGGREGATES: dict[str, Callable[..., Outcome]] = {
    "mean": mean_of_runs,
    "failures": failures_of_runs,
    "subset": subset_of_runs,
}


def tables() -> list[Table]:
    """All table files, checked against the settings."""
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


@dataclass(frozen=True)
class Machine:
    """How a run is executed: what no table file holds."""

    data_root: Path
    workers: int = 0
    skip_broken: bool = False
    precision: str = "auto"
    compile: bool = False
    force: bool = False

    @property
    def source(self) -> Source:
        """Where the sets are."""
        return Source(self.data_root, self.workers, self.skip_broken)


def with_sources(chosen: Sequence[Table], scale: str) -> list[Table]:
    """The tables, and those whose runs the aggregates among them are computed from and results/ lacks."""
    combined = [run for table in chosen for run in table.runs(scale) if run.settings.get("measure") in AGGREGATES]
    recorded = RunLog(PROJECT / "results" / f"{scale}.jsonl").keys()
    behind = {run.table for run in runs_behind(tables(), combined) if run.key not in recorded}
    return [*chosen, *(t for t in tables() if t.id in behind - {table.id for table in chosen})]


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    machine: Machine,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 0,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks of the tables.

    First come plain trainings, then those that continue from them, then what is computed from other runs; these other
    runs are also made if neither run log has them.
    """
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    logs = [RunLog(PROJECT / "results" / f"{scale}.jsonl"), log]
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds or None)]
    combined = [run for run in runs if run.settings.get("measure") in AGGREGATES]
    recorded = logs[0].keys()
    runs = [run for run in runs if run not in combined]
    runs += [run for run in runs_behind(tables(), combined) if run.key not in recorded]
    later = [run for run in runs if run.settings.get("finetune")]
    common: dict[str, Any] = {"repository": PROJECT, "packages": PACKAGES, "force": machine.force}
    done = set() if machine.force else log.keys()
    require(need for run in runs if run.key not in done for need in needs_of(run.settings, machine.data_root))
    for stage in ([run for run in runs if run not in later], later):
        run_missing(NAME, stage, log, partial(execute, machine=machine), jobs=jobs, **common)
    run_missing(NAME, combined, log, partial(_combine, scale=scale, logs=logs), **common)
    return log


def needs_of(settings: Mapping[str, Any], data_root: Path) -> list[Need]:
    """All sets that a run reads, including those of its evaluation, and room for its weights."""
    s = Settings(**settings)
    if s.measure != "accuracy":
        return []
    evaluated = [name for name in s.evaluate if not name.endswith("?")]
    if s.released:
        return [weights_needed(s.released), *(Need(*wanted(name, data_root)) for name in evaluated)]
    names = [*s.train, *s.finetune, *s.validation, *evaluated]
    needs = [Need(*wanted(name, data_root)) for name in dict.fromkeys(names) if name not in RENDERED]
    return [*needs, disk_space(runs_folder(PROJECT), _megabytes(s.config))]


@cache
def _megabytes(config: STRConfig) -> float:
    """Of a checkpoint: weights, AdaDelta's two averages and the best weights, four bytes each."""
    return 16 * count_parameters(Recognizer(config)) / 2**20


def execute(settings: dict, seed: int, *, machine: Machine) -> Outcome:
    """One run of a table; a killed run resumes from runs/checkpoints.

    The network stays there, so `eval` and `predict` can take it, and a fine-tuning starts from it.
    """
    resolved = Settings(**settings)
    if resolved.measure == "cost":
        return _cost(resolved, seed)
    if resolved.released:
        return _released(resolved, machine.source)
    plain = {name: value for name, value in settings.items() if not name.startswith("finetune")}
    base = _checkpoint(plain, seed)
    checkpoint = _checkpoint(settings, seed)
    if machine.force:
        checkpoint.unlink(missing_ok=True)
    fabric = _fabric(machine.precision)
    return train_and_evaluate(resolved, seed, machine.source, fabric, checkpoint, base=base, compile=machine.compile)[1]


def _checkpoint(settings: Mapping[str, Any], seed: int) -> Path:
    name = Settings(**settings).config.name + ("-finetuned" if settings.get("finetune") else "")
    return runs_folder(PROJECT) / "checkpoints" / f"{name}-{settings_hash(dict(settings))}-{seed}.pt"


def _combine(settings: dict, seed: int, *, scale: str, logs: list[RunLog]) -> Outcome:
    s = Settings(**settings)
    asked = Run("", "", scale, seed, settings, ())
    sets = s.evaluate if s.measure == "subset" else ()
    return AGGREGATES[s.measure](runs_behind(tables(), [asked]), logs, *sets)


class Source:
    """Where sets come from: the renderer, the data root, or a folder; opened with what a run needs."""

    def __init__(self, data_root: Path, workers: int = 0, skip_broken: bool = False):
        self.data_root, self.workers, self.skip_broken = Path(data_root), workers, skip_broken

    def open(self, name: str, **options: Any) -> list[WordDataset]:
        """The stores of a set."""
        if name in RENDERED:
            return [LMDBDataset(rendered_lmdb(name, runs_folder(PROJECT) / "rendered"), **options)]
        return open_set(name, self.data_root, **options)

    def for_evaluation(self, sets: Sequence[str], s: Settings) -> dict[str, list[WordDataset]]:
        """Sets by name, unfiltered, labels on the test characters; a set whose name ends in ? is skipped if missing.

        Raises:
            ValueError: a set without any label on the test characters: it is in another script.
        """
        found = {}
        options = {"charset": s.test_characters, "filter": "off", "channels": 3 if s.rgb else 1}
        for name in sets:
            plain = name.removesuffix("?")
            try:
                parts = self.open(plain, **options, **_cleaning(s))
            except FileNotFoundError:
                if name == plain:
                    raise
                continue
            if not any(part.label(index) for part in parts for index in range(len(part))):
                raise ValueError(nothing_to_compare(plain, s.test_characters))
            found[plain] = parts
        return found

    def for_training(self, sets: Sequence[str], s: Settings, columns: int | None) -> list[Parts]:
        """The sets, filtered; `columns` are those of a CTC network.

        Raises:
            ValueError: the filter leaves nothing of a set; the message says which rule removed what.
        """
        found = []
        options = {"charset": s.charset, "max_length": s.max_length, "filter": s.filter, "columns": columns}
        for name in sets:
            parts = self.open(name, channels=3 if s.rgb else 1, **options, **_cleaning(s))
            for part in parts:
                logger.info("%s: %s", part.path.name, part.report)
            kept = Parts(parts).take(s.data_fraction)
            if not len(kept):
                raise ValueError(f"{name}: no sample is left for training: {parts[0].report}")
            found.append(kept)
        return found


def _cleaning(s: Settings) -> dict[str, bool]:
    return {"nfkd": s.nfkd, "drop_whitespace": s.drop_whitespace}


def train_and_evaluate(
    s: Settings,
    seed: int,
    source: Source,
    fabric: Fabric,
    checkpoint: Path | None,
    *,
    base: Path | None = None,
    start: str = "",
    start_charset: str = "",
    checkpoint_every: int = 1000,
    compile: bool = False,
) -> tuple[Recognizer, Outcome]:
    """Train (or resume from the checkpoint), fine-tune if asked for, and evaluate.

    Args:
        s: the run.
        seed: of weights and order.
        source: of the sets.
        fabric: device and precision.
        checkpoint: file of the run; with `finetune`, of its second part.
        base: file of the training before fine-tuning; it is not repeated if it is finished.
        start: weights to start from instead of new ones, see `start_from`.
        start_charset: their alphabet, if the file does not tell.
        checkpoint_every: steps between saves.
        compile: torch.compile the network.
    """
    sets = source.for_evaluation(s.evaluate, s)  # detect a missing set now, not after hours
    validation = source.for_evaluation(s.validation, s)
    seed_everything(seed)
    model, weights = start_from(start, s, start_charset) if start else (build_model(s.config), {})
    model = model.to(fabric.device).to(memory_format=torch.channels_last)

    def accuracy(model: Recognizer) -> float:
        options: dict[str, Any] = {"test_charset": s.test_characters, "pad": s.pad, "skip_broken": source.skip_broken}
        frame = evaluate(model, validation, **options)[0]
        return float(frame.correct.sum() / frame.n.sum())

    plain = replace(s, finetune=(), finetune_epochs=Settings.finetune_epochs)
    run: dict[str, Any] = {"settings": _json(plain), "seed": seed}
    if weights:
        run["start"] = weights
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "compile": compile}
    mixture = _training_data(s, s.train, s.ratios, seed, source, fabric, model)
    options["validate"] = accuracy if validation else None
    curve = fit(model, mixture, s, fabric, run=run, checkpoint=base if s.finetune else checkpoint, **options)
    dataset, broken = {"train": _all_described(s.train, mixture)}, mixture.broken
    if s.finetune:  # the last weights are kept, since it trains on the validation set
        mixture = _training_data(s, s.finetune, None, seed, source, fabric, model)
        steps = max(1, s.finetune_epochs * sum(map(len, mixture.datasets)) // s.batch_size)
        run = run | {"settings": _json(s)}
        options |= {"validate": None, "steps": steps}
        curve = [*curve, *fit(model, mixture, s, fabric, run=run, checkpoint=checkpoint, **options)]
        dataset["finetune"], broken = _all_described(s.finetune, mixture), broken + mixture.broken
    outcome = score(model, s, sets, source.skip_broken)
    shown = curve[:: -(-len(curve) // CURVE_POINTS)]
    outcome.details["curve"] = [{name: float(f"{value:.5g}") for name, value in point.items()} for point in shown]
    outcome.dataset.update(dataset)
    skipped = [f"{broken} broken training images skipped"] if broken else []
    precision = str(fabric.strategy.precision.precision)
    return model, replace(outcome, weights=weights, precision=precision, caveats=[*outcome.caveats, *skipped])


def _json(s: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(s)))


def _training_data(
    s: Settings,
    sets: Sequence[str],
    ratios: Sequence[float] | None,
    seed: int,
    source: Source,
    fabric: Fabric,
    model: Recognizer,
) -> TrainingData:
    """Sets mixed by ratio, or all as one if there are no ratios."""
    datasets = source.for_training(sets, s, output_columns(model))
    if ratios is None:
        datasets, ratios = [Parts([part for each in datasets for part in each.parts])], (1.0,)
    return TrainingData(
        datasets,
        BalancedBatchSampler(datasets, ratios, s.batch_size, seed, fabric.global_rank, fabric.world_size),
        model.tokenizer,
        s.max_length,
        s.config.img_size,
        fabric.device,
        pad=s.pad,
        resident=s.resident,
        workers=source.workers,
        skip_broken=source.skip_broken,
    )


def _cost(s: Settings, seed: int) -> Outcome:
    """Parameters, FLOPs and milliseconds of an untrained network."""
    seed_everything(seed)
    model = Recognizer(s.config).to(_fabric().device)
    parameters = count_parameters(model)
    released, printed = (Recognizer(replace(s.config, feat="RCNN", ctc_head=head)) for head in ("released", "paper"))
    as_printed = parameters - count_parameters(released) + count_parameters(printed)
    time_ms = latency_ms(for_inference(model), repeats=5, warmup=2)
    metrics = {"params_M": as_printed / 1e6, "parameters": parameters, "gflops": gflops(model), "time_ms": time_ms}
    return Outcome(metrics)


def _all_described(names: Sequence[str], mixture: TrainingData) -> list[dict]:
    if len(names) != len(mixture.datasets):  # all as one
        names = ["+".join(names)]
    return [described(name, data) for name, data in zip(names, mixture.datasets, strict=True)]


def _released(s: Settings, source: Source) -> Outcome:
    """A public checkpoint as it is, on the sets of the run."""
    model, own = load_any(s.released, {"test_charset": s.test_charset})
    own = replace(own, regular=s.regular, irregular=s.irregular)
    weights = public_file(s.released)
    outcome = evaluate_checkpoint(model, own, source, s.evaluate)
    return replace(outcome, weights={weights.name: sha256(weights)})


def evaluate_checkpoint(
    model: Recognizer, s: Settings, source: Source, sets: Sequence[str] = (), **options: Any
) -> Outcome:
    """Metrics of a loaded checkpoint, on its own sets or on others (names, folders, or groups); options as `score`."""
    asked = [name for each in sets or s.evaluate for name in names.GROUPS.get(each, (each,))]
    return score(model, s, source.for_evaluation(asked, s), source.skip_broken, **options)


@lru_cache(maxsize=1)
def _fabric(precision: str = "auto") -> Fabric:
    return make_fabric(precision=precision)
