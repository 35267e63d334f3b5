"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from satrn.settings import PRESETS, Settings
from satrn.verbs import (
    Aspect,
    Data,
    Eval,
    Export,
    McNemar,
    Read,
    Render,
    RotateCurve,
    default_data_root,
    loader_processes,
    read_characters,
)
from shared_utils.folders import results_folder, runs_folder

PROGRAM = "satrn"

if TYPE_CHECKING:
    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


@dataclass
class Run:
    """Run the missing runs of the paper's tables (into runs/), print published | ours | yours, draw the figures."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-3a; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, rendered, icdar2003 or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds training/ and evaluation/."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    workers: int = -1
    """Loader processes of a run; -1: one per core, at most eight."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    compile: bool = False
    """torch.compile the training step."""
    skip_broken: bool = False
    """Skip broken words (they are counted and named)."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from functools import partial

        from satrn import experiments
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            done = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            needed = partial(experiments.needs, data_root=self.data_root, output=runs_folder(experiments.PROJECT))
            return print_missing(chosen, self.scale, self.rows, self.seeds, done, needed, force=self.force)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
            workers=loader_processes(self.workers),
            skip_broken=self.skip_broken,
            precision=self.precision,
            compile=self.compile,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)
        from satrn.figures import draw_all

        for path in draw_all(chosen, yours.path.parent, (self.scale,)):
            print(path)


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint, from which the same command resumes."""

    settings: Preset
    """A preset; flags after it change its settings, flags of this command come before it."""
    output: Path = Path("satrn.pt")
    """Checkpoint; `satrn eval` and `satrn read` take it."""
    seed: int = 0
    """Seed of weights, order, rotations and dropout."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds training/ and evaluation/."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda; use torchrun or Slurm for several processes."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    start: Path | None = None
    """Checkpoint of satrn or MMOCR to fine-tune: takes its network and keeps the rows of known characters."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""
    checkpoint_every: int = 1000
    """Steps between saves."""
    compile: bool = False
    """torch.compile the training step."""
    workers: int = -1
    """Loader processes; -1: one per core, at most eight."""
    skip_broken: bool = False
    """Skip broken words (they are counted and named)."""

    def __call__(self) -> None:
        from satrn.experiments import needs, train_and_evaluate
        from satrn.train import make_fabric, report_point
        from shared_utils.preflight import require

        require(needs(vars(self.settings), self.data_root, self.output.absolute().parent))
        fabric = make_fabric(self.device, self.precision)
        _, outcome = train_and_evaluate(
            self.settings, self.seed, self.data_root, fabric, self.output, checkpoint_every=self.checkpoint_every,
            compile=self.compile, workers=loader_processes(self.workers), skip_broken=self.skip_broken,
            start=self.start, dictionary=read_characters(self.dictionary), on_point=report_point(self.settings),
        )  # fmt: skip
        if fabric.global_rank == 0:
            print(json.dumps(outcome.metrics, indent=2))


@dataclass
class Check:
    """Self-check: a preset must overfit one batch of rendered words; exit code 1 if it does not."""

    settings: Preset
    """A preset; flags after it change its settings."""
    batch_steps: int = 300
    """Training steps on that batch."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.experiments import overfit_one_batch
        from satrn.train import make_fabric

        accuracy = overfit_one_batch(self.settings, make_fabric(self.device), self.batch_steps)
        print(f"{accuracy:.0f} % of the batch is read")
        if accuracy < 100:
            raise RuntimeError(f"only {accuracy:.0f} % of one batch was learned in {self.batch_steps} steps")


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from satrn import experiments
        from satrn.figures import draw_all
        from shared_utils.report import results_page

        results = results_folder(experiments.PROJECT)
        draw_all(experiments.tables(), results)
        (results / "RESULTS.md").write_text(results_page(PROGRAM, experiments.tables(), results, "satrn run"))


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from satrn.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed: cached decoding against recompute-everything, equality checked; on CUDA also the training step."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from satrn.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "mcnemar": McNemar, "read": Read,
    "rotate-curve": RotateCurve, "aspect": Aspect, "render": Render, "check": Check,
    "export": Export, "data": Data, "tables": Tables, "record": Record,
    "bench": Bench,
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
        wrong = isinstance(error, ValueError | TypeError | FileNotFoundError)
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
