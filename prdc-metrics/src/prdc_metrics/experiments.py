"""From the settings of a table's row to the outcome of a run. Each experiment makes (real, fake); scoring is common."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prdc_metrics import toy
from prdc_metrics.data import dataset_record, load_digits, load_mnist
from prdc_metrics.embeddings import FrozenEmbedding, embedding_provenance, load_embedding, weights_need
from prdc_metrics.expectation import expected_coverage
from prdc_metrics.features import extract_features
from prdc_metrics.metrics import knn_radii, prdc
from prdc_metrics.train import VAE, fit_vae, sample
from shared_utils.folders import project_folder, runs_folder
from shared_utils.preflight import Need, file
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, load_tables

PROJECT = project_folder(__file__)
PACKAGES = ("numpy", "torchvision")
FIGURE_1 = {  # pixel coordinates of the points drawn in figure 1
    "precision_vs_density": (
        [[409, 407], [403, 474], [515, 436], [519, 532], [317, 558], [484, 606], [791, 384]],
        [[699, 226], [986, 326], [563, 400], [1002, 507], [862, 574]],
    ),
    "recall_vs_coverage": (
        [[295, 222], [225, 287], [319, 287], [82, 525], [114, 553]],
        [[334, 333], [180, 630], [203, 705]],
    ),
}


@dataclass(frozen=True)
class Settings:
    """Everything a table file may set."""

    experiment: str = "identical"
    """points, identical, shift, modes, class0, truncation, truncated_folders, outliers or folders"""
    num_real: int = 10_000
    """N, real samples"""
    num_fake: int = 10_000
    """M, fake samples"""
    dim: int = 64
    """D of the toy data"""
    nearest_k: int = 5
    """k"""
    law: str = "normal"
    """normal, uniform or cauchy (identical)"""
    mu: float = 0.0
    """shift of the fakes (shift)"""
    outlier: str = "none"
    """the set that one outlier joins: none, real or fake (shift)"""
    outlier_value: float = 1.0
    """every coordinate of that outlier (shift)"""
    dropping: str = "simultaneous"
    """sequential or simultaneous (modes)"""
    redistribute: str = "equal"
    """which modes get the mass of dropped modes: equal or first (modes)"""
    share: float = 0.1
    """share of the first mode or of class 0 among the fakes (modes, class0)"""
    psi: float = 1.0
    """truncation psi (truncation, truncated_folders)"""
    ratio: float = 0.0
    """outliers added to the fakes, as a share of the inliers (outliers)"""
    panel: str = "precision_vs_density"
    """which panel of figure 1 (points)"""
    dataset: str = "digits"
    """digits or mnist (class0), or a folder of the data root with real/ and fake/ (folders, outliers)"""
    embedding: str = "random-vgg16-64"
    """of images"""
    side: int = 224
    """images are resized to side x side before VGG16"""


def tables() -> list[Table]:
    """The project's table files."""
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    data_root: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
) -> RunLog:
    """Run what runs/ lacks of the chosen tables at a scale; returns that log."""
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    run_missing(
        "prdc-metrics",
        runs,
        log,
        partial(execute, data_root=data_root),
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        group=same_samples,
        needs=partial(needs, data_root=data_root),
    )
    return log


def needs(settings: dict, data_root: Path) -> Iterator[Need]:
    """What a run reads: image folders or MNIST, and pretrained weights."""
    s = Settings(**settings)
    if s.experiment in _FOLDERS:
        fake = f"psi-{s.psi:.1f}" if s.experiment == "truncated_folders" else "fake"
        for part in ("real", fake):
            what = f"images of {s.dataset}, {part}"
            yield file(data_root / s.dataset / part, what, "put them there; prdc-metrics data --tiny shows the layout")
    if s.experiment == "class0" and s.dataset == "mnist":
        yield file(data_root / "MNIST" / "raw", "MNIST", "prdc-metrics data --download")
    if s.experiment in _IMAGES and s.embedding != "pixels" and not s.embedding.startswith("random-"):
        yield weights_need(s.embedding)


def same_samples(run: Run) -> Hashable:
    """The settings shared by runs that differ only in k: they are scored in one pass. Figure 5's fakes depend on k."""
    if run.settings.get("experiment") == "outliers":
        return run.key
    return json.dumps(run.settings | {"nearest_k": None}, sort_keys=True), run.seed


def execute(settings: Sequence[dict], seeds: Sequence[int], data_root: Path) -> list[Outcome]:
    """Runs that differ in k alone: make the two sets, score them once, return metrics and integer counts of each."""
    each = [Settings(**values) for values in settings]
    s, seed = each[0], seeds[0]
    real, fake = _sets(s, seed, data_root)
    result = prdc(real, fake, [one.nearest_k for one in each])
    record = dataset_record(s.dataset if s.experiment in _IMAGES else s.experiment, torch.as_tensor(fake))
    outcomes = []
    for k in (one.nearest_k for one in each):
        metrics = dict(result.values[k])
        expected = _expected_coverage(replace(s, nearest_k=k), len(real), len(fake))
        metrics |= {"density_gap": metrics["density"] - 1, "coverage_gap": metrics["coverage"] - expected}
        if s.experiment == "outliers":
            inliers = prdc(real, fake[: _inliers(len(fake), s.ratio)], (k,)).values[k]
            metrics |= {f"relative_{name}": metrics[name] / inliers[name] for name in inliers}
        details = {"counts": result.counts[k], "num_real": len(real), "num_fake": len(fake)}
        details |= {"expected_coverage": expected, "recheck_pairs": result.recheck_pairs}
        outcomes.append(Outcome(metrics, details, record, weights=_weights(s, seed), caveats=_caveats(s, real, fake)))
    return outcomes


def _caveats(s: Settings, real: Tensor | np.ndarray, fake: Tensor | np.ndarray) -> tuple[str, ...]:
    """Caveats of the run: with fewer images than the row asks for, it is a different experiment."""
    if s.experiment not in _FOLDERS:
        return ()
    pairs = (("real", len(real), s.num_real), ("fake", len(fake), s.num_fake))
    return tuple(f"{found:,} {name} images of the {asked:,} asked for" for name, found, asked in pairs if found < asked)


def _weights(s: Settings, seed: int) -> dict[str, str]:
    if s.experiment not in _IMAGES or s.embedding == "pixels":
        return {}
    found = embedding_provenance(s.embedding, seed=seed, side=s.side)
    return {s.embedding: f"random, seed {seed}" if found["weights"] == "random" else found["weights"]}


def _expected_coverage(s: Settings, n: int, m: int) -> float:
    """Closed form for identical distributions; for dropped modes the mean over modes, which share no neighbours."""
    if s.experiment != "modes":
        return expected_coverage(n, m, s.nearest_k)
    counts = toy.mode_counts(s.dropping, s.share, s.num_fake, s.redistribute)
    each = [expected_coverage(n // toy.MODES, count, s.nearest_k) if count else 0.0 for count in counts]
    return float(np.mean(each))


def _sets(s: Settings, seed: int, data_root: Path) -> tuple[Tensor | np.ndarray, Tensor | np.ndarray]:
    match s.experiment:
        case "points":
            first, second = FIGURE_1[s.panel]
            return np.array(first, float), np.array(second, float)
        case "identical":
            return toy.identical(s.law, s.num_real, s.num_fake, s.dim, seed)
        case "shift":
            return toy.shift(s.mu, s.outlier, s.num_real, s.num_fake, s.dim, seed, s.outlier_value)
        case "modes":
            counts = toy.mode_counts(s.dropping, s.share, s.num_fake, s.redistribute)
            return toy.modes(counts, s.num_real, s.dim, seed)
        case "class0":
            return _class0(s, seed, data_root)
        case "truncation":
            real, model = _vae(seed)
            return real, sample(model, s.psi, s.num_fake, seed)
        case "truncated_folders":
            return _folder(s, seed, data_root, "real"), _folder(s, seed, data_root, f"psi-{s.psi:.1f}")
        case "folders":
            return _folder(s, seed, data_root, "real"), _folder(s, seed, data_root, "fake")
        case "outliers":
            real, fake = _folder(s, seed, data_root, "real"), _folder(s, seed, data_root, "fake")
            return real, _with_outliers(fake, s.nearest_k, s.ratio)
    raise ValueError(f"unknown experiment {s.experiment!r}")


_FOLDERS = ("truncated_folders", "folders", "outliers")
_IMAGES = ("class0", "truncation", *_FOLDERS)


def _class0(s: Settings, seed: int, data_root: Path) -> tuple[Tensor, Tensor]:
    """Figure 6: real images against others with a share of class 0; the other nine classes are equally frequent.

    Reals and fakes come from disjoint halves; a class that runs out of images bounds the number of fakes.
    """
    features, labels = _labelled_features(s.dataset, s.embedding, s.side, s.num_real, s.num_fake, seed, data_root)
    real, pool, labels = features[: s.num_real], features[s.num_real :], labels[s.num_real :]
    m = int((labels == 0).sum())  # so that share 1 is possible without repeating an image
    wanted = [round(s.share * m), *[round((1 - s.share) * m / 9)] * 9]
    chosen = [(labels == digit).nonzero()[:count, 0] for digit, count in enumerate(wanted)]
    return real, pool[torch.cat(chosen)]


@lru_cache(maxsize=8)
def _labelled_features(
    dataset: str, embedding: str, side: int, num_real: int, num_fake: int, seed: int, data_root: Path
) -> tuple[Tensor, Tensor]:
    """Embed random reals, then `num_fake` zeros and equally many other digits."""
    images, labels = load_digits() if dataset == "digits" else load_mnist(data_root, train=True)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    real, rest = order[:num_real], order[num_real:]
    zeros = rest[labels[rest] == 0][:num_fake]
    per_class = -(-len(zeros) // 9)
    others = [rest[labels[rest] == digit][:per_class] for digit in range(1, 10)]
    chosen = torch.cat([real, zeros, *others])
    return extract_features(images[chosen], _network(embedding, seed, side)), labels[chosen]


@lru_cache(maxsize=8)
def _vae(seed: int) -> tuple[Tensor, VAE]:
    """Half of the digits as reals (899, 64), a VAE fitted to the other half."""
    images = load_digits().images.flatten(1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return images[order[898:]], fit_vae(images[order[:898]], seed=seed)


def _folder(s: Settings, seed: int, data_root: Path, part: str) -> Tensor:
    size = s.num_real if part == "real" else s.num_fake
    return _folder_features(data_root / s.dataset / part, s.embedding, s.side, size, seed, data_root)


@lru_cache(maxsize=4)
def _folder_features(folder: Path, embedding: str, side: int, size: int, seed: int, data_root: Path) -> Tensor:
    cache, workers = data_root / "feature-cache", (os.cpu_count() or 1) - 1
    network = _network(embedding, seed, side)
    return extract_features(folder, network, num_samples=size, sample_seed=seed, cache=cache, num_workers=workers)


@lru_cache(maxsize=1)
def _network(embedding: str, seed: int, side: int) -> FrozenEmbedding:
    return load_embedding(embedding, seed=seed, side=side)


def _inliers(total: int, ratio: float) -> int:
    return round(total / (1 + ratio))


def _with_outliers(fake: Tensor, k: int, ratio: float) -> Tensor:
    """Figure 5: fakes split 10 to 1 by their own k-th neighbour distance; the outliers are added step by step."""
    order = knn_radii(fake, k).argsort()
    inliers = round(len(fake) * 10 / 11)
    return fake[order[: inliers + round(ratio * inliers)]]
