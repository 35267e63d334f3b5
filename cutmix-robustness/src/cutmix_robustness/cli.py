"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cutmix_robustness.settings import PRESETS, Settings
from shared_utils.folders import results_folder, runs_folder

PROGRAM = "cutmix-robustness"

if TYPE_CHECKING:
    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/cutmix-robustness."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


@dataclass
class Run:
    """Run the missing runs of the papers' tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-5; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, twowave, digits, cifar10-jpeg-short, cifar10-jpeg or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the data sets."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    workers: int | None = None
    """Processes per run that read image files; none: one per core, eight at most."""
    skip_broken: bool = False
    """Skip image files that cannot be decoded, and say so in the record, instead of stopping."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's; detection stays in float32."""
    compile: bool = False
    """torch.compile the network."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from cutmix_robustness import experiments
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or experiments.built(known.values(), self.scale)
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            log = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            needs = partial(experiments.needs_of, data_root=self.data_root)
            return print_missing(chosen, self.scale, self.rows, self.seeds, log, needs, force=self.force)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
            precision=self.precision,
            compile=self.compile,
            reading=experiments.Reading(self.workers, self.skip_broken),
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint, from which the same command resumes."""

    settings: Preset
    """A preset; flags after it change its settings, flags of `train` come before it."""
    output: Path = Path("cutmix-robustness.pt")
    """Checkpoint; `cutmix-robustness eval` reads it. With --validation-images the best epoch is kept next to it."""
    seed: int = 0
    """Seed of weights, order, augmentation and mixing."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the data set."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda; use torchrun or Slurm for several processes."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    checkpoint_every: int = 1000
    """Steps between saves."""
    compile: bool = False
    """torch.compile the network."""
    workers: int | None = None
    """Processes that read image files; default: one per core, at most eight."""
    skip_broken: bool = False
    """Skip image files that cannot be decoded instead of stopping."""

    def __call__(self) -> None:
        from cutmix_robustness.data.benchmark import open_benchmark
        from cutmix_robustness.data.inventory import needs
        from cutmix_robustness.experiments import train_and_evaluate
        from cutmix_robustness.train import make_fabric
        from shared_utils.preflight import require

        require(needs(self.settings, self.data_root))
        fabric = make_fabric(self.device, self.precision)
        benchmark = open_benchmark(
            self.settings, self.seed, self.data_root, fabric.device, self.workers, self.skip_broken
        )
        _, outcome = train_and_evaluate(
            self.settings,
            self.seed,
            benchmark,
            self.data_root,
            fabric,
            self.output,
            self.checkpoint_every,
            self.compile,
        )
        if fabric.global_rank == 0:
            print(json.dumps(outcome.metrics, indent=2))


@dataclass
class Eval:
    """Evaluate a checkpoint of `train`, or any model on --data: accuracy, robustness and uncertainty as JSON."""

    model: tyro.conf.Positional[str]
    """Checkpoint of `train`; or torchvision:<name>, timm:<name>, package.module:function, TorchScript, ONNX, or a
    checkpoint in the layout of the authors of CutMix."""
    data: str = ""
    """cifar10, cifar100, cifar10-jpeg, imagenet, or a folder with one folder of images per class; default: the
    training data of `train`."""
    weights: Path | None = None
    """State dict for torchvision:<name> or timm:<name>, instead of the pretrained one."""
    suites: tuple[str, ...] = ()
    """Suites to run, from clean, calibration, temperature, occlusion, fgsm, pgd, autoattack, corruption, ood, odin,
    mahalanobis, in_between, localization; default: those of `train`, or the six that need nothing else."""
    probe_images: int = 0
    """For any other model: number of test images for occlusion, attacks, corruptions and pairs; 0: all."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds a named data set."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    workers: int | None = None
    """Processes that read image files; default: one per core, at most eight."""
    skip_broken: bool = False
    """Skip image files that cannot be decoded instead of stopping."""

    def __call__(self) -> None:
        from cutmix_robustness.experiments import Reading, evaluate_checkpoint, evaluate_model
        from cutmix_robustness.settings import SUITES

        for suite in self.suites:
            if suite not in SUITES:
                raise ValueError(f"unknown suite {suite!r}; the suites are {', '.join(SUITES)}")
        if self.data:
            reading = Reading(self.workers, self.skip_broken)
            words = (self.model, self.data, self.data_root, self.device, self.suites, self.weights, self.probe_images)
            metrics = evaluate_model(*words, reading)
        else:
            metrics = evaluate_checkpoint(Path(self.model), self.data_root, self.device, self.suites)
        print(json.dumps(metrics, indent=2))


@dataclass
class Corrupt:
    """Corrupt images: a file or folder into PNG files, or a CIFAR test set into the .npy files of CIFAR-C."""

    source: tyro.conf.Positional[str]
    """An image, a folder of images, or cifar10, cifar100 or cifar10-jpeg."""
    output: tyro.conf.Positional[Path]
    """Folder to write to."""
    names: tuple[str, ...] = ()
    """Corruptions to apply; default: all 19."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities for image files, 1 .. 5; a CIFAR set always gets all five."""
    scale: Literal["cifar", "imagenet"] = "imagenet"
    """Which constants to use for image files."""
    seed: int = 0
    """Seed of all random draws."""
    skip_broken: bool = False
    """Skip files that cannot be decoded instead of stopping."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds the CIFAR test set."""

    def __call__(self) -> None:
        from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
        from cutmix_robustness.data import cifar, corrupted

        names = self.names or (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
        if self.source in ("cifar10", "cifar100", "cifar10-jpeg"):
            _, test, _ = cifar.load(self.source, self.data_root, "none", "cpu")
            corrupted.write_cifar_c(test, self.output, names, self.seed)
        else:
            written = corrupted.write_images(
                Path(self.source), self.output, names, self.severities, self.scale, self.seed, self.skip_broken
            )
            print(f"{written:,} images written below {self.output}")


@dataclass
class Data:
    """List which data are needed, where they are looked for, and what is there."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list; or verify, which decodes every image that is there completely."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""
    download: Literal["mnist", "cifar10", "cifar100", "svhn", "voc"] | None = None
    """Download this data set through torchvision, which checks its hash."""
    tiny: Path | None = None
    """Write small archives in the layout of the real ones into this new folder."""
    workers: int | None = None
    """verify: processes; default: one per core, at most eight."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from cutmix_robustness.data.inventory import fetch, inventory, verify
        from cutmix_robustness.tiny import write_all
        from shared_utils.logging import console

        if self.tiny:
            return write_all(self.tiny)
        if self.action == "verify":
            checked = verify(self.data_root, self.workers)
            for name, (count, broken) in checked.items():
                print(f"{name}: {count:,} images, {len(broken)} broken")
            lines = [line for _, broken in checked.values() for line in broken]
            if lines:
                raise RuntimeError("\n".join([f"{len(lines)} broken", *lines]))
            return None

        if self.download:
            fetch(self.download, self.data_root)
        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        return console().print(grid)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from cutmix_robustness import experiments
        from cutmix_robustness.figures import draw_all
        from shared_utils.report import results_page

        results = results_folder(experiments.PROJECT)
        draw_all(experiments.tables(), results)
        page = results_page(PROGRAM, experiments.tables(), results, f"{PROGRAM} run")
        (results / "RESULTS.md").write_text(page)


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from cutmix_robustness.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed: mixing against timm and torchvision, corruptions against imagecorruptions, training against eager."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from cutmix_robustness.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "corrupt": Corrupt, "data": Data,
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
