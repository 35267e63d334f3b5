"""Command line: parse, call, print, exit code. Heavy imports wait inside the verbs, so that --help is quick."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsol_eval.recipe import OnData, Recipe, default_data_root

Split = Literal["train", "val", "test"]


PROGRAM = "wsol-eval"


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-8; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    data_root: Path = field(default_factory=default_data_root)
    """Where CUB, ILSVRC, OpenImages, metadata/ and weights/ are (scale paper)."""
    jobs: int = 0
    """Processes side by side; 0: one per core, or one where there is CUDA."""
    force: bool = False
    """Run again what is there already."""
    dry_run: bool = False
    """List the missing runs and their expected cost only."""

    def __call__(self) -> None:
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog
        from wsol_eval import experiments

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; there are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            log = RunLog(experiments.PROJECT / "runs" / f"{self.scale}.jsonl")
            return print_missing(chosen, self.scale, self.rows, self.seeds, log)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass
class Score:
    """Measure score maps on disk: JSON on stdout. The reference's flags are accepted, with _ or -."""

    scoremap_root: Path
    """Folder of <image id>.npy, or an LMDB (see `ScoreMaps`)."""
    metadata_root: Path
    """Folder with a folder of metadata per split."""
    split: Split = "val"
    """val is train-fullsup."""
    dataset_name: Annotated[str, tyro.conf.arg(aliases=["--dataset"])] = "custom"
    """Written into the result; boxes or masks are told by the metadata."""
    mask_root: Path | None = None
    """Folder that mask paths are relative to (OpenImages)."""
    cam_curve_interval: float = 0.001
    """Step between thresholds."""
    native: bool = False
    """Accept maps of any size and move the boxes to each; without, maps must be 224 x 224."""
    box_convention: Literal["reference", "exact"] = "reference"
    """exact: boxes end at their last pixel, unlike the reference's."""
    predictions: Path | None = None
    """CSV without header: id, then classes, best first; adds top-1 and top-5 localisation."""
    tau: float | None = None
    """Also report at this fixed threshold."""
    tau_from: Path | None = None
    """Also report at the best thresholds of another split: a JSON file that this verb wrote."""
    intervals: bool = False
    """Add 95 % bootstrap intervals over images."""
    baseline_root: Path | None = None
    """Score maps of another method (CAM): adds the paired difference with intervals and p."""
    overlays: Path | None = None
    """Write images under their maps there, as PNG; needs image_root."""
    image_root: Path | None = None
    """Folder that image ids are relative to."""
    json: Path | None = None
    """Also write the JSON to this file."""

    def __call__(self) -> None:
        from wsol_eval.workflow import score

        options = {name: value for name, value in vars(self).items() if name != "json"}
        result = json.dumps(score(**options), indent=2)
        if self.json:
            self.json.write_text(result + "\n")
        print(result)


@dataclass
class Conformance:
    """Check evaluators against the reference's answers: ours, or those of another code base."""

    write: Path | None = None
    """Write the fixtures and an answers.json to be filled in to this folder."""
    check: Path | None = None
    """An answers.json with the answers of another evaluator; without, ours is checked."""

    def __call__(self) -> None:
        from wsol_eval import conformance

        if self.write:
            conformance.write(self.write)
            print(f"fixtures written to {self.write}; fill in answers.json")
            return
        if self.check and not self.check.is_file():
            raise FileNotFoundError(f"{self.check}: no such file; `conformance --write FOLDER` makes one")
        problems = conformance.check(json.loads(self.check.read_text()) if self.check else conformance.ours())
        for line in problems:
            print(line)
        if problems:
            raise RuntimeError(f"{len(problems)} of {len(conformance.expected())} answers are not the reference's")
        print(f"all {len(conformance.expected())} answers are the reference's")


@dataclass
class Train:
    """Train one model into a checkpoint; after a kill the same command goes on."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    on: tyro.conf.OmitArgPrefixes[OnData] = field(default_factory=OnData)
    output: Path = Path("wsol-eval.pt")
    """Checkpoint to write, and to go on from."""
    checkpoint_every: int = 500
    """Steps between saves; each epoch ends with one."""
    compile: bool = False
    """torch.compile the network."""

    def __call__(self) -> None:
        from wsol_eval.workflow import train

        train(self.recipe, self.on, self.output, self.checkpoint_every, self.compile)


@dataclass
class Eval:
    """Measure a checkpoint on a split: JSON on stdout. A look at test is yours to count; `search` keeps a ledger."""

    checkpoint: tyro.conf.Positional[Path]
    """Written by `train`."""
    on: tyro.conf.OmitArgPrefixes[OnData] = field(default_factory=OnData)
    split: Split = "val"
    """val is train-fullsup."""
    cam_curve_interval: float = 0.001
    """Step between thresholds."""
    tau: float | None = None
    """Also report at this fixed threshold."""
    scoremap_root: Path | None = None
    """Also write the score maps: a folder, or a path on .lmdb."""
    scoremap_dtype: Literal["uint8", "float16", "float32", "float64"] = "float32"
    """Of the written maps."""

    def __call__(self) -> None:
        from shared_utils.logging import rank
        from wsol_eval.workflow import evaluate_checkpoint

        result = evaluate_checkpoint(**vars(self))
        if rank() == 0:
            print(json.dumps(result, indent=2))


@dataclass
class Search:
    """The protocol of one method: random search on train-fullsup, one report on test, a ledger of both."""

    output: tyro.conf.Positional[Path]
    """Folder of ledger and checkpoints; after a kill the same command goes on with the same trials."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    on: tyro.conf.OmitArgPrefixes[OnData] = field(default_factory=OnData)
    trials: int = 30
    """Equal for all methods that are to be compared."""
    space: Literal["paper", "scenes"] = "paper"
    """Ranges of the hyperparameters."""
    criterion: Literal["max_box_acc_v2", "pxap"] = "max_box_acc_v2"
    """What a trial is judged by."""
    cam_curve_interval: float = 0.001
    """Step between thresholds."""
    fsl_validation: Literal["split", "none"] = "split"
    """fsl: split holds 20 % of train-fullsup out (journal version), none holds nothing out (conference version)."""

    def __call__(self) -> None:
        from shared_utils.logging import rank
        from wsol_eval.workflow import search

        result = search(**vars(self))
        if rank() == 0:
            print(json.dumps(result, indent=2))


@dataclass
class DataList:
    """What is needed, where it is looked for, and what is there."""

    data_root: Path = field(default_factory=default_data_root)
    """Where to look."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from shared_utils.logging import console
        from wsol_eval.inventory import inventory

        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)
        console().print("To check what is there: wsol-eval data verify --data-root ... --metadata-root ... --split ...")


@dataclass
class Verify:
    """Check a split: files, sizes, boxes, masks. Ends with 1 where something is wrong."""

    data_root: Path
    """Folder that image ids are relative to."""
    metadata_root: Path
    """Folder with a folder of metadata per split."""
    split: Split = "val"
    """Which one."""

    def __call__(self) -> None:
        from wsol_eval.metadata import read_metadata, verify

        metadata = read_metadata(self.metadata_root / self.split)
        problems = verify(metadata, self.data_root)
        for line in problems:
            print(line)
        if problems:
            raise RuntimeError(f"{len(problems)} problems among {len(metadata.image_ids)} images")
        print(f"{len(metadata.image_ids)} images of {metadata.num_classes} classes: all is well")


@dataclass
class BuildMetadata:
    """Write the metadata of your own split from a folder per class and a CSV of boxes or masks."""

    data_root: Path
    """One folder of images per class."""
    annotations: Path
    """id,x0,y0,x1,y1 or id,mask,ignore; ids are paths under data_root."""
    output: Path
    """Folder to write."""
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    """xyxy: both ends inside the object."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order, where this split lacks some."""

    def __call__(self) -> None:
        from wsol_eval.metadata import build_metadata, write_metadata

        metadata = build_metadata(self.data_root, self.annotations, self.box_format, list(self.classes) or None)
        write_metadata(metadata, self.output)
        print(f"{len(metadata.image_ids)} images of {metadata.num_classes} classes in {self.output}")


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from shared_utils.report import results_page
        from wsol_eval import experiments
        from wsol_eval.figures import draw_all

        results = experiments.PROJECT / "results"
        draw_all(experiments.tables(), results)
        (results / "RESULTS.md").write_text(
            results_page(PROGRAM, experiments.tables(), results, "wsol-eval run")
        )  # fmt: skip


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger
        from wsol_eval.experiments import PROJECT

        get_logger("wsol-eval").info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed against the reference's contour search per threshold and np.histogram, and of 50,000 maps, extrapolated."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from wsol_eval.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "score": Score, "eval": Eval, "train": Train, "search": Search, "conformance": Conformance,
    "tables": Tables, "record": Record, "bench": Bench,
}  # fmt: skip
DATA_VERBS = {"list": DataList, "verify": Verify, "build-metadata": BuildMetadata}


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    warnings.showwarning = _warn
    prog, verbs = PROGRAM, VERBS | {"data": DataList}
    if arguments[:1] == ["data"]:
        prog, verbs = f"{PROGRAM} data", DATA_VERBS
        arguments = (
            arguments[1:] if arguments[1:2] and not arguments[1].startswith("--data") else ["list", *arguments[1:]]
        )
    try:
        tyro.extras.subcommand_cli_from_dict(
            {name: _call(kind) for name, kind in verbs.items()}, prog=prog, args=arguments
        )
    except KeyboardInterrupt:
        print(
            f"{PROGRAM}: interrupted; finished runs and checkpoints are kept, the same command goes on", file=sys.stderr
        )
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        wrong_input = isinstance(error, ValueError | TypeError | FileNotFoundError)
        known = wrong_input or isinstance(error, RuntimeError | OSError)
        print(f"{PROGRAM}: {error if known else repr(error)}", file=sys.stderr)
        sys.exit(2 if wrong_input else 1)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    from shared_utils.logging import get_logger

    get_logger(PROGRAM).warning("%s", message)


def _call(kind: type) -> Callable[..., None]:
    def act(command: Callable[[], None]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
