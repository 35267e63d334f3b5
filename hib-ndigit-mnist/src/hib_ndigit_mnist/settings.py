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
    """units of each fully connected layer"""
    pool: int = 1
    """images are averaged over pool x pool pixels (mlp)"""
    batch_norm: bool = False
    """batch normalisation after the convolutions and the hidden layer (lenet)"""
    logvar_bias: float | None = None
    """initial log variance; None: -2 - log(D / 2)"""
    beta: float = 1e-4
    """weight of the KL term"""
    samples: int = 8
    """K, samples per image"""
    objective: Literal["log_mean", "mean_log"] = "log_mean"
    """log_mean (-log E[p]) or mean_log (-E[log p], the paper's bound)"""
    kl: Literal["auto", "closed", "mc", "upper_bound"] = "auto"
    """how to compute the KL term: auto, closed, mc or upper_bound"""
    margin: float = 1.0
    """margin of the classical loss"""
    occlusion_p: float = 0.2
    """probability of an occluder per digit during training"""
    steps: int = 100_000
    """optimizer steps"""
    batch: int = 128
    """images per step, half of them partners"""
    pairs: int = 256
    """maximal number of matching pairs per batch; equally many others are taken"""
    lr: float = 1e-3
    """initial learning rate"""
    lr_final: float = 1e-5
    """learning rate at the end of the cosine schedule"""
    match_lr: float = 3.0
    """learning rate of a and b, as a multiple of the others'"""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.is_point and self.components != 1:
            raise ValueError(f"components: a point embedding has one, got {self.components}")
        if not self.beta >= 0:
            raise ValueError(f"beta: expected >= 0, got {self.beta}")
        if self.components < 1 or self.dim < 1 or self.samples < 1 or self.samples % self.components:
            raise ValueError(
                f"expected components >= 1, dim >= 1 and samples a multiple of components, got components = "
                f"{self.components}, dim = {self.dim}, samples = {self.samples}"
            )
        if self.batch < 4 or self.batch % 2 or self.steps < 1 or self.pairs < 1:
            raise ValueError(
                f"expected an even batch >= 4, steps >= 1, pairs >= 1, got {self.batch}, {self.steps}, {self.pairs}"
            )
        _check_rates(self)
        if not 0 <= self.occlusion_p <= 1:
            raise ValueError(f"occlusion_p: expected a probability in [0, 1], got {self.occlusion_p}")

    @property
    def is_point(self) -> bool:
        """No variance."""
        return self.method != "mog"

    def shape(self) -> tuple:
        """Trainings of equal shape can be stacked: all settings but beta and occlusion_p."""
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
    """A model and the N-digit images it is trained on; stored in the model file."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """mnist (under the data root) or digits (scikit-learn's)"""
    num_digits: int = 2
    """N"""
    gap: Literal["number", "instance"] = "number"
    """what is new in the test splits: numbers (number) or only images (instance)"""
    split: Literal["train", "test_seen", "test_unseen", "test"] = "test_seen"
    """test split: test_seen, test_unseen, or test for gap instance"""
    total_train: int = 100_000
    """target number of training images"""
    total_test: int = 10_000
    """target number of images in each test split"""
    min_per_number: int = 100
    """minimal number of images per number; numbers are dropped to reach it"""

    def training(self) -> Training:
        """The settings that determine the weights."""
        return Training(**{f.name: getattr(self, f.name) for f in fields(Training)})

    def data(self) -> tuple:
        """Arguments of the training and test sets; empty for the sizes of the standard tables."""
        sizes = {name: getattr(self, name) for name in ("total_train", "total_test", "min_per_number")}
        standard = all(getattr(TrainedOn, name) == value for name, value in sizes.items())
        return self.dataset, self.num_digits, self.gap, () if standard else tuple(sizes.items())


@dataclass(frozen=True)
class BackboneTraining:
    """A backbone with a hedged head, trained on a user's own images."""

    backbone: str = "torchvision:resnet18"
    """network: torchvision:NAME or timm:NAME"""
    image_size: int = 224
    """side of the square input in pixels"""
    method: Literal["mog", "point", "pfe", "mc-dropout", "mc-infonce"] = "mog"
    """mog (hedged), point (same loss, no variance), or a competing method: pfe (arXiv 1904.09658), mc-dropout
    (1506.02142), mc-infonce (2302.02865)"""
    dim: int = 64
    """D, dimension of the embedding"""
    components: int = 1
    """C, Gaussians per image (mog)"""
    beta: float = 1e-4
    """weight of the KL term (mog)"""
    samples: int = 8
    """K, samples per image (mog, mc-infonce), passes (mc-dropout)"""
    dropout: float = 0.2
    """share of dropped features (mc-dropout)"""
    augment: Literal["none", "crop", "crop-flip"] = "crop"
    """augmentation: none, crop (random, at least half of the area) or crop-flip (random horizontal flips, too)"""
    steps: int = 2000
    """optimizer steps"""
    batch: int = 64
    """images per step, half of them partners"""
    lr: float = 1e-4
    """initial learning rate (Adam)"""
    lr_final: float = 1e-6
    """learning rate at the end of the cosine schedule"""
    match_lr: float = 10.0
    """learning rate of a and b, as a multiple of the others'"""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.samples < 1 or self.components < 1 or self.samples % self.components:
            raise ValueError(f"samples: expected a multiple of components, got {self.samples}, {self.components}")
        if self.method != "mog" and self.components != 1:
            raise ValueError(f"components: {self.method} has one, got {self.components}")
        if self.batch < 4 or self.batch % 2 or self.steps < 1 or self.image_size < 1:
            raise ValueError(
                f"expected an even batch >= 4, steps >= 1, image_size >= 1, got {self.batch}, {self.steps}, "
                f"{self.image_size}"
            )
        _check_rates(self)
        if not self.beta >= 0 or not 0 < self.dropout < 1 or self.dim < 1:
            raise ValueError(
                f"expected beta >= 0, dropout in (0, 1), dim >= 1, got {self.beta}, {self.dropout}, {self.dim}"
            )


@dataclass(frozen=True)
class Settings(TrainedOn):
    """Everything a table file may set."""

    report: Report = "verification"
    """what to measure: a function of reports.py, or dataset"""
    test_images: int = 10_000
    """maximal number of test images"""
    test_pairs: int = 10_000
    """number of verification pairs, half of them matching"""
    queries: int = 10_000
    """number of images to identify"""
    estimator: Literal["auto", "quadrature", "mc"] = "auto"
    """how to compute match probabilities: quadrature, mc, or auto"""
    eval_samples: int = 8
    """K, samples per image for mc"""
    at: int = 0
    """report the model after this many steps; 0: at the end"""


def _check_rates(settings: Training | BackboneTraining) -> None:
    """ValueError for a learning rate that is zero or negative."""
    if not (settings.lr > 0 and settings.lr_final >= 0 and settings.match_lr > 0):
        raise ValueError(
            f"expected lr > 0, lr_final >= 0, match_lr > 0, got {settings.lr}, {settings.lr_final}, {settings.match_lr}"
        )


def _check_choices(settings: Training | BackboneTraining) -> None:
    """ValueError if a field is none of the values that its type lists."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")


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
