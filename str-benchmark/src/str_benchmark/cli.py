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

from str_benchmark.settings import PRESETS, Settings

PROGRAM = "str-benchmark"

if TYPE_CHECKING:
    from shared_utils.runlog import RunLog
    from shared_utils.tables import Table

    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/str-benchmark."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-8; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded, rendered or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    data_root: Path = field(default_factory=default_data_root)
    """Where training/, validation/ and evaluation/ are."""
    jobs: int = 0
    """Runs side by side, one process each; 0: one per core on a CPU, one on CUDA."""
    workers: int = 0
    """Loader processes of a run."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""
    force: bool = False
    """Run again what is there already."""
    dry_run: bool = False
    """List the missing runs and their expected cost only."""

    def __call__(self) -> None:
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog
        from str_benchmark import experiments

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
            workers=self.workers,
            skip_broken=self.skip_broken,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)
        if self.scale == "embedded":
            _show_words(chosen, yours)


def _show_words(chosen: list[Table], log: RunLog) -> None:
    """What was read, as text and beside its images."""
    from str_benchmark.experiments import PROJECT
    from str_benchmark.figures import draw_words

    sheet = PROJECT / "runs" / "words.png"
    words = draw_words(chosen, log, PROJECT / "runs" / "rendered", sheet)
    if words:
        print("label read: " + ", ".join(f"{label} {text or '-'}" for label, text in words))
        print(f"beside their images: {sheet.relative_to(PROJECT)}")


@dataclass
class Train:
    """Train one model, print its evaluation as JSON and keep a checkpoint; interrupted, the same command goes on."""

    settings: Preset
    """A preset; flags behind it change its settings, this verb's own flags stand before it."""
    output: Path = Path("str.pt")
    """Checkpoint; `eval`, `predict` and `export` read it."""
    seed: int = 0
    """Of weights and order."""
    data_root: Path = field(default_factory=default_data_root)
    """Where training/, validation/ and evaluation/ are; --train and --evaluate also take folders."""
    device: str = "auto"
    """auto, cpu or cuda; several processes through torchrun or Slurm."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA), or a precision of Fabric's."""
    workers: int = 4
    """Loader processes."""
    checkpoint_every: int = 1000
    """Steps between saves."""
    compile: bool = False
    """torch.compile the network."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

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
            checkpoint_every=self.checkpoint_every,
            compile=self.compile,
        )
        if fabric.global_rank == 0:
            print(json.dumps(outcome.metrics | {"n": outcome.details["n"]}, indent=2))


@dataclass
class Eval:
    """Evaluate a checkpoint: JSON on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, or a public .pth with --model."""
    evaluate: tuple[str, ...] = ()
    """Sets by name, or folders with LMDBs; none: those it was trained to be tested on, or the paper's."""
    model: str = ""
    """Of a public .pth: a combination or a known name."""
    charset: str = "36"
    """Of a public .pth: 36, 62, 94 or the characters."""
    data_root: Path = field(default_factory=default_data_root)
    """Where evaluation/ is."""
    device: str = "auto"
    """auto, cpu or cuda."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.experiments import Source, evaluate_checkpoint, load_any

        source = Source(self.data_root, skip_broken=self.skip_broken)
        loaded = load_any(self.checkpoint, self.model, self.charset, self.device)
        outcome = evaluate_checkpoint(*loaded, source, self.evaluate)
        shown = {name: outcome.details[name] for name in ("n", "intervals")}
        print(json.dumps(outcome.metrics | shown, indent=2))


@dataclass
class Predict:
    """Read your images: path, text and confidence, one line each."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, or a public .pth with --model."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Images, or folders of images; one word each."""
    model: str = ""
    """Of a public .pth: a combination or a known name."""
    charset: str = "36"
    """Of a public .pth: 36, 62, 94 or the characters."""
    beam: int = 0
    """CTC: width of the beam search; 0: greedy."""
    characters: bool = False
    """Also print the confidence of every character."""
    sheet: Path | None = None
    """Write a PNG of the words beside their images."""
    device: str = "auto"
    """auto, cpu or cuda."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.experiments import load_any
        from str_benchmark.models.inference import for_inference
        from str_benchmark.predict import image_files, predict

        model, settings = load_any(self.checkpoint, self.model, self.charset, self.device)
        files = image_files(self.images)
        found = predict(for_inference(model), files, pad=settings.pad, beam=self.beam, skip_broken=self.skip_broken)
        for each in found:
            line = f"{each.path}\t{each.text}\t{each.confidence:.4f}"
            print(line + ("\t" + " ".join(f"{p:.3f}" for p in each.characters) if self.characters else ""))
        if self.sheet:
            from str_benchmark.figures import draw_sheet

            draw_sheet([(each.path, each.text, each.confidence) for each in found], self.sheet)


@dataclass
class Data:
    """What is needed and what is there; `data inspect LMDB ...`: what a filter removes, with examples."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Nothing, or: inspect, and LMDB folders or names of sets."""
    charset: str = "36"
    """inspect: 36, 62, 94 or the characters."""
    max_length: int = 25
    """inspect: longest label."""
    filter: str = "report"
    """inspect: report, reference or off."""
    data_root: Path = field(default_factory=default_data_root)
    """Where to look."""

    def __call__(self) -> None:
        if self.words:
            from str_benchmark.data.sets import open_set

            if self.words[0] != "inspect" or len(self.words) < 2:
                raise ValueError(f"data: expected nothing, or inspect and LMDBs, got {' '.join(self.words)}")
            for name in self.words[1:]:
                options = {"charset": self.charset, "max_length": self.max_length, "filter": self.filter}
                for data in open_set(name, self.data_root, **options):
                    print(f"{data.path}: {data.report}")
            return
        from rich.table import Table as Grid

        from shared_utils.logging import console
        from str_benchmark.data.inventory import inventory

        columns = ("data", "scale", "size", "licence", "found", "where", "if missing")
        grid = Grid(*columns, title=f"below {self.data_root}")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class CreateLmdb:
    """Write an LMDB from a list of images and labels."""

    gt: tyro.conf.Positional[Path]
    """Text file with lines `path<TAB>label`."""
    output: tyro.conf.Positional[Path]
    """Folder of the new LMDB."""
    images: Path = Path(".")
    """Folder that the paths start from."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.data.create import listed_images
        from str_benchmark.data.lmdb_store import write_lmdb

        print(f"{write_lmdb(listed_images(self.gt, self.images, self.skip_broken), self.output)} words written")


@dataclass
class Render:
    """Render words into a new LMDB."""

    output: tyro.conf.Positional[Path]
    """Folder of the new LMDB."""
    words: Path | None = None
    """Text file, one word a line; none: random words."""
    n: int = 1000
    """Number of random words."""
    alphabet: str = "0123456789abcdefghijklmnopqrstuvwxyz"
    """Characters of random words."""
    fonts: str = "all"
    """sans, serif, all, or a folder with .ttf or .otf."""
    warp: str = "none"
    """none, rotate, curve or perspective."""
    seed: int = 0
    """Of everything."""

    def __call__(self) -> None:
        from str_benchmark.data.create import rendered_items
        from str_benchmark.data.lmdb_store import write_lmdb

        words = self.words.read_text().split() if self.words else None
        items = rendered_items(words, self.n, self.alphabet, self.fonts, self.warp, self.seed)
        print(f"{write_lmdb(items, self.output)} words written")


@dataclass
class Export:
    """Write a checkpoint's network as ONNX (with the extra `export`)."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, or a public .pth with --model."""
    output: tyro.conf.Positional[Path]
    """File to write."""
    model: str = ""
    """Of a public .pth: a combination or a known name."""
    charset: str = "36"
    """Of a public .pth: 36, 62, 94 or the characters."""

    def __call__(self) -> None:
        from str_benchmark.experiments import load_any
        from str_benchmark.models.export import export_onnx

        export_onnx(load_any(self.checkpoint, self.model, self.charset, "cpu")[0], self.output)


@dataclass
class Frontier:
    """Models on the upper hull of accuracy against time and parameters, and those that nothing dominates."""

    csv: Path | None = None
    """Own file with a column combination; none: the paper's table 8."""
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

        results = experiments.PROJECT / "results"
        draw_all(experiments.tables(), results, experiments.PROJECT / "runs" / "rendered")
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

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from str_benchmark.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "eval": Eval, "predict": Predict, "data": Data, "create-lmdb": CreateLmdb,
    "render": Render, "export": Export, "frontier": Frontier, "tables": Tables, "record": Record, "bench": Bench,
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
