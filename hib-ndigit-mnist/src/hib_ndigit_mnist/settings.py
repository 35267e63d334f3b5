"""Every setting of a run, with its unit and default; nothing here needs torch, so that --help is quick."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

Report = Literal[
    "verification", "uncertainty", "mixture", "ellipses", "centroids", "bins", "sweep", "strip", "calibration",
    "divergence", "hedging", "estimator", "dataset",
]  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Everything that decides how a model is trained."""

    method: Literal["mog", "point", "contrastive"] = "mog"
    """mog (hedged), point (same loss, no variance, one sample) or contrastive (classical loss on points)"""
    components: int = 1
    """C, Gaussians per image (mog)"""
    dim: int = 2
    """D, dimension of the embedding"""
    architecture: Literal["lenet", "mlp"] = "lenet"
    """lenet or mlp"""
    hidden: tuple[int, ...] = (120,)
    """units of the fully connected layers"""
    pool: int = 1
    """images are averaged over pool x pool pixels (mlp)"""
    batch_norm: bool = False
    """after convolutions and hidden layer (lenet)"""
    logvar_bias: float | None = None
    """initial log variance; None: -2 - log(D / 2)"""
    beta: float = 1e-4
    """weight of the KL term"""
    samples: int = 8
    """K, samples per image"""
    objective: Literal["log_mean", "mean_log"] = "log_mean"
    """log_mean or mean_log"""
    kl: Literal["auto", "closed", "mc", "upper_bound"] = "auto"
    """auto, closed, mc or upper_bound"""
    margin: float = 1.0
    """of the classical loss"""
    occlusion_p: float = 0.2
    """probability of an occluder per digit while training"""
    steps: int = 100_000
    """optimizer steps"""
    batch: int = 128
    """images per step, half of them partners"""
    pairs: int = 256
    """at most so many matching pairs of a batch, and as many others"""
    lr: float = 1e-3
    """initial learning rate"""
    lr_final: float = 1e-5
    """at the end of the cosine"""
    match_lr: float = 3.0
    """a and b learn at this multiple of the rate"""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.is_point and self.components != 1:
            raise ValueError(f"components: a point embedding has one, got {self.components}")
        if not self.beta >= 0:
            raise ValueError(f"beta: >= 0 was expected, got {self.beta}")
        if self.components < 1 or self.dim < 1 or self.samples < 1 or self.samples % self.components:
            raise ValueError(
                f"components, dim >= 1 and samples a multiple of components were expected, got components = "
                f"{self.components}, dim = {self.dim}, samples = {self.samples}"
            )
        if self.batch < 4 or self.batch % 2 or self.steps < 1 or self.pairs < 1:
            raise ValueError(
                f"even batch >= 4, steps >= 1, pairs >= 1 were expected, got {self.batch}, {self.steps}, {self.pairs}"
            )
        _check_rates(self)
        if not 0 <= self.occlusion_p <= 1:
            raise ValueError(f"occlusion_p: in [0, 1] was expected, got {self.occlusion_p}")

    @property
    def is_point(self) -> bool:
        """No variance."""
        return self.method != "mog"

    def shape(self) -> tuple:
        """Trainings of equal shape can be stacked: all but beta and occlusion_p."""
        return tuple(value for name, value in asdict(self).items() if name not in ("beta", "occlusion_p"))

    def encoder_options(self, num_digits: int, tile: int) -> dict[str, Any]:
        """Arguments of `build_encoder`."""
        options: dict[str, Any] = dict(architecture=self.architecture, num_digits=num_digits, tile=tile, dim=self.dim)
        options |= dict(components=self.components, point=self.is_point, logvar_bias=self.logvar_bias)
        if self.architecture == "mlp":
            return options | dict(hidden=list(self.hidden), pool=self.pool)
        return options | dict(hidden=self.hidden[0], batch_norm=self.batch_norm)


@dataclass(frozen=True)
class TrainedOn(Training):
    """A model and the N-digit images it is trained on: what a model file holds."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """mnist (under the data root) or digits (scikit-learn's)"""
    num_digits: int = 2
    """N"""
    gap: Literal["number", "instance"] = "number"
    """number or instance"""
    split: Literal["train", "test_seen", "test_unseen", "test"] = "test_seen"
    """test_seen, test_unseen, or test for gap instance"""
    total_train: int = 100_000
    """images to aim at for training"""
    total_test: int = 10_000
    """images to aim at in each test split"""
    min_per_number: int = 100
    """images per number below which numbers are dropped"""

    def training(self) -> Training:
        """The part that decides about the weights."""
        return Training(**{f.name: getattr(self, f.name) for f in fields(Training)})

    def data(self) -> tuple:
        """Arguments of the training and test sets; those of the standard tables stand for no arguments."""
        sizes = {name: getattr(self, name) for name in ("total_train", "total_test", "min_per_number")}
        standard = all(getattr(TrainedOn, name) == value for name, value in sizes.items())
        return self.dataset, self.num_digits, self.gap, () if standard else tuple(sizes.items())


@dataclass(frozen=True)
class BackboneTraining:
    """A backbone with a hedged head, trained on a user's own images."""

    backbone: str = "torchvision:resnet18"
    """torchvision:NAME or timm:NAME"""
    image_size: int = 224
    """pixels, square"""
    method: Literal["mog", "point", "pfe", "mc-dropout", "mc-infonce"] = "mog"
    """mog (hedged), point (same loss, no variance), or a rival: pfe (arXiv 1904.09658), mc-dropout (1506.02142),
    mc-infonce (2302.02865)"""
    dim: int = 64
    """D, dimension of the embedding"""
    components: int = 1
    """C, Gaussians per image (mog)"""
    beta: float = 1e-4
    """weight of the KL term (mog)"""
    samples: int = 8
    """K, samples per image (mog, mc-infonce), passes (mc-dropout)"""
    dropout: float = 0.2
    """share of features that are dropped (mc-dropout)"""
    augment: Literal["none", "crop", "crop-flip"] = "crop"
    """none, crop (at random, half of the area at least) or crop-flip (mirrored as well)"""
    steps: int = 2000
    """optimizer steps"""
    batch: int = 64
    """images per step, half of them partners"""
    lr: float = 1e-4
    """initial learning rate (Adam)"""
    lr_final: float = 1e-6
    """at the end of the cosine"""
    match_lr: float = 10.0
    """a and b learn at this multiple of the rate"""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.samples < 1 or self.components < 1 or self.samples % self.components:
            raise ValueError(f"samples: a multiple of components was expected, got {self.samples}, {self.components}")
        if self.method != "mog" and self.components != 1:
            raise ValueError(f"components: {self.method} has one, got {self.components}")
        if self.batch < 4 or self.batch % 2 or self.steps < 1 or self.image_size < 1:
            raise ValueError(
                f"even batch >= 4, steps >= 1, image_size >= 1 were expected, got {self.batch}, {self.steps}, "
                f"{self.image_size}"
            )
        _check_rates(self)
        if not self.beta >= 0 or not 0 < self.dropout < 1 or self.dim < 1:
            raise ValueError(
                f"beta >= 0, dropout in (0, 1), dim >= 1 were expected, got {self.beta}, {self.dropout}, {self.dim}"
            )


@dataclass(frozen=True)
class Settings(TrainedOn):
    """Everything a table file may set."""

    report: Report = "verification"
    """what is measured: a function of reports.py, or dataset"""
    test_images: int = 10_000
    """at most so many are embedded"""
    test_pairs: int = 10_000
    """verification pairs, half of them matching"""
    queries: int = 10_000
    """images that are identified among the others"""
    estimator: Literal["auto", "quadrature", "mc"] = "auto"
    """quadrature, mc, or auto"""
    eval_samples: int = 8
    """K of mc"""
    at: int = 0
    """report the model as it is after so many steps; 0: at the end"""


def _check_rates(settings: Training | BackboneTraining) -> None:
    """ValueError for a learning rate that teaches nothing or the wrong way."""
    if not (settings.lr > 0 and settings.lr_final >= 0 and settings.match_lr > 0):
        raise ValueError(
            f"lr > 0, lr_final >= 0, match_lr > 0 were expected, got {settings.lr}, {settings.lr_final}, "
            f"{settings.match_lr}"
        )


def _check_choices(settings: Training | BackboneTraining) -> None:
    """ValueError where a field holds none of the words its type names."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name}: one of {', '.join(get_args(kind))} was expected, got {value!r}")


DIGITS = dict(dataset="digits", num_digits=1, gap="instance", total_train=1080, total_test=450, min_per_number=10)
MLP = dict(architecture="mlp", beta=1e-3, occlusion_p=0.5)
SCALES: dict[str, dict[str, Any]] = {
    "smoke": DIGITS | MLP | dict(hidden=(128, 64), lr=3e-3, steps=60, batch=16),
    "embedded": DIGITS | MLP | dict(hidden=(128, 64), lr=3e-3, steps=1500, batch=64),
    "lenet": dict(steps=10_000),
    "paper": {},
}
"""Defaults of `train`, as in the tables of that scale."""


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/hib-ndigit-mnist."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / "hib-ndigit-mnist")
