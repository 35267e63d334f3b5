"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from satrn.complexity import costs
from satrn.data import inventory
from satrn.data.streams import RenderedWords
from satrn.data.words_lmdb import LmdbMixture, LmdbWords
from satrn.evaluate import correct
from satrn.measure import evaluate, sizes, with_network
from satrn.models import SATRN
from satrn.pretrained import load_pretrained, weights_record
from satrn.settings import Settings
from satrn.train import build_model, fit, make_fabric
from shared_utils.folders import project_folder, runs_folder
from shared_utils.logging import get_logger
from shared_utils.preflight import Need, disk_space
from shared_utils.runlog import Outcome, RunLog, key_of, run_missing
from shared_utils.tables import Run, Table, load_tables, settings_hash

PROJECT = project_folder(__file__)
PACKAGES = ("torchvision", "lightning", "numpy")
logger = get_logger("satrn")


def tables() -> list[Table]:
    """All table files, checked against the settings."""
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
    **options: Any,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks of the tables, and what it has from other data than this root's.

    Args:
        chosen: tables.
        scale: such as "paper".
        data_root: folder that holds the sets.
        rows: run only these.
        seeds: instead of the tables'.
        force: repeat runs that are there.
        jobs: see `shared_utils.runlog.run_missing`.
        options: workers, skip_broken, precision and compile, as for `execute`.

    Raises:
        Missing: lists everything that the runs need and that is missing.
    """
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds or None)]
    execute_here = partial(execute, data_root=data_root, **options)
    needed = partial(needs, data_root=data_root, output=runs_folder(PROJECT))
    common: dict[str, Any] = dict(repository=PROJECT, packages=PACKAGES, jobs=jobs, needs=needed)
    other = [] if force else on_other_data(runs, log, data_root)
    if other:
        logger.info("%d finished runs used other data than that in %s: they are repeated", len(other), data_root)
        run_missing("satrn", other, log, execute_here, force=True, **common)
    run_missing("satrn", runs, log, execute_here, force=force, **common)
    return log


def needs(settings: dict[str, Any], data_root: Path, output: Path) -> Iterator[Need]:
    """Everything that a run needs: its sets, including those of the evaluation, and room for two checkpoints."""
    s = Settings(**settings)
    yield from inventory.needs(s, data_root)
    if s.dataset == "lmdb":  # weights and Adam's two averages, in float32, old and new
        yield disk_space(output, 24 * costs(s.network()).parameters / 2**20)


def on_other_data(runs: Sequence[Run], log: RunLog, data_root: Path) -> list[Run]:
    """Runs whose records in a log used other words than the data root has now."""
    records = {key_of(record): record for record in log.records()}
    found, checksums = [], dict[Path, str]()
    for run in runs:
        s = Settings(**run.settings)
        folders = list(inventory.wanted(s, data_root).values())
        if run.key not in records or not folders or not all(need.met for need in inventory.needs(s, data_root)):
            continue
        for folder in folders:
            if folder not in checksums:
                checksums[folder] = LmdbWords(folder, s.img_size).checksum()
        dataset = records[run.key]["dataset"]
        recorded = [part.get("sha256") for part in [*dataset["train"]["sets"], *dataset["test"]]]
        if recorded != [checksums[folder] for folder in folders]:
            found.append(run)
    return found


def execute(
    settings: dict,
    seed: int,
    *,
    data_root: Path,
    workers: int = 0,
    skip_broken: bool = False,
    precision: str = "auto",
    compile: bool = False,
) -> Outcome:
    """One run of a table; a killed run resumes from runs/checkpoints."""
    s = Settings(**settings)
    if s.dataset == "none":
        return Outcome(sizes(s))
    identity = settings_hash(settings | {"data_root": str(data_root.resolve())})
    checkpoint = runs_folder(PROJECT) / "checkpoints" / f"{identity}-{seed}.pt"
    _, outcome = train_and_evaluate(
        s, seed, data_root, _fabric(precision), checkpoint, workers=workers, skip_broken=skip_broken, compile=compile
    )
    for path in (checkpoint, _control_path(checkpoint)):
        path.unlink(missing_ok=True)
    return outcome


@lru_cache(maxsize=1)
def _fabric(precision: str) -> Fabric:
    return make_fabric(precision=precision)


def train_and_evaluate(
    s: Settings,
    seed: int,
    data_root: Path,
    fabric: Fabric,
    checkpoint: Path | None = None,
    *,
    checkpoint_every: int = 1000,
    compile: bool = False,
    workers: int = 0,
    skip_broken: bool = False,
    start: Path | None = None,
    dictionary: str | None = None,
    on_point: Callable[[dict], None] = lambda point: None,
) -> tuple[SATRN, Outcome]:
    """Train (resuming from the checkpoint if there is one) and evaluate the last step, never a chosen one.

    Args:
        s: settings.
        seed: seed of weights, words and order.
        data_root: folder that holds training/ and evaluation/.
        fabric: device, precision, ranks.
        checkpoint: file to resume from and to save to.
        checkpoint_every: steps between saves.
        compile: through torch.compile.
        workers: loader processes.
        skip_broken: skip broken images.
        start: checkpoint (of this package or MMOCR) to start from; its network replaces the settings', and rows of
            known characters are kept; None: a new network.
        dictionary: characters of an MMOCR checkpoint, if their number does not identify them.
        on_point: called with every point of the training curve.
    """
    begun = None if start is None else load_pretrained(start, s.charset, dictionary)
    s = s if begun is None else with_network(s, begun.cfg)
    data = training_data(s, seed, data_root, fabric, workers, skip_broken)
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "compile": compile, "on_point": on_point}
    weights = {} if start is None else weights_record(start)
    model = build_model(s, seed, fabric)
    if begun is not None:
        own = model.state_dict()  # only one of the two may have an auxiliary head
        model.load_state_dict(own | {k: v for k, v in begun.state_dict().items() if k in own})
    details = {"curve": fit(model, data, s, seed, fabric, checkpoint=checkpoint, start=weights, **options)}
    control = None
    if s.control:
        squashed = replace(s, squash_height=True)
        control = build_model(squashed, seed, fabric)
        path = None if checkpoint is None else _control_path(checkpoint)
        details["control_curve"] = fit(control, data, squashed, seed, fabric, checkpoint=path, **options)
    metrics, more, tests = evaluate(model, s, seed, data_root, fabric, skip_broken, control)
    read = data.record()
    caveats = inventory.caveats(read, tests, s) if s.dataset == "lmdb" else []
    return model, Outcome(
        metrics, details | more, {"train": read, "test": tests}, weights, fabric.strategy.precision.precision, caveats
    )


def _control_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.stem + "-control" + checkpoint.suffix)


def training_data(
    s: Settings, seed: int, data_root: Path, fabric: Fabric, workers: int, skip_broken: bool
) -> RenderedWords | LmdbMixture:
    """The settings' training words."""
    if s.dataset == "rendered":
        return RenderedWords(s, s.train_images, 10_000 + seed, fabric.device)
    if s.dataset == "none":
        raise ValueError("dataset must be lmdb or rendered to train, got 'none'")
    return LmdbMixture([inventory.training_folder(data_root, name) for name in s.train_sets], s, workers, skip_broken)


def overfit_one_batch(s: Settings, fabric: Fabric, steps: int = 300) -> float:
    """Self-check: percent of one batch of rendered words that a network reads after training on it alone."""
    changes: dict[str, Any] = dict(
        dataset="rendered", warp="straight", rotation="none", train_images=8, batch_size=8, accumulate=1
    )
    changes |= dict(schedule="onecycle", lr=1e-3, dropout=0.0, control=False, steps=steps)
    s = replace(s, **changes, word_lengths=(2, min(5, s.max_length - 1)), font_pixels=float(min(s.img_size)))
    data = RenderedWords(s, s.train_images, 0, fabric.device)
    model = build_model(s, 0, fabric)
    fit(model, data, s, 0, fabric)
    return 100 * float(correct(model, data, protocol="exact").mean())
