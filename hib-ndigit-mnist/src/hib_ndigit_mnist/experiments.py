"""Runs the rows of the tables and records them. Rows that differ only in what is reported share their models."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich.table
import torch

from hib_ndigit_mnist.data import NDigitSet, find_mnist, is_mnist, ndigit_sets
from hib_ndigit_mnist.evaluate import Evaluation, TestSet, fit_match
from hib_ndigit_mnist.reports import REPORTS
from hib_ndigit_mnist.settings import Settings
from hib_ndigit_mnist.train import Trained, train
from shared_utils.folders import project_folder, runs_folder
from shared_utils.logging import console
from shared_utils.preflight import Need, disk_space, unmet
from shared_utils.report import duration, interval, judge, values
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, load_tables

PROJECT = project_folder(__file__)
SHOWN = {
    "table-1": {
        "ap_corrupt": "average precision, corrupted pairs",
        "ap_clean": "average precision, clean pairs",
        "knn_corrupt": "KNN accuracy, corrupted among clean images",
        "knn_corrupt_same": "KNN accuracy, corrupted among corrupted images",
        "knn_clean": "KNN accuracy, clean images",
    },
    "table-2": {
        "auc": "ROC AUC of eta, corrupted against clean images",
        "tau_knn_corrupt": "tau of eta with KNN errors, corrupted images",
    },
}
PACKAGES = ("numpy", "scipy", "scikit-learn", "lightning")


def parse(settings: dict) -> Settings:
    """Settings from a table file; ValueError for values that make no sense."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    return Settings(**plain)


def tables() -> list[Table]:
    """The project's table files."""
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
    """Run what runs/ lacks of the chosen tables at a scale; returns its log."""
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows or None, seeds or None)]
    load = Counter(stackable(run) for run in runs)
    cost = {key: count * getattr(key[0], "steps", 0) for key, count in load.items()}
    runs.sort(key=lambda run: -cost[stackable(run)])  # the longest first, so that no core is idle at the end
    checkpoints = runs_folder(PROJECT) / "checkpoints"
    run_missing(
        "hib-ndigit-mnist",
        runs,
        log,
        partial(execute, data_root=data_root, checkpoints=checkpoints),
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        group=stackable,
        needs=partial(needs, data_root=data_root),
    )
    return log


def needs(settings: dict, data_root: Path) -> Iterator[Need]:
    """What a run needs: its data and disk space."""
    if settings.get("dataset", "mnist") == "mnist":
        found = find_mnist(data_root) is not None
        yield Need(f"MNIST ({data_root})", "hib-ndigit-mnist data --download, or --data-root", found)
    yield disk_space(runs_folder(PROJECT), 100)


def print_missing(
    chosen: Sequence[Table], scale: str, data_root: Path, rows: Sequence[str], seeds: Sequence[int], force: bool
) -> None:
    """Print for --dry-run: the runs and models that each table lacks, the expected time, and missing data.

    Tables share models; each model is counted at its first occurrence.
    """
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    done = set() if force else log.keys()
    shown = rich.table.Table("table", "missing runs", "models to train", "expected time")
    known: set[tuple] = set()
    lacking: list[Need] = []
    total = 0.0
    for table in chosen:
        missing = [run for run in table.runs(scale, rows or None, seeds or None) if run.key not in done]
        models = {
            (run.seed, stackable(run), run.settings.get("beta"), run.settings.get("occlusion_p")) for run in missing
        }
        seconds = len(models - known) * (table.scales[scale].expected_seconds or 0)
        shown.add_row(table.id, str(len(missing)), str(len(models - known)), duration(seconds) if seconds else "")
        known |= models
        total += seconds
        lacking += [need for run in missing for need in needs(run.settings, data_root)]
    shown.add_row("all", "", str(len(known)), duration(total) if total else "")
    console().print(shown)
    for line in unmet(lacking):
        console().print(f"missing: {line}", highlight=False)


def summary() -> str:
    """The README's table and verdicts: seen numbers, N = 2, D = 2, at the recorded scale closest to the paper's."""
    everything = {table.id: table for table in tables()}
    methods = ("point", "MoG-1", "MoG-2")
    for scale in ("paper", "lenet", "embedded"):
        log = RunLog(PROJECT / "results" / f"{scale}.jsonl")
        if not values(everything["table-1"], scale, log):
            continue
        seeds = max(len(each) for each in values(everything["table-1"], scale, log).values())
        on = everything["table-1"].scales[scale].measured_on
        lines = [[f"scale {scale}: {on}, N = 2, D = 2, {seeds} seeds", *methods], ["---"] * 4]
        verdicts = []
        for name, metrics in SHOWN.items():
            found = values(everything[name], scale, log)
            for metric, words in metrics.items():
                rows = [found.get(f"N=2 D=2 {method}", {}).values() for method in methods]
                lines.append([words, *(_cell([each[metric] for each in row if metric in each]) for row in rows)])
            judged = [each for each in judge(everything[name], scale, log) if "N=2" in each.claim.text and each.figures]
            verdicts += [f"- {each.claim.text}: {each}" for each in judged]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *verdicts])
    return "Nothing is recorded yet."


def _cell(sample: list[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*interval(sample)) if sample else "–"


def stackable(run: Run) -> tuple:
    """Runs with the same key are trained in one process with stacked parameters."""
    settings = parse(run.settings)
    if settings.report == "dataset":
        return ("dataset",)
    training = settings.training()
    return replace(training, beta=0.0, occlusion_p=0.0), settings.data()


def execute(
    settings: Sequence[dict],
    seeds: Sequence[int],
    data_root: Path,
    device: str = "auto",
    checkpoints: Path | None = None,
) -> list[Outcome]:
    """Run one group: train every different model once, then report each run from its model."""
    parsed = [parse(each) for each in settings]
    if parsed[0].report == "dataset":
        return [_dataset(each, data_root) for each in parsed]
    name, num_digits, gap, sizes = parsed[0].data()
    sets = ndigit_sets(name, num_digits, gap, data_root, **dict(sizes))
    jobs = list(zip(parsed, seeds, strict=True))
    models = list(dict.fromkeys((each.training(), seed) for each, seed in jobs))
    reporter = _Reporter(sets, device)

    def visit(step: int, trained: list[Trained]) -> list[list]:
        """[run, metrics, details] of the runs that are reported at this step (0: the end)."""
        return [
            [number, *reporter.report(trained[models.index((each.training(), seed))], each)]
            for number, (each, seed) in enumerate(jobs)
            if each.at == step
        ]

    path = None
    if checkpoints:
        path = checkpoints / f"{hashlib.sha256(repr(jobs).encode()).hexdigest()[:16]}.pt"
    trainings, model_seeds = zip(*models, strict=True)
    visit_at = sorted({each.at for each in parsed if each.at})
    trained, visits = train(
        sets["train"],
        trainings,
        model_seeds,
        device=device,
        checkpoint=path,
        visit_at=visit_at,
        visit=visit,
    )
    found = {number: report for each in [*visits, visit(0, trained)] for number, *report in each}
    if path:
        path.unlink(missing_ok=True)
    record = {"name": name, "sizes": {split: len(data) for split, data in sets.items()}}
    record |= {"sha256": sets["train"].fingerprint()}
    caveats = _caveats(name, bool(sizes), sets)
    return [
        Outcome(metrics, details, record | reporter.tested(each), caveats=caveats)
        for (metrics, details), each in zip(map(found.__getitem__, range(len(jobs))), parsed, strict=True)
    ]


def _caveats(name: str, other_sizes: bool, sets: dict[str, NDigitSet]) -> list[str]:
    """Reasons why a run on "mnist" did not use the paper's data."""
    if name != "mnist":
        return []
    found = ["fewer images than the paper's"] if other_sizes else []
    return found + ([] if is_mnist(sets) else ["digits that are not MNIST's"])


class _Reporter:
    """Evaluates models on test sets that are built once."""

    def __init__(self, sets: dict[str, NDigitSet], device: str):
        self.sets = sets
        self.tests: dict[tuple, TestSet] = {}
        self.evaluations: dict[tuple, tuple[Trained, Evaluation]] = {}  # the model is kept: its id is in the key
        on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if on_cuda else "cpu"

    def report(self, model: Trained, settings: Settings) -> tuple[dict, dict]:
        key = _test_key(settings)
        if key[0] not in self.sets:
            raise ValueError(f"split: expected one of {', '.join(self.sets)}, got {key[0]!r}")
        if key not in self.tests:
            self.tests[key] = TestSet.of(self.sets[key[0]], *key[1:])
        own = (id(model), settings.estimator, settings.eval_samples, *key)
        if own not in self.evaluations:
            match = model.match
            if settings.method == "contrastive":
                match = fit_match(model.encoder, self.sets["train"], settings.occlusion_p)
            self.evaluations[own] = (
                model,
                Evaluation(
                    model.encoder.to(self.device), match, self.tests[key], settings.estimator, settings.eval_samples
                ),
            )
        metrics, details = REPORTS[settings.report](self.evaluations[own][1])
        return {name: value for name, value in metrics.items() if value == value}, details

    def tested(self, settings: Settings) -> dict[str, Any]:
        """How many images of the test split were used, in total and per class."""
        counts = self.tests[_test_key(settings)].labels.unique(return_counts=True)[1]
        return {"test_images": int(counts.sum()), "test_images_per_class": [int(counts.min()), int(counts.max())]}


def _test_key(settings: Settings) -> tuple:
    return settings.split, settings.test_images, settings.test_pairs, settings.queries


def _dataset(settings: Settings, data_root: Path) -> Outcome:
    """A row of the data set's table: sizes, and the SHA-256 of the built images."""
    name, num_digits, gap, sizes = settings.data()
    data = ndigit_sets(name, num_digits, gap, data_root, **dict(sizes))[settings.split]
    classes = len(data.labels.unique())
    digest, pixels = hashlib.sha256(), 0
    for rows in torch.arange(len(data)).split(2000):
        images = data.images(rows).numpy()
        digest.update(images.tobytes())
        pixels += int(images.sum(dtype="int64"))
    metrics: dict[str, float] = {
        "num_classes": classes,
        "samples_per_class": len(data) // classes,
        "num_samples": len(data),
    }
    return Outcome(metrics, {"image_sha256": digest.hexdigest(), "pixel_sum": pixels}, {"name": name})
