"""Command line: parse, call, print, exit code. torch is imported inside the verbs, so that --help is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hib_ndigit_mnist.settings import SCALES, TrainedOn, default_data_root

PROGRAM = "hib-ndigit-mnist"


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-1 or figure-3; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded, lenet or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    data_root: Path = field(default_factory=default_data_root)
    """Where MNIST is."""
    jobs: int = 0
    """Groups of models side by side; 0: one per core, or a single one on CUDA."""
    precision: str = "auto"
    """Of the encoder: auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    force: bool = False
    """Run again what is there already."""
    dry_run: bool = False
    """List the missing runs and their expected cost only."""

    def __call__(self) -> None:
        from hib_ndigit_mnist import experiments
        from shared_utils.report import print_table
        from shared_utils.runlog import RunLog

        everything = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in everything:
                raise ValueError(f"unknown table {name!r}; there are {', '.join(everything)}")
        chosen = [everything[name] for name in self.tables] or list(everything.values())
        chosen = [table for table in chosen if self.scale in table.scales]
        if not chosen:
            raise ValueError(f"none of these tables has a scale {self.scale!r}")
        if self.rows and not self.tables:
            raise ValueError("rows: name the table they are in")
        if self.dry_run:
            return experiments.print_missing(chosen, self.scale, self.data_root, self.rows, self.seeds, self.force)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
            precision=self.precision,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass(frozen=True)
class Train(TrainedOn):
    """Train one model and write it; interrupted, the same command goes on. --scale sets the defaults below."""

    output: Path = Path("hib-ndigit-mnist.pt")
    """File to write; the checkpoint lies beside it."""
    scale: str = "embedded"
    """Whose defaults to take: smoke, embedded, mnist or paper."""
    seed: int = 0
    """Of weights, batches, occluders and samples."""
    data_root: Path = field(default_factory=default_data_root)
    """Where MNIST is."""
    device: str = "auto"
    """auto, cpu or cuda; several processes through torchrun or Slurm."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    checkpoint_every: int = 5000
    """Steps between saves."""

    def __call__(self) -> None:
        from hib_ndigit_mnist.workflow import train_to_file

        train_to_file(self, self.output, self.seed, self.data_root, self.device, self.precision, self.checkpoint_every)


@dataclass
class Eval:
    """Evaluate a model on clean and corrupted test images: JSON on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """Model written by train."""
    split: str | None = None
    """test_seen, test_unseen or test; default: the first of the model's data set."""
    conditions: tuple[str, ...] = ("clean", "corrupt")
    """Whose figures to print."""
    estimator: str = "auto"
    """quadrature, mc or auto."""
    samples: int = 8
    """K of mc."""
    images: int = 10_000
    """Test images."""
    pairs: str = "10000"
    """Verification pairs, half of them matching, or all."""
    queries: int = 10_000
    """Images to identify."""
    data_root: Path = field(default_factory=default_data_root)
    """Where MNIST is."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __call__(self) -> None:
        import json

        from hib_ndigit_mnist.workflow import evaluate_file

        pairs = self.pairs if self.pairs == "all" else int(self.pairs)
        sizes = {"images": self.images, "pairs": pairs, "queries": self.queries}
        options = {"estimator": self.estimator, "samples": self.samples}
        where = self.data_root, self.device
        print(json.dumps(evaluate_file(self.checkpoint, self.split, self.conditions, *where, sizes, options)))


@dataclass
class Embed:
    """Embed images and write mu, logvar (of mixtures of Gaussians), eta and file names as .npz."""

    checkpoint: tyro.conf.Positional[Path]
    """Model written by train."""
    images: tyro.conf.Positional[Path]
    """An image, a folder with images at any depth, or .npy / .npz with uint8 images (n, H, W)."""
    output: Path = Path("emb.npz")
    """File to write."""
    invert: bool = False
    """For dark digits on white."""
    skip_broken: bool = False
    """Leave out files that cannot be read."""

    def __call__(self) -> None:
        from hib_ndigit_mnist.workflow import embed_to_file

        embed_to_file(self.checkpoint, self.images, self.output, self.invert, self.skip_broken)


@dataclass
class Inspect:
    """How a model sees one image of yours: Gaussians, uncertainty, and the numbers it may be. JSON on stdout."""

    image: tyro.conf.Positional[Path]
    """Light digits on black; fitted into the model's input with its aspect ratio kept."""
    checkpoint: Path = Path("hib-ndigit-mnist.pt")
    """Model written by train."""
    invert: bool = False
    """For dark digits on white."""
    top: int = 5
    """Numbers to name."""

    def __call__(self) -> None:
        import json

        from hib_ndigit_mnist.workflow import inspect_image

        print(json.dumps(inspect_image(self.checkpoint, self.image, self.invert, self.top), indent=2))


@dataclass
class Data:
    """What is needed, where it is looked for, and what is there; with --output, writes N-digit images as .npz."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list, or verify: read everything to its end."""
    data_root: Path = field(default_factory=default_data_root)
    """Where to look."""
    images: Path | None = None
    """Folder of your own images, for verify."""
    download: bool = False
    """Fetch MNIST through torchvision, checked by hash."""
    tiny: Path | None = None
    """Folder for small archives in the layout of the real ones: what yours should look like."""
    output: Path | None = None
    """Folder for <split>.npz with images (n, 28, 28 N) uint8 and labels (n,) int64, as google/n-digit-mnist writes."""
    num_digits: int = 2
    """N in 1 to 6."""
    gap: Literal["number", "instance"] = "number"
    """number or instance."""
    standard: bool = True
    """The published tables; with --no-standard drawn anew with --seed."""
    seed: int = 714
    """Of a draw."""

    def __call__(self) -> None:
        if self.tiny:
            from hib_ndigit_mnist.tiny import write_tiny
            from shared_utils.logging import get_logger

            return get_logger(PROGRAM).info("%d files in %s", len(write_tiny(self.tiny)), self.tiny)
        if self.action == "verify":
            from hib_ndigit_mnist.inventory import verify

            return verify(self.data_root, self.images)
        if self.download:
            from torchvision.datasets import MNIST

            MNIST(str(self.data_root), download=True)
        if self.output:
            from hib_ndigit_mnist.workflow import export

            return export(self.data_root, self.output, self.num_digits, self.gap, self.standard, self.seed)
        from rich.table import Table as Grid

        from hib_ndigit_mnist.inventory import inventory
        from shared_utils.logging import console

        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from hib_ndigit_mnist import experiments
        from hib_ndigit_mnist.figures import draw_all
        from shared_utils.report import results_page

        results = experiments.PROJECT / "results"
        draw_all(experiments.tables(), results)
        page = results_page(PROGRAM, experiments.tables(), results, f"{PROGRAM} run")
        (results / "RESULTS.md").write_text(page)


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from hib_ndigit_mnist.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed of the pair loss against other ways to compute it, time and memory of all-pairs evaluation."""

    repeats: int = 9
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from hib_ndigit_mnist.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "embed": Embed, "inspect": Inspect, "data": Data, "tables": Tables,
    "record": Record, "bench": Bench,
}  # fmt: skip


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    words = [word for word in sys.argv[1:] if word != "--debug"]
    warnings.showwarning = lambda message, *_: print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
    try:
        verbs = {name: _call(kind, _defaults(words) if name == "train" else None) for name, kind in VERBS.items()}
        tyro.extras.subcommand_cli_from_dict(verbs, prog=PROGRAM, args=words)
    except KeyboardInterrupt:
        _fail("interrupted; finished runs and checkpoints are kept, the same command goes on", 130)
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


def _defaults(words: list[str]) -> Train:
    """What `train` takes where nothing is said: the settings of --scale."""
    given = [
        word.partition("=")[2] or after
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word.split("=")[0] == "--scale"
    ]
    scale = given[-1] if given and words[0] == "train" else "embedded"
    if scale not in SCALES:
        raise ValueError(f"scale: one of {', '.join(SCALES)} was expected, got {scale!r}")
    return Train(**SCALES[scale], scale=scale)


def _call(kind: type, default: object = None) -> Callable[[Callable[[], None]], None]:
    def act(command: Callable[[], None]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__defaults__ = None if default is None else (default,)
    act.__doc__ = kind.__doc__
    return act
