"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from shared_utils.folders import results_folder, runs_folder

if TYPE_CHECKING:
    from torch import Tensor

PROGRAM = "prdc-metrics"


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/prdc-metrics."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


@dataclass
class Run:
    """Run the missing runs of the paper's tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as figure-3; default: all tables with this scale."""
    scale: str = "embedded"
    """smoke, embedded, mnist or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds MNIST and the sample folders."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from prdc_metrics import experiments
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
            log = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            needs = partial(experiments.needs, data_root=self.data_root)
            return print_missing(chosen, self.scale, self.rows, self.seeds, log, needs, force=self.force)
        yours = experiments.run_tables(
            chosen, self.scale, self.data_root, rows=self.rows,
            seeds=self.seeds, force=self.force, jobs=self.jobs,
        )  # fmt: skip
        for table in chosen:
            print_table(table, self.scale, RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl"), yours)


@dataclass(kw_only=True)
class Samples:
    """How samples become features."""

    embedding: str = "vgg16-fc2-relu"
    """Embedding of images: vgg16-fc2-relu, vgg16-fc2, random-vgg16-64, random-vgg16-4096, fid-inception,
    inception-pool3, or timm:MODEL such as timm:vit_large_patch14_dinov2.lvd142m."""
    weights: Path | None = None
    """State dict of a pretrained embedding."""
    side: int | None = None
    """Resize images to side x side; default: the network's size (VGG16 224, DINOv2 518, but published with 224)."""
    num_samples: int | None = None
    """Size of a random subset of each side (the paper takes 10,000); default: all. A manifold is always used whole."""
    seed: int = 0
    """Seed of the subset and of a random embedding."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = max(1, (os.cpu_count() or 1) - 1)
    """Processes that decode images."""
    cache: Path | None = None
    """Folder in which computed features are kept."""
    skip_broken: bool = False
    """Skip broken images (they are counted and named)."""

    def read(self, path: Path) -> tuple[Tensor, dict[str, Any]]:
        """Features and their origin."""
        from prdc_metrics.scoring import side

        names = ("embedding", "weights", "seed", "num_samples", "batch_size", "workers", "cache", "skip_broken")
        how: dict[str, Any] = {name: getattr(self, name) for name in names}
        return side(path, side_length=self.side, device=_device(self.device), **how)


@dataclass(kw_only=True)
class Eval(Samples):
    """Score generated against real samples: JSON on stdout, everything else on stderr."""

    real: tyro.conf.Positional[Path]
    """Image folder or .zip, sample archive (.npz of uint8 images), features as .npy, .npz, .pt, .safetensors, .csv or
    .parquet, or a manifold written by `fit`."""
    fake: tyro.conf.Positional[Path]
    """As for real, except a manifold."""
    nearest_k: tuple[int, ...] = ()
    """k, or several such as 3 5 10; default: 5, or all those of the manifold."""
    metrics: tuple[str, ...] = ("precision", "recall", "density", "coverage")
    """Metrics to compute; without recall the fake-fake distances are skipped."""
    family: bool = False
    """Also compute later metrics: symmetric, probabilistic, clipped, authenticity (balls open or closed as their
    authors define them)."""
    tile: int | None = None
    """Side of a distance tile."""
    precision: str = "auto"
    """Precision of the filter: auto, float32, tf32, bf16, float64. The result does not depend on it."""
    closed_ball: bool = False
    """Count points on the sphere as inside."""
    checkpoint: Path | None = None
    """Folder where long computations are saved as they go; the same command resumes from there."""
    json: Path | None = None
    """Also write the JSON to this file."""

    def __call__(self) -> None:
        from prdc_metrics.family import compute_family
        from prdc_metrics.manifold import RealManifold
        from prdc_metrics.metrics import prdc
        from prdc_metrics.scoring import explain

        device = _device(self.device)
        names = ("metrics", "precision", "tile", "closed_ball", "checkpoint")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        manifold = RealManifold.load(self.real, device) if self.real.suffix == ".manifold" else None
        if manifold and self.nearest_k:
            manifold = manifold.at(self.nearest_k)
        fake, fake_origin = self.read(self.fake)
        if manifold:
            real, real_origin = manifold.features, {"path": str(self.real), "fitted_on": manifold.origin}
            result = manifold.score(fake.to(device), **options)
        else:
            real, real_origin = self.read(self.real)
            result = prdc(real.to(device), fake.to(device), self.nearest_k or (5,), **options)
        explain(result)
        origin = {"real": real_origin, "fake": fake_origin, "sample_seed": self.seed}
        if self.family:
            origin["family"] = {k: compute_family(real, fake, k, device=device, tile=self.tile) for k in result.ks}
        text = result.to_json(**origin)
        print(text)
        if self.json:
            self.json.write_text(text + "\n")


@dataclass(kw_only=True)
class Features(Samples):
    """Embed images and write the features as .npy, with their origin in a .json file next to it."""

    folder: tyro.conf.Positional[Path]
    """Image folder or .zip, or sample archive."""
    output: tyro.conf.Positional[Path]
    """File to write, ending in .npy."""

    def __call__(self) -> None:
        import numpy as np

        from prdc_metrics.scoring import origin_file
        from shared_utils.logging import get_logger

        if self.output.suffix != ".npy":
            raise ValueError(f"a feature file ends in .npy, got {self.output}")
        features, origin = self.read(self.folder)
        np.save(self.output, features.numpy())
        origin_file(self.output).write_text(json.dumps(origin, indent=2) + "\n")
        get_logger(PROGRAM).info("%d features of %d dimensions in %s", *features.shape, self.output)


@dataclass(kw_only=True)
class Fit(Samples):
    """Compute the radii of real samples once; score against the file with `eval FILE.manifold FAKE`."""

    real: tyro.conf.Positional[Path]
    """As for eval."""
    output: tyro.conf.Positional[Path]
    """File to write, ending in .manifold."""
    nearest_k: tuple[int, ...] = (5,)
    """k, or several such as 3 5 10."""

    def __call__(self) -> None:
        from prdc_metrics.manifold import RealManifold

        if self.output.suffix != ".manifold":
            raise ValueError(f"a manifold file ends in .manifold, got {self.output}")
        features, origin = self.read(self.real)
        manifold = RealManifold.fit(features, self.nearest_k, device=_device(self.device))
        manifold.origin = origin
        manifold.save(self.output)


@dataclass
class Expect:
    """Closed forms for identical distributions: expected coverage per k, and the smallest k above the target."""

    n: int
    """Number of reals."""
    m: int
    """Number of fakes."""
    target: float = 0.95
    """Target of the expected coverage."""

    def __call__(self) -> None:
        from prdc_metrics.expectation import expected_coverage, smallest_k

        best = smallest_k(self.n, self.m, self.target)
        expected = {k: expected_coverage(self.n, self.m, k) for k in range(1, best + 1)}
        print(json.dumps({"smallest_k": best, "expected_density": 1.0, "expected_coverage": expected}, indent=2))


@dataclass
class Data:
    """List which data are needed, where they are looked for, and what is there."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list; or verify, which decodes every image that is there completely."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""
    download: bool = False
    """Download what may be downloaded (MNIST, through torchvision, checked by hash)."""
    tiny: Path | None = None
    """Only write small sets into this folder, in the layout of everything that the tables read."""

    def __call__(self) -> None:
        if self.tiny:
            from prdc_metrics.tiny import write_tiny

            return write_tiny(self.tiny)
        if self.action == "verify":
            from prdc_metrics.inventory import verify

            return verify(self.data_root)
        from rich.table import Table as Grid

        from prdc_metrics.inventory import inventory
        from shared_utils.logging import console

        if self.download:
            from torchvision.datasets import MNIST

            MNIST(str(self.data_root), download=True)
        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Train:
    """Train the VAE of figure 7's embedded run on digits and write its weights; resumes after an interruption."""

    output: Path = Path("prdc-metrics.pt")
    """File for the weights; the checkpoint is written next to it."""
    seed: int = 0
    """Of everything."""
    epochs: int = 150
    """Passes over the digits."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""

    def __call__(self) -> None:
        import torch

        from prdc_metrics.data import load_digits
        from prdc_metrics.train import fit_vae

        images = load_digits().images.flatten(1)
        checkpoint = self.output.with_suffix(".checkpoint")
        model = fit_vae(images, seed=self.seed, epochs=self.epochs, device=_device(self.device), checkpoint=checkpoint)
        torch.save(model.state_dict(), self.output)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from prdc_metrics import experiments
        from prdc_metrics.figures import draw_all
        from shared_utils.report import results_page

        results = results_folder(experiments.PROJECT)
        draw_all(experiments.tables(), results)
        (results / "RESULTS.md").write_text(results_page(PROGRAM, experiments.tables(), results, "prdc-metrics run"))


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from prdc_metrics.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Speed and memory against PyPI prdc, faiss, torch-fidelity and plain PyTorch."""

    repeats: int = 5
    """Measurements per contender, taken in turn."""
    threads: int = 1
    """CPU threads."""

    def __call__(self) -> None:
        from prdc_metrics.bench import run

        run(self.repeats, self.threads)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


VERBS = {
    "run": Run, "eval": Eval, "features": Features, "fit": Fit, "expect": Expect, "data": Data,
    "train": Train, "tables": Tables, "record": Record, "bench": Bench,
}  # fmt: skip


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    warnings.showwarning = _warn
    try:
        verbs = {name: _call(kind) for name, kind in VERBS.items()}
        tyro.extras.subcommand_cli_from_dict(verbs, prog=PROGRAM, args=arguments)
    except KeyboardInterrupt:
        print(
            f"{PROGRAM}: interrupted; finished runs and checkpoints are kept; the same command resumes", file=sys.stderr
        )
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        wrong_input = isinstance(error, ValueError | TypeError | FileNotFoundError)
        known = wrong_input or isinstance(error, RuntimeError | OSError | ModuleNotFoundError)
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
