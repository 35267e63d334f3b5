"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from shared_utils.folders import results_folder, runs_folder
from str_benchmark.cli_data import PROGRAM, CreateLmdb, Data, Render, default_data_root, default_workers
from str_benchmark.cli_models import Compare, Eval, Export, Network, Predict, print_scores
from str_benchmark.settings import PRESETS, Settings

if TYPE_CHECKING:
    from shared_utils.runlog import RunLog
    from shared_utils.tables import Table

    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


@dataclass
class Run:
    """Run the missing runs of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-8; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, rendered, icdar2003 or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds training/, validation/ and evaluation/."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    workers: int = field(default_factory=default_workers)
    """Loader processes of a run, if its training set is not kept in memory."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    compile: bool = False
    """torch.compile the networks."""
    skip_broken: bool = False
    """Skip broken images (they are counted and named)."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog
        from str_benchmark import experiments

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            done = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            everything = chosen if self.rows else experiments.with_sources(chosen, self.scale)
            needs = partial(experiments.needs_of, data_root=self.data_root)
            return print_missing(everything, self.scale, self.rows, self.seeds, done, needs, force=self.force)
        machine = experiments.Machine(
            self.data_root, self.workers, self.skip_broken, self.precision, self.compile, self.force
        )
        yours = experiments.run_tables(chosen, self.scale, machine, rows=self.rows, seeds=self.seeds, jobs=self.jobs)
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)
        if self.scale == "embedded":
            _show_words(chosen, yours)


def _show_words(chosen: list[Table], log: RunLog) -> None:
    """The readings, as text and next to their images."""
    from str_benchmark.experiments import PROJECT
    from str_benchmark.figures import draw_words

    sheet = runs_folder(PROJECT) / "words.png"
    words = draw_words(chosen, log, runs_folder(PROJECT) / "rendered", sheet)
    if words:
        print("label read: " + ", ".join(f"{label} {text or '-'}" for label, text in words))
        print(f"next to their images: {os.path.relpath(sheet)}")


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint, from which the same command resumes."""

    settings: Preset
    """A preset; flags after it change its settings, flags of this command come before it."""
    output: Path = Path("str.pt")
    """Checkpoint; `eval`, `predict` and `export` read it."""
    start: str = ""
    """Fine-tune: a checkpoint of `train`, english_g2, or a public .pth of the same network; rows of its head are
    kept by character."""
    start_charset: str = ""
    """Alphabet of a public .pth, if it differs from --charset: 36, 62, 94 or the characters."""
    seed: int = 0
    """Seed of weights and order."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds training/, validation/ and evaluation/; --train and --evaluate also take folders."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda; use torchrun or Slurm for several processes."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    workers: int = field(default_factory=default_workers)
    """Loader processes, if the training set is not kept in memory."""
    checkpoint_every: int = 1000
    """Steps between saves."""
    compile: bool = False
    """torch.compile the network."""
    skip_broken: bool = False
    """Skip broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.experiments import Source, train_and_evaluate
        from str_benchmark.train import make_fabric

        fabric = make_fabric(self.device, self.precision)
        _, outcome = train_and_evaluate(
            self.settings,
            self.seed,
            Source(self.data_root, self.workers, self.skip_broken),
            fabric,
            self.output,
            base=self.output.with_suffix(".base.pt"),
            start=self.start,
            start_charset=self.start_charset,
            checkpoint_every=self.checkpoint_every,
            compile=self.compile,
        )
        if fabric.global_rank == 0:
            print_scores(outcome, ("n", "empty_labels"))


@dataclass
class Frontier:
    """Models on the upper hull of accuracy against time and parameters, and the non-dominated ones."""

    csv: Path | None = None
    """Your CSV file with a column `combination`; default: the paper's table 8."""
    accuracy: str = "total_8539"
    """Column of the accuracy."""
    costs: tuple[str, ...] = ("time_ms", "params_M")
    """Columns of the costs."""

    def __call__(self) -> None:
        import pandas as pd

        from str_benchmark.analysis import frontier, published

        frame = pd.read_csv(self.csv) if self.csv else published()
        for cost in self.costs:
            print(frontier(frame, cost, self.accuracy).to_string(index=False), end="\n\n")


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from shared_utils.report import results_page
        from str_benchmark import experiments
        from str_benchmark.analysis import recomputed_page
        from str_benchmark.figures import draw_all

        results = results_folder(experiments.PROJECT)
        draw_all(experiments.tables(), results, runs_folder(experiments.PROJECT) / "rendered")
        page = results_page(PROGRAM, experiments.tables(), results, "str-benchmark run")
        (results / "RESULTS.md").write_text(page + "\n" + recomputed_page())


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger
        from str_benchmark.experiments import PROJECT

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed against the plain composition of the reference's steps, on the same weights and images."""

    checkpoint: Path | None = None
    """Measure this network alone: a file written by `train`, english_g2, or a public .pth with --model."""
    network: Network = field(default_factory=Network)
    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from str_benchmark import bench

        if self.checkpoint is None:
            return bench.run(self.repeats, self.threads)
        bench.run_network(self.network.load(self.checkpoint, "auto")[0], self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "compare": Compare, "predict": Predict, "data": Data,
    "create-lmdb": CreateLmdb, "render": Render, "export": Export, "frontier": Frontier, "tables": Tables,
    "record": Record, "bench": Bench,
}  # fmt: skip

FLAT = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        verbs = {name: _call(kind) for name, kind in VERBS.items()}
        tyro.extras.subcommand_cli_from_dict(verbs, prog=PROGRAM, args=arguments, config=FLAT)
    except KeyboardInterrupt:
        print(
            f"{PROGRAM}: interrupted; finished runs and checkpoints are kept; the same command resumes", file=sys.stderr
        )
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        wrong = isinstance(error, ValueError | TypeError | FileNotFoundError | FileExistsError)
        plain = wrong or isinstance(error, RuntimeError | OSError)
        print(f"{PROGRAM}: {error if plain else repr(error)}", file=sys.stderr)
        sys.exit(2 if wrong else 1)


def _call(kind: type) -> Callable[..., None]:
    def act(command: Annotated[Callable[[], None], tyro.conf.arg(name="")]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
