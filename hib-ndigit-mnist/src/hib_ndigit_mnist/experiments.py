"""From the rows of the tables to finished run records. Rows that differ only in what is reported share their models."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hib_ndigit_mnist.data import NDigitSet, ndigit_sets
from hib_ndigit_mnist.evaluate import Evaluation, TestSet, fit_match
from hib_ndigit_mnist.reports import REPORTS
from hib_ndigit_mnist.settings import Settings
from hib_ndigit_mnist.train import Trained, train
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, load_tables

PROJECT = Path(__file__).parents[2]
PACKAGES = ("numpy", "scipy", "scikit-learn", "lightning")


def parse(settings: dict) -> Settings:
    """Settings from a table file; ValueError for values that make no sense."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    return Settings(**plain)


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
    """Run what runs/ lacks of the chosen tables at a scale; returns that log."""
    log = RunLog(PROJECT / "runs" / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows or None, seeds or None)]
    load = Counter(stackable(run) for run in runs)
    cost = {key: count * getattr(key[0], "steps", 0) for key, count in load.items()}
    runs.sort(key=lambda run: -cost[stackable(run)])  # the longest first, so that no core waits at the end
    checkpoints = PROJECT / "runs" / "checkpoints"
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
    )
    return log


def stackable(run: Run) -> tuple:
    """Runs of equal value are trained in one process with stacked parameters."""
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
    """Runs of one group: train every different model once, then report each run from its model."""
    parsed = [parse(each) for each in settings]
    if parsed[0].report == "dataset":
        return [_dataset(each, data_root) for each in parsed]
    for each in parsed:
        if each.report not in REPORTS:
            raise ValueError(f"report: one of dataset, {', '.join(REPORTS)} was expected, got {each.report!r}")
    name, num_digits, gap, sizes = parsed[0].data()
    sets = ndigit_sets(name, num_digits, gap, data_root, **dict(sizes))
    jobs = list(zip(parsed, seeds, strict=True))
    models = list(dict.fromkeys((each.training(), seed) for each, seed in jobs))
    reporter = _Reporter(sets, device)

    def visit(step: int, trained: list[Trained]) -> list[list]:
        """[run, metrics, details] of the runs that look at this step (0: the end)."""
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
        sets["train"], trainings, model_seeds, device=device, checkpoint=path, visit_at=visit_at, visit=visit
    )
    found = {number: report for each in [*visits, visit(0, trained)] for number, *report in each}
    if path:
        path.unlink(missing_ok=True)
    sizes_of = {split: len(data) for split, data in sets.items()}
    record = {"name": name, "sizes": sizes_of, "sha256": sets["train"].fingerprint()}
    return [Outcome(metrics, details, record) for metrics, details in map(found.__getitem__, range(len(jobs)))]


class _Reporter:
    """Evaluates models on test sets that are made once."""

    def __init__(self, sets: dict[str, NDigitSet], device: str):
        self.sets = sets
        self.tests: dict[tuple, TestSet] = {}
        self.evaluations: dict[tuple, tuple[Trained, Evaluation]] = {}  # the model is kept: its id is in the key
        on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if on_cuda else "cpu"

    def report(self, model: Trained, settings: Settings) -> tuple[dict, dict]:
        key = settings.split, settings.test_images, settings.test_pairs, settings.queries
        if key[0] not in self.sets:
            raise ValueError(f"split: one of {', '.join(self.sets)} was expected, got {key[0]!r}")
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


def _dataset(settings: Settings, data_root: Path) -> Outcome:
    """A row of the data set's table: sizes, and the digest of the images that are built."""
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
