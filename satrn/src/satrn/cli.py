"""Command line: parse, call, print, exit code. Heavy imports wait inside the verbs, so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from satrn.settings import PRESETS, Settings

PROGRAM = "satrn"

if TYPE_CHECKING:
    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/satrn."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/), print published | ours | yours, draw the figures."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-3a; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded, rendered or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    data_root: Path = field(default_factory=default_data_root)
    """Where training/ and evaluation/ are."""
    jobs: int = 0
    """Runs side by side, one process each; 0: one per core on a CPU, one on CUDA."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""
    force: bool = False
    """Run again what is there already."""
    dry_run: bool = False
    """List the missing runs and their expected cost only."""

    def __call__(self) -> None:
        from satrn import experiments
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; there are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            done = RunLog(experiments.PROJECT / "runs" / f"{self.scale}.jsonl")
            return print_missing(chosen, self.scale, self.rows, self.seeds, done)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
            skip_broken=self.skip_broken,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)
        from satrn.figures import draw_all

        for path in draw_all(chosen, yours.path.parent, (self.scale,)):
            print(path)


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint; interrupted, the same command goes on."""

    settings: Preset
    """A preset; flags behind it change its settings, this verb's own flags stand before it."""
    output: Path = Path("satrn.pt")
    """Checkpoint; `satrn eval` and `satrn read` take it."""
    seed: int = 0
    """Of weights, order, rotations and dropout."""
    data_root: Path = field(default_factory=default_data_root)
    """Where training/ and evaluation/ are."""
    device: str = "auto"
    """auto, cpu or cuda; several processes through torchrun or Slurm."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    start: Path | None = None
    """Checkpoint to fine-tune from; another charset is carried over by character."""
    checkpoint_every: int = 1000
    """Steps between saves."""
    compile: bool = False
    """torch.compile the training step."""
    workers: int = 4
    """Loader processes."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from satrn.experiments import train_and_evaluate
        from satrn.train import make_fabric, report_point

        fabric = make_fabric(self.device, self.precision)
        _, outcome = train_and_evaluate(
            self.settings, self.seed, self.data_root, fabric, self.output, checkpoint_every=self.checkpoint_every,
            compile=self.compile, workers=self.workers, skip_broken=self.skip_broken,
            start=self.start, on_point=report_point(self.settings),
        )  # fmt: skip
        if fabric.global_rank == 0:
            print(json.dumps(outcome.metrics, indent=2))


@dataclass
class Eval:
    """Evaluate a checkpoint of `satrn train` on its test sets or on others: JSON on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `satrn train`."""
    test_sets: tuple[str, ...] = ()
    """LMDB folders below <data root>/evaluation instead of the checkpoint's own test sets."""
    data_root: Path = field(default_factory=default_data_root)
    """Where evaluation/ is."""
    device: str = "auto"
    """auto, cpu or cuda."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from satrn.experiments import evaluate_checkpoint

        metrics = evaluate_checkpoint(self.checkpoint, self.data_root, self.device, self.test_sets, self.skip_broken)
        print(json.dumps(metrics, indent=2))


@dataclass
class Read:
    """Read word images: file, text and confidence, one line each."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, one word each."""
    checkpoint: Path = Path("satrn.pt")
    """File written by `satrn train`, or MMOCR's with --mmocr."""
    mmocr: str = ""
    """1.x or 0.x: the checkpoint is MMOCR's, of that version."""
    beam: int = 1
    """Width of the beam; 1 is greedy."""
    attention: Path | None = None
    """Also write a PNG with the attention map of every character (greedy)."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.predict import read_images

        words = read_images(self.images, self.checkpoint, self.mmocr, self.beam, self.attention, self.device)
        for image, (text, confidence) in zip(self.images, words, strict=True):
            print(f"{image}\t{text}\t{confidence:.4f}")


@dataclass
class RotateCurve:
    """Word accuracy by angle of a checkpoint on an LMDB of upright words: CSV on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `satrn train`."""
    words: tyro.conf.Positional[Path]
    """LMDB folder."""
    angles: tuple[float, ...] = tuple(range(0, 360, 30))
    """Degrees, anticlockwise."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.predict import rotation_frame

        print(rotation_frame(self.checkpoint, self.words, self.angles, self.device).to_csv(index=False), end="")


@dataclass
class Aspect:
    """A2DPE's r = |alpha| / |beta| of word images: file and r, one line each (figure 7)."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, one word each."""
    checkpoint: Path = Path("satrn.pt")
    """File written by `satrn train`."""

    def __call__(self) -> None:
        from satrn.predict import image_ratios

        for image, ratio in zip(self.images, image_ratios(self.images, self.checkpoint), strict=True):
            print(f"{image}\t{ratio:.4f}")


@dataclass
class Render:
    """Write an LMDB of rendered words (two-line words for training multi-line reading, for example)."""

    output: tyro.conf.Positional[Path]
    """New LMDB folder."""
    count: int = 10000
    """Words."""
    warp: str = "multi_line"
    """straight, rotate, curve, multi_line or upright_or_vertical."""
    words: Path | None = None
    """Text file with one word per line, taken in turn; else random strings."""
    charset: str = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Of random strings."""
    word_lengths: tuple[int, int] = (4, 12)
    """Shortest and longest random string."""
    img_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    seed: int = 0
    """Of words and pictures."""

    def __call__(self) -> None:
        from satrn.predict import render_lmdb

        written = render_lmdb(
            self.output, self.count, self.warp, self.words, self.charset, self.word_lengths, self.img_size, self.seed
        )
        print(f"{written} words in {self.output}")


@dataclass
class Check:
    """Self-check: a preset must learn one batch of rendered words by heart; exit code 1 if it does not."""

    settings: Preset
    """A preset; flags behind it change its settings."""
    batch_steps: int = 300
    """Training steps on that batch."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.experiments import overfit_one_batch
        from satrn.train import make_fabric

        accuracy = overfit_one_batch(self.settings, make_fabric(self.device), self.batch_steps)
        print(f"{accuracy:.0f} % of the batch is read")
        if accuracy < 100:
            raise RuntimeError(f"only {accuracy:.0f} % of one batch was learned in {self.batch_steps} steps")


@dataclass
class Export:
    """Write a checkpoint as two ONNX graphs, encoder.onnx and step.onnx."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `satrn train`."""
    output: Path = Path("onnx")
    """Folder."""

    def __call__(self) -> None:
        from satrn.export import export_onnx
        from satrn.pretrained import load_pretrained

        print(*export_onnx(load_pretrained(self.checkpoint), self.output), sep="\n")


@dataclass
class Data:
    """What is needed, where it is looked for, and what is there."""

    data_root: Path = field(default_factory=default_data_root)
    """Where to look."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from satrn.data.inventory import inventory
        from shared_utils.logging import console

        columns = ("data", "scale", "size", "licence", "found", "where", "if missing")
        grid = Grid(*columns, title=f"below {self.data_root}")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from satrn import experiments
        from satrn.figures import draw_all
        from shared_utils.report import results_page

        results = experiments.PROJECT / "results"
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
    "run": Run, "train": Train, "eval": Eval, "read": Read, "rotate-curve": RotateCurve, "aspect": Aspect,
    "render": Render, "check": Check, "export": Export, "data": Data, "tables": Tables, "record": Record,
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
            f"{PROGRAM}: interrupted; finished runs and checkpoints are kept, the same command goes on", file=sys.stderr
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
