"""Command line: parse, call, print, exit code. Heavy imports wait inside the verbs, so that --help is quick."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shared_utils.folders import results_folder, runs_folder
from wsol_eval.cli_data import DATA_VERBS, DataList
from wsol_eval.recipe import OnData, OnDevice, Recipe, default_data_root

Split = Literal["train", "val", "test"]


PROGRAM = "wsol-eval"


@dataclass
class RunOn:
    """Where the tables' data are."""

    data_root: Path = field(default_factory=default_data_root)
    """Where CUB, ILSVRC, OpenImages, metadata/ and weights/ are (scale paper), CIFAR-10, MNIST, and the clones."""
    workers: int = OnData.workers
    """Processes that decode images."""
    cache: Path | None = None
    """Folder for 256 x 256 copies of the images, so that each is decoded once."""
    skip_broken: bool = False
    """Go on without broken images; they are counted, named, and the record says so."""


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-8; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded, cifar10-jpeg, kangaroo-raccoon or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    on: tyro.conf.OmitArgPrefixes[RunOn] = field(default_factory=RunOn)
    device: tyro.conf.OmitArgPrefixes[OnDevice] = field(default_factory=OnDevice)
    jobs: int = 0
    """Processes side by side; 0: one per core, or one where there is CUDA."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """List the missing runs, how long they may take, and what they need that is not there."""

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
        on = OnData(**vars(self.on))
        if self.dry_run:
            log = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            needs = partial(experiments.needs, on=on)
            return print_missing(chosen, self.scale, self.rows, self.seeds, log, needs, force=self.force)
        yours = experiments.run_tables(
            chosen,
            self.scale,
            on,
            self.device,
            rows=self.rows,
            seeds=self.seeds,
            force=self.force,
            jobs=self.jobs,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass
class Score:
    """Measure score maps on disk: JSON on stdout. The reference's command line works unchanged, with _ or -."""

    scoremap_root: Path = Path("train_log/scoremaps")
    """Folder of <image id>.npy or .pt (the id's own suffix may be missing), or an LMDB (see `ScoreMaps`)."""
    metadata_root: Path = Path("metadata")
    """Metadata lie in <dataset_name>/<split> below it, or in <split>."""
    mask_root: Path = Path("dataset")
    """Masks lie in <dataset_name> below it, or in it (OpenImages)."""
    dataset_name: Annotated[str, tyro.conf.arg(aliases=["--dataset"])] = "custom"
    """CUB, ILSVRC, OpenImages or your own; the metadata say whether it has boxes or masks."""
    split: Split = "val"
    """val is train-fullsup."""
    cam_curve_interval: float = 0.01
    """Step between thresholds; the paper's tables take 0.001."""
    multi_contour_eval: tuple[str, ...] | None = None
    """For the number `localization`: every contour, not only the largest (a flag, or yes / no)."""
    multi_iou_eval: tuple[str, ...] | None = None
    """For the number `localization`: the mean over iou_threshold_list, not IoU 50 (a flag, or yes / no)."""
    iou_threshold_list: tuple[int, ...] = (30, 50, 70)
    """IoU in percent."""
    resize: bool = False
    """Accept maps of any size and range: bicubic to 224 x 224, then min-max."""
    native: bool = False
    """Maps have their image's size, and are compared there."""
    view: Literal["resize", "center-crop"] = "resize"
    """What the model saw: the whole image, or the middle 224 x 224 after the shorter side became 256."""
    box_convention: Literal["reference", "exact"] = "reference"
    """exact: boxes end at their last pixel, unlike the reference's."""
    predictions: Path | None = None
    """CSV without header: id, then classes, best first; adds top-1 and top-5 localization."""
    tau: float | None = None
    """Also report at this fixed threshold."""
    tau_from: Path | None = None
    """Also report at the best thresholds of another split: a JSON file that this verb wrote."""
    intervals: bool = False
    """Add 95 % bootstrap intervals over images."""
    baseline_root: Path | None = None
    """Score maps of another method (CAM): adds the paired difference with intervals and p."""
    per_class: bool = False
    """Add images and V2 of each class."""
    errors: bool = False
    """Add what is wrong with boxes that miss: several objects, part of one, more than one, background."""
    overlays: Path | None = None
    """Write images under their maps there, as PNG; needs image_root."""
    image_root: Path | None = None
    """Folder that image ids are relative to."""
    json: Path | None = None
    """Also write the JSON to this file."""

    def __call__(self) -> None:
        from wsol_eval.score import score
        from wsol_eval.storedmaps import Scoring

        if self.resize and self.native:
            raise ValueError("--resize or --native: expected one of them, got both")
        given = dict(vars(self))
        deltas = tuple(percent / 100 for percent in given.pop("iou_threshold_list"))
        fit: Any = "resize" if given.pop("resize") else "as-is"
        fit = "native" if given.pop("native") else fit
        scoring = Scoring(given.pop("cam_curve_interval"), deltas, fit, given.pop("view"), given.pop("box_convention"))
        given |= {name: _switch(name, given[name]) for name in ("multi_contour_eval", "multi_iou_eval")}
        target = given.pop("json")
        result = json.dumps(score(scoring=scoring, **given), indent=2)
        if target:
            target.write_text(result + "\n")
        print(result)


def _switch(name: str, words: tuple[str, ...] | None) -> bool:
    """A flag as the reference takes it: absent, alone, or with a word for yes or no."""
    word = "no" if words is None else (*words, "yes")[0].lower()
    if word not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0") or len(words or ()) > 1:
        raise ValueError(f"{name}: expected yes or no, got {' '.join(words or ())!r}")
    return word in ("yes", "true", "t", "y", "1")


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
    device: tyro.conf.OmitArgPrefixes[OnDevice] = field(default_factory=OnDevice)
    output: Path = Path("wsol-eval.pt")
    """Checkpoint to write, and to go on from."""
    checkpoint_every: int = 500
    """Steps between saves; each epoch ends with one."""
    proxy: bool = False
    """Train on image_ids_proxy.txt (ImageNet's 10 %)."""

    def __call__(self) -> None:
        from wsol_eval.workflow import train

        train(**vars(self))


@dataclass
class Eval:
    """Measure a checkpoint on a split: JSON on stdout. A look at test is yours to count; `search` keeps a ledger."""

    checkpoint: tyro.conf.Positional[Path]
    """Written by `train`."""
    on: tyro.conf.OmitArgPrefixes[OnData] = field(default_factory=OnData)
    device: tyro.conf.OmitArgPrefixes[OnDevice] = field(default_factory=OnDevice)
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
    """The protocol of one method: random search on train-fullsup, one report on test, a ledger of both.

    Where the metadata have a proxy set (ImageNet), trials are trained on it and the chosen one again on everything.
    """

    output: tyro.conf.Positional[Path]
    """Folder of ledger and checkpoints; after a kill the same command goes on with the same trials."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    on: tyro.conf.OmitArgPrefixes[OnData] = field(default_factory=OnData)
    device: tyro.conf.OmitArgPrefixes[OnDevice] = field(default_factory=OnDevice)
    trials: int = 30
    """Equal for all methods that are to be compared."""
    space: Literal["paper", "fine-tuning", "photographs"] = "paper"
    """Ranges of the hyperparameters."""
    criterion: Literal["auto", "max_box_acc_v2", "pxap"] = "auto"
    """What a trial is judged by; auto: V2 on boxes, PxAP on masks."""
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
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from shared_utils.report import results_page
        from wsol_eval import experiments
        from wsol_eval.figures import draw_all

        results = results_folder(experiments.PROJECT)
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
    """Speed against the released evaluator, its algorithm at its best and np.histogram; 50,000 maps, extrapolated."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""
    reference: Path | None = None
    """A clone of clovaai/wsolevaluation (its evaluation.py needs munch); without it that code is left out."""

    def __call__(self) -> None:
        from wsol_eval.bench import run

        run(self.repeats, self.threads, self.reference)


VERBS = {
    "run": Run, "score": Score, "eval": Eval, "train": Train, "search": Search, "conformance": Conformance,
    "tables": Tables, "record": Record, "bench": Bench,
}  # fmt: skip


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    warnings.showwarning = _warn
    prog, verbs = PROGRAM, VERBS | {"data": DataList}
    if arguments[:1] == ["data"]:
        prog, verbs = f"{PROGRAM} data", DATA_VERBS
        arguments = arguments[1:] if arguments[1:2] and arguments[1] in DATA_VERBS else ["list", *arguments[1:]]
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
