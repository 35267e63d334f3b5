"""Command line: parse, call, print, exit code."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table as Grid

from prdc_metrics import bench, experiments
from prdc_metrics.data import FEATURE_SUFFIXES, load_digits, load_features
from prdc_metrics.expectation import expected_coverage, smallest_k
from prdc_metrics.features import extract_features
from prdc_metrics.manifold import RealManifold
from prdc_metrics.metrics import PRDCResult, prdc
from shared_utils.logging import console, get_logger
from shared_utils.report import print_table, results_page
from shared_utils.runlog import RunLog, record

logger = get_logger("prdc-metrics")


@dataclass
class Run:
    """Run what is missing of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as figure-3; none means all that have the scale."""
    scale: str = "embedded"
    """smoke, embedded, mnist or paper."""
    rows: tuple[str, ...] = ()
    """Only these rows."""
    seeds: tuple[int, ...] = ()
    """Instead of the table's seeds."""
    data_root: Path = field(default_factory=experiments.default_data_root)
    """Where MNIST and sample folders are."""
    jobs: int = 0
    """Runs side by side, one process each; 0: one per core on a CPU, one on CUDA."""
    force: bool = False
    """Run again what is there already."""
    dry_run: bool = False
    """List the missing runs and their expected cost only."""

    def __call__(self) -> None:
        chosen = [t for t in experiments.tables() if (t.id in self.tables if self.tables else self.scale in t.scales)]
        known = [table.id for table in experiments.tables()]
        for name in self.tables:
            if name not in known:
                raise tyro_usage(f"unknown table {name!r}; there are {', '.join(known)}")
        if not chosen:
            raise tyro_usage(f"no table has a scale {self.scale!r}")
        if self.dry_run:
            self._list(chosen)
            return
        yours = experiments.run_tables(
            chosen,
            self.scale,
            self.data_root,
            list(self.rows) or None,
            list(self.seeds) or None,
            force=self.force,
            jobs=self.jobs,
        )
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)

    def _list(self, chosen: list) -> None:
        done = RunLog(experiments.PROJECT / "runs" / f"{self.scale}.jsonl").keys()
        grid, total = Grid("table", "missing runs", "expected seconds"), 0.0
        for table in chosen:
            runs = [r for r in table.runs(self.scale, self.rows, self.seeds or None) if r.key not in done]
            seconds = len(runs) * (table.scales[self.scale].expected_seconds or 0)
            total += seconds
            grid.add_row(table.id, str(len(runs)), f"{seconds:.0f}")
        grid.add_row("all", "", f"{total:.0f}")
        console().print(grid)


@dataclass
class Eval:
    """Score generated against real samples: JSON on stdout, everything else on stderr."""

    real: tyro.conf.Positional[Path]
    """Image folder, or features as .npy, .npz, .pt or .safetensors, or a manifold written by `fit`."""
    fake: tyro.conf.Positional[Path]
    """Image folder or features."""
    nearest_k: str = "5"
    """k, or several as 3,5,10."""
    metrics: tuple[str, ...] = ("precision", "recall", "density", "coverage")
    """Without recall the fake-fake distances are skipped."""
    embedding: str = "vgg16-fc2-relu"
    """Of image folders: vgg16-fc2-relu, vgg16-fc2, random-vgg16-64, random-vgg16-4096, inception-pool3."""
    weights: Path | None = None
    """State dict of a pretrained embedding."""
    num_samples: int | None = 10_000
    """Seeded subset of each side."""
    seed: int = 0
    """Of the subset and of a random embedding."""
    device: str | None = None
    """cpu or cuda; default: CUDA where there is one."""
    tile: int | None = None
    """Side of a distance tile."""
    precision: str = "auto"
    """Of the filter: auto, float32, tf32, bf16, float64. The result does not depend on it."""
    closed_ball: bool = False
    """Count points on the sphere as inside."""
    cache: Path | None = None
    """Folder for features."""
    skip_corrupt: bool = False
    """Leave unreadable images out, named in the log."""
    json: Path | None = None
    """Also write the JSON to this file."""

    def __call__(self) -> None:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"metrics": self.metrics, "precision": self.precision, "tile": self.tile}
        options["closed_ball"] = self.closed_ball
        fake = self._features(self.fake).to(device)
        if self.real.suffix == ".manifold":
            result = RealManifold.load(self.real, device).score(fake, **options)
        else:
            ks = [int(k) for k in self.nearest_k.split(",")]
            result = prdc(self._features(self.real).to(device), fake, ks, **options)
        explain(result)
        print(result.to_json())
        if self.json:
            self.json.write_text(result.to_json() + "\n")

    def _features(self, path: Path) -> torch.Tensor:
        if path.suffix in FEATURE_SUFFIXES:
            return load_features(path)
        return extract_features(
            path,
            self.embedding,
            weights=self.weights,
            seed=self.seed,
            num_samples=self.num_samples,
            sample_seed=self.seed,
            device=self.device,
            cache=self.cache,
            skip_corrupt=self.skip_corrupt,
        )


@dataclass
class Features:
    """Embed an image folder and write the features as .npy."""

    folder: tyro.conf.Positional[Path]
    """Images."""
    output: tyro.conf.Positional[Path]
    """File to write."""
    embedding: str = "vgg16-fc2-relu"
    """See eval."""
    weights: Path | None = None
    """State dict of a pretrained embedding."""
    num_samples: int | None = None
    """Seeded subset."""
    seed: int = 0
    """Of the subset and of a random embedding."""
    skip_corrupt: bool = False
    """Leave unreadable images out."""

    def __call__(self) -> None:
        import numpy as np

        features = extract_features(
            self.folder,
            self.embedding,
            weights=self.weights,
            seed=self.seed,
            num_samples=self.num_samples,
            sample_seed=self.seed,
            skip_corrupt=self.skip_corrupt,
        )
        np.save(self.output, features.numpy())
        logger.info("%d features of %d dimensions in %s", *features.shape, self.output)


@dataclass
class Fit:
    """Compute the radii of real features once; score against the file with `eval FILE.manifold FAKE`."""

    real: tyro.conf.Positional[Path]
    """Features."""
    output: tyro.conf.Positional[Path]
    """File to write, ending in .manifold."""
    nearest_k: str = "5"
    """k, or several as 3,5,10."""

    def __call__(self) -> None:
        if self.output.suffix != ".manifold":
            raise tyro_usage(f"a manifold file ends in .manifold, got {self.output}")
        RealManifold.fit(load_features(self.real), [int(k) for k in self.nearest_k.split(",")]).save(self.output)


@dataclass
class Expect:
    """Closed forms for identical laws: expected coverage per k, and the smallest k above the target."""

    n: int
    """Number of reals."""
    m: int
    """Number of fakes."""
    target: float = 0.95
    """Of expected coverage."""

    def __call__(self) -> None:
        best = smallest_k(self.n, self.m, self.target)
        expected = {k: expected_coverage(self.n, self.m, k) for k in range(1, best + 1)}
        print(json.dumps({"smallest_k": best, "expected_density": 1.0, "expected_coverage": expected}, indent=2))


@dataclass
class Data:
    """What is needed, where it is looked for, and what is there."""

    data_root: Path = field(default_factory=experiments.default_data_root)
    """Where to look."""
    download: bool = False
    """Fetch what may be fetched (MNIST, through torchvision, checked by hash)."""

    def __call__(self) -> None:
        if self.download:
            from torchvision.datasets import MNIST

            MNIST(str(self.data_root), download=True)
        grid = Grid("data", "scale", "size", "found", "where")
        grid.add_row("scikit-learn digits", "embedded", "1 MB", "yes", "ships with scikit-learn")
        places = {"MNIST": ("MNIST/raw", "mnist", "53 MB")}
        for name in (
            "ffhq",
            "celeba-stylegan",
            "lsun-bedroom-stylegan",
            "ffhq-stylegan",
            "mnist-dcgan",
            "sc09-wavegan",
        ):
            places[name] = (name, "paper", "your samples")
        for name, (part, scale, size) in places.items():
            found = (self.data_root / part).is_dir()
            grid.add_row(name, scale, size, "yes" if found else "no", f"DATA_ROOT/{part}")
        console().print(grid)
        logger.info("DATA_ROOT is %s", self.data_root)


@dataclass
class Train:
    """Train the VAE of figure 7's embedded run on digits and write its weights; interrupted, it resumes."""

    output: tyro.conf.Positional[Path]
    """File for the weights; the checkpoint lies beside it."""
    seed: int = 0
    """Of everything."""
    epochs: int = 150
    """Passes over the digits."""

    def __call__(self) -> None:
        from prdc_metrics.train import fit_vae

        images = load_digits()[0].flatten(1)
        checkpoint = self.output.with_suffix(".checkpoint")
        model = fit_vae(images, seed=self.seed, epochs=self.epochs, checkpoint=checkpoint)
        torch.save(model.state_dict(), self.output)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from prdc_metrics.figures import draw_all

        results = experiments.PROJECT / "results"
        draw_all(experiments.tables(), results)
        page = results_page("prdc-metrics", experiments.tables(), results, "prdc-metrics run")
        (results / "RESULTS.md").write_text(page)
        logger.info("wrote results/RESULTS.md and figures")


@dataclass
class Record:
    """Move finished runs from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        runs, results = experiments.PROJECT / "runs", experiments.PROJECT / "results"
        paths = [path for path in sorted(runs.glob("*.jsonl")) if path.stem != "smoke"]
        moves = [(RunLog(path), RunLog(results / path.name)) for path in paths]
        logger.info("%d runs recorded", record(moves, experiments.PROJECT))
        Tables()()


def explain(result: PRDCResult) -> None:
    """Expectations beside the values, and what to be careful about, on stderr."""
    for k in result.ks:
        expected = result.expected_coverage[k]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.values[k].items())
        logger.info("k=%d: %s (identical laws: density 1, coverage %.4f)", k, shown, expected)
        if expected < 0.95:
            logger.warning(
                "k=%d expects a coverage of %.3f even for identical laws; see prdc-metrics expect", k, expected
            )
    if result.num_real != result.num_fake:
        logger.warning("%d reals and %d fakes: compare only with runs of these sizes", result.num_real, result.num_fake)


def tyro_usage(message: str) -> SystemExit:
    """Wrong usage: the message on stderr, exit code 2."""
    print(f"prdc-metrics: {message}", file=sys.stderr)
    return SystemExit(2)


VERBS = {
    "run": Run, "eval": Eval, "features": Features, "fit": Fit, "expect": Expect, "data": Data,
    "train": Train, "tables": Tables, "record": Record, "bench": bench.Bench,
}  # fmt: skip


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    warnings.showwarning = lambda message, *_: logger.warning("%s", message)
    verb = tyro.extras.subcommand_cli_from_dict
    try:
        verb({name: _call(kind) for name, kind in VERBS.items()}, prog="prdc-metrics", args=arguments)
    except KeyboardInterrupt:
        print("prdc-metrics: interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FileNotFoundError, TypeError) as error:
        if debug:
            raise
        print(f"prdc-metrics: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        if debug:
            raise
        print(f"prdc-metrics: {error}", file=sys.stderr)
        sys.exit(1)


def _call(kind: type) -> Callable[..., None]:
    def act(command: Callable[[], None]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
