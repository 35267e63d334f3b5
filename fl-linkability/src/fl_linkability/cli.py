"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fl_linkability.settings import PRESETS
from shared_utils.folders import results_folder, runs_folder

if TYPE_CHECKING:
    from fl_linkability.data.reading import Reading
    from shared_utils.preflight import Need
    from shared_utils.runlog import RunLog
    from shared_utils.tables import Table

PROGRAM = "fl-linkability"


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/fl-linkability."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / "fl-linkability")


@dataclass
class DataOptions:
    """Where the data sets are, and how they are read."""

    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the data sets."""
    workers: int = 0
    """Threads that decode images; 0: one per core."""
    skip_broken: bool = False
    """Skip images that cannot be decoded; they are counted, named in the log and noted in the record."""

    @property
    def reading(self) -> Reading:
        """In the form that the loaders take."""
        from fl_linkability.data.reading import Reading

        return Reading(self.data_root, self.workers, self.skip_broken)


@dataclass
class Run(DataOptions):
    """Run the missing runs of the tables (into runs/) and print published | ours | yours, with verdicts."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-3; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, mnist, femnist-like, head or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    jobs: int = 0
    """Number of parallel federations, one process each; 0: one per core on a CPU, one on CUDA."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs, their expected time and the data that are missing."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""

    def __call__(self) -> None:
        from fl_linkability import catalogue

        known = {table.id: table for table in catalogue.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            from shared_utils.report import print_missing
            from shared_utils.runlog import RunLog

            done = RunLog(runs_folder(catalogue.PROJECT) / f"{self.scale}.jsonl")
            return print_missing(
                chosen, self.scale, self.rows, self.seeds, done, _needs(self.reading), force=self.force
            )
        from fl_linkability import experiments

        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.reading,
            needs=_needs(self.reading),
            precision=self.precision,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
        )
        _print_tables(chosen, self.scale, yours)


def _needs(reading: Reading) -> Callable[[dict], Iterable[Need]]:
    from fl_linkability.needs import needs
    from fl_linkability.settings import Settings

    return lambda settings: needs(Settings(**settings), reading)


def _print_tables(chosen: list[Table], scale: str, yours: RunLog) -> None:
    from fl_linkability import claims
    from fl_linkability.catalogue import PROJECT
    from shared_utils.logging import console
    from shared_utils.report import print_table
    from shared_utils.runlog import RunLog

    for table in chosen:
        print_table(table, scale, RunLog(PROJECT / "results" / f"{scale}.jsonl"), yours)
        for verdict in claims.judge(table, scale, yours):
            console().print(f"  {'over users':<12} {verdict.claim.text} ({verdict})", highlight=False)


@dataclass(kw_only=True)
class Train(DataOptions):
    """Run one federation, keep its updates and weights, and print one attack as JSON; the same command resumes."""

    settings: tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]  # type: ignore[valid-type]  # made at run time
    """A preset. Flags after it change its settings; flags of this command go before it."""
    output: Path = Path("federation")
    """Folder for updates and checkpoint; `fl-linkability attack` reads it."""
    seed: int = 0
    """Seed of users, weights and order."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda; use torchrun or Slurm for several processes."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""

    def __call__(self) -> None:
        from fl_linkability.experiments import Experiment, save_settings
        from fl_linkability.train import make_fabric
        from shared_utils.logging import progress
        from shared_utils.preflight import require

        require(_needs(self.reading)(asdict(self.settings)))
        run = Experiment(self.settings, self.seed, self.reading, make_fabric(self.device, self.precision))
        run.folder = self.output
        save_settings(self.output, self.settings, self.seed)
        with progress() as bar:
            task = bar.add_task("rounds", total=self.settings.rounds)
            run.on_round = lambda finished: bar.update(task, completed=finished)
            run.simulation  # noqa: B018 - every rank runs it
        if run.fabric.global_rank == 0:
            print(json.dumps(run.measure(self.settings).metrics, indent=2))


@dataclass
class Attack:
    """Attack the updates that `fl-linkability train` kept: JSON on stdout."""

    folder: tyro.conf.Positional[Path]
    """Folder written by `fl-linkability train`."""
    measure: str = "reid"
    """What to measure: reid, pairs, all-pairs, open, open-reid, open-matching, stage, groups or protocol."""
    attack: str = "paper-mlp"
    """paper-knn, paper-svm, paper-svm-votes, paper-mlp, paper-siamese (pairs), centroid, knn-1, knn-5, logreg, mlp.
    all-pairs always compares by cosine."""
    layers: str = "all"
    """Layer that the attack sees; default: all kept layers."""
    center: str = "none"
    """How updates are centred: none or leave-one-out."""
    set_size: int = 1
    """For measure groups: updates per sum."""
    seed: int = 0
    """Seed of the attack."""

    def __call__(self) -> None:
        from fl_linkability.experiments import attack_folder, load_settings

        settings = replace(
            load_settings(self.folder)[0],
            measure=self.measure,
            attack=self.attack,
            layers=self.layers,
            center=self.center,
            set_size=self.set_size,
        )
        print(json.dumps(attack_folder(self.folder, settings, self.seed), indent=2))


@dataclass
class Data:
    """List which data are needed, where they are looked for, and which are found."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list; or verify, which reads all files of the data sets found, from beginning to end."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""
    download: bool = False
    """Download what may be downloaded: MNIST and MobileNet's weights, through torchvision, checked by hash."""
    preview: Path | None = None
    """Write a PNG of digits users to this file."""
    tiny: Path | None = None
    """Write small archives in the real layouts below this folder, to show what a data root looks like."""
    femnist_like: Path | None = None
    """Make 60 writers from MNIST and write them in LEAF's format below this folder, a data root for femnist."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from fl_linkability.data.inventory import inventory
        from shared_utils.logging import console

        if self.tiny:
            from fl_linkability.tiny import write_tiny

            return write_tiny(self.tiny)
        if self.femnist_like:
            from fl_linkability.data.femnist import write_femnist_like

            return write_femnist_like(self.data_root, self.femnist_like)
        if self.download:
            from torchvision.datasets import MNIST
            from torchvision.models import MobileNet_V2_Weights

            MNIST(str(self.data_root), download=True)
            MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        if self.preview:
            from fl_linkability.figures import draw_preview

            draw_preview(self.preview)
        if self.action == "verify":
            from fl_linkability.data.inventory import verify

            for name, count in verify(self.data_root):
                console().print(f"{name}: {count:,} images or texts read completely", highlight=False)
            return
        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from fl_linkability import catalogue, claims
        from fl_linkability.figures import draw_all
        from shared_utils.report import results_page

        results, tables = results_folder(catalogue.PROJECT), catalogue.tables()
        draw_all(tables, results)
        page = results_page(PROGRAM, tables, results, "fl-linkability run")
        (results / "RESULTS.md").write_text(page + "\n" + claims.section(tables, results))


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from fl_linkability.catalogue import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed: batched trainer against the per-client loop, the cost of Flower's messages, and Ray's start-up."""

    repeats: int = 7
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""
    ray: bool = False
    """Also measure Ray (a minute or two)."""

    def __call__(self) -> None:
        from fl_linkability.bench import run

        run(self.repeats, self.threads, self.ray)


VERBS = {
    "run": Run, "train": Train, "attack": Attack, "data": Data, "tables": Tables, "record": Record, "bench": Bench,
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
        _fail("interrupted; finished runs and checkpoints are kept; the same command resumes", 130)
    except (ValueError, TypeError, FileNotFoundError) as error:
        if debug:
            raise
        _fail(str(error), 2)
    except Exception as error:
        if debug:
            raise
        _fail(str(error) if isinstance(error, RuntimeError | OSError) else repr(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    sys.exit(code)


def _call(kind: type) -> Callable[[Callable[[], None]], None]:
    def act(command: Callable[[], None]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
