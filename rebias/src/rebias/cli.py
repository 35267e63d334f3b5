"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rebias.settings import PRESETS, Settings
from shared_utils.folders import results_folder, runs_folder

PROGRAM = "rebias"

if TYPE_CHECKING:
    from rebias.data.dataset import Reading

    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/rebias."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


def _reading(verb: Run | Train | Eval) -> Reading:
    from rebias.data.dataset import Reading

    return Reading(verb.workers, verb.skip_missing, verb.skip_broken)


@dataclass
class Run:
    """Run the missing runs of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-1; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, mnist, mnist-k7-short, mnist-k7, paper-25 or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds MNIST, ImageNet and videos."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    workers: int = -1
    """Processes that read files; -1: one per core, at most 8."""
    skip_missing: bool = False
    """Skip videos that are missing (they are counted and named)."""
    skip_broken: bool = False
    """Skip files that cannot be decoded (they are counted and named)."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA, float32 on a CPU), or one of Fabric's such as bf16-mixed."""
    compile: bool = False
    """torch.compile the networks."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from rebias import experiments
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        execution = experiments.Execution(self.data_root, _reading(self), self.precision, self.compile)
        if self.dry_run:
            log = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            return print_missing(chosen, self.scale, self.rows, self.seeds, log, execution.needs, force=self.force)
        yours = experiments.run_tables(
            chosen, self.scale, execution, rows=self.rows, seeds=self.seeds, force=self.force, jobs=self.jobs
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint, from which the same command resumes."""

    settings: Preset
    """A preset; flags after it change its settings, flags of this command come before it."""
    output: Path = Path("rebias.pt")
    """Checkpoint; `rebias eval` reads it."""
    seed: int = 0
    """Seed of colours, weights and order."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the data set."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda; use torchrun or Slurm for several processes."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA, float32 on a CPU), or one of Fabric's such as bf16-mixed."""
    checkpoint_every: int = 500
    """Steps between saves."""
    compile: bool = False
    """torch.compile the networks."""
    workers: int = -1
    """Processes that read files; -1: one per core, at most 8."""
    skip_missing: bool = False
    """Skip videos that are missing (they are counted and named)."""
    skip_broken: bool = False
    """Skip files that cannot be decoded (they are counted and named)."""

    def __call__(self) -> None:
        from rebias.data.inventory import needs
        from rebias.experiments import train_and_evaluate
        from rebias.tasks import TASKS
        from rebias.train import make_fabric
        from shared_utils.preflight import require

        require(needs(self.settings, self.data_root, self.output.absolute().parent))
        fabric = make_fabric(self.device, self.precision)
        task = TASKS[self.settings.dataset](self.settings, self.seed, self.data_root, fabric, _reading(self))
        _, outcome = train_and_evaluate(task, self.output, self.checkpoint_every, self.compile, watch=True)
        if fabric.global_rank == 0:
            print(json.dumps(outcome.metrics, indent=2))


@dataclass
class Eval:
    """Evaluate a checkpoint of `rebias train`, or a file of predictions, group by group: JSON on stdout."""

    file: tyro.conf.Positional[Path]
    """Checkpoint written by `rebias train`, or a CSV file with the columns prediction, label, bias."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the data set."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    workers: int = -1
    """Processes that read files; -1: one per core, at most 8."""
    skip_missing: bool = False
    """Skip videos that are missing (they are counted and named)."""
    skip_broken: bool = False
    """Skip files that cannot be decoded (they are counted and named)."""

    def __call__(self) -> None:
        from rebias.evaluate import group_report, read_predictions
        from rebias.experiments import evaluate_checkpoint

        if self.file.suffix.lower() == ".csv":
            metrics, details = group_report(*read_predictions(self.file))
        else:
            metrics, details = evaluate_checkpoint(self.file, self.data_root, self.device, _reading(self))
        groups = {name: details[name] for name in ("group_matrix", "group_counts") if name in details}
        print(json.dumps(metrics | groups, indent=2))


@dataclass
class Data:
    """List which data are needed, where they are looked for, and what is there."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list; or verify, which decodes every file completely and names the broken ones."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""
    download: bool = False
    """Download what may be downloaded (MNIST, through torchvision, checked by hash)."""
    preview: Path | None = None
    """Write a PNG of biased digits to this file."""
    tiny: Path | None = None
    """Write tiny archives in the layout of the real ones into this folder, to show what a data root looks like."""

    workers: int = -1
    """Processes or threads that read files; -1: one per core, at most 8."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from rebias.data.inventory import inventory, verify
        from shared_utils.logging import console

        if self.download:
            from torchvision.datasets import MNIST

            MNIST(str(self.data_root), download=True)
        if self.preview:
            from rebias.figures import draw_preview

            draw_preview(self.preview)
        if self.tiny:
            from rebias.data.tiny import write

            return write(self.tiny)
        if self.action == "verify":
            checked = verify(self.data_root, self.workers)
            for name, (count, broken) in checked.items():
                console().print(f"{name}: {count:,} files, {len(broken)} broken", highlight=False)
            lines = [line for _, broken in checked.values() for line in broken.values()]
            if lines:
                raise RuntimeError(f"{len(lines)} broken files, first {lines[0]}")
            return None
        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Clusters:
    """Recompute texture clusters (appendix F) of images in WordNet-id folders, and write them as CSV."""

    images: tyro.conf.Positional[Path]
    """Folder with one folder per WordNet id, such as imagenet/val."""
    output: tyro.conf.Positional[Path]
    """CSV file to write."""
    weights: Path
    """State dict of torchvision's vgg16 with ImageNet weights."""
    layer: str = "relu1_2"
    """relu1_2 (the paper's text) or conv3_3 (what the released code computes)."""
    repeats: int = 3
    """Independent clusterings."""
    seed: int = 0
    """Of k-means."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    workers: int = -1
    """Processes that read files; -1: one per core, at most 8."""
    skip_broken: bool = False
    """Skip files that cannot be decoded (they are counted and named)."""

    def __call__(self) -> None:
        from rebias.data.dataset import Reading
        from rebias.data.imagenet9 import image_folder
        from rebias.data.texture import texture_clusters, texture_network
        from rebias.train import make_fabric

        network = texture_network(self.weights, self.layer)
        reading = Reading(self.workers, skip_broken=self.skip_broken)
        data = image_folder(self.images, self.images.name, device=make_fabric(self.device).device, reading=reading)
        texture_clusters(data, network, repeats=self.repeats, seed=self.seed).to_csv(self.output, index=False)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from rebias import experiments
        from rebias.figures import draw_all
        from shared_utils.report import results_page

        results = results_folder(experiments.PROJECT)
        draw_all(experiments.tables(), results)
        (results / "RESULTS.md").write_text(results_page(PROGRAM, experiments.tables(), results, "rebias run"))


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from rebias.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed: HSIC against its O(m^3) form, a step against vanilla's and the released one, colours against PIL."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from rebias.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "data": Data, "clusters": Clusters,
    "tables": Tables, "record": Record, "bench": Bench,
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
        plain = isinstance(error, ValueError | TypeError | RuntimeError | OSError)
        print(f"{PROGRAM}: {error if plain else repr(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError | TypeError | FileNotFoundError) else 1)


def _call(kind: type) -> Callable[..., None]:
    def act(command: Callable[[], None]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
