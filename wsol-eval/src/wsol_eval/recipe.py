"""The settings of a training and of its data, apart from the code that uses them: read without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/wsol-eval."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / "wsol-eval")


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Schedule and batch are those of the paper's runs on CUB as users of the reference report them; the command line of
    the reference has other defaults (40 epochs, a drop every 30, batch 64, learning rate .01, weight decay 1e-4, HaS
    patches of 4 pixels).
    """

    arch: str = "vgg16"
    """vgg16, inception_v3, resnet50, efficientnet_lite0 or small"""
    method: str = "cam"
    """cam, has, acol, spg, adl, cutmix or fsl; or your own: package.module:Class or file.py:Class (arch is not read)"""
    feature_map: int = 14
    """side of the score map before resizing: 14 or 28 (small: 4 or 8, efficientnet_lite0: also 7)"""
    lr: float = 1e-3
    """learning rate of the pretrained layers"""
    lr_classifier_ratio: float = 10.0
    """learning rate of new layers, as a multiple of lr"""
    momentum: float = 0.9
    """of SGD, Nesterov"""
    weight_decay: float = 5e-4
    """the reference's users take 1e-4 for resnet50"""
    epochs: int = 50
    """passes over the training set"""
    lr_decay_frequency: int = 15
    """epochs between drops: the learning rate falls to a tenth at the start of every n-th epoch, counted from 1"""
    batch_size: int = 32
    """over all ranks"""
    has_grid_size: int = 56
    """HaS: side of a hidden patch in pixels"""
    has_drop_rate: float = 0.5
    """HaS: probability that a patch is hidden"""
    acol_threshold: float = 0.7
    """ACoL: what the first classifier's map reaches is erased"""
    adl_drop_rate: float = 0.75
    """ADL: probability of the drop mask"""
    adl_threshold: float = 0.9
    """ADL: attention below this share of its maximum is kept"""
    spg: tuple[tuple[float, float], ...] = ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1))
    """SPG: (high, low) for B2, B1 and C"""
    cutmix_beta: float = 1.0
    """CutMix: both parameters of the Beta distribution"""
    cutmix_prob: float = 1.0
    """CutMix: probability per batch"""
    own: tuple[tuple[str, float], ...] = ()
    """your own method: names and values of its hyperparameters; `search` draws them"""
    pretrained: str | None = None
    """"imagenet", or a file with the state dict of torchvision's (efficientnet_lite0: of the package of its weights)"""

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Recipe:
        """A recipe from JSON, where tuples are lists."""
        pairs: dict[str, Any] = {name: tuple(map(tuple, stored[name])) for name in ("spg", "own") if name in stored}
        return cls(**stored | pairs)

    def learning_rate(self, epoch: int) -> float:
        """Factor of `lr` in an epoch counted from 0: the first phase has one epoch less than the others."""
        return 0.1 ** ((epoch + 1) // self.lr_decay_frequency)


@dataclass(frozen=True)
class OnData:
    """Where images are, and how they are read."""

    dataset: str = "photographs"
    """photographs or photographs-telling (digits on photographs, built in), cifar10-jpeg or cifar10-jpeg-telling (on
    CIFAR-10's); kangaroo-raccoon (two clones); or a folder of the data root: CUB, ILSVRC, OpenImages, or your own."""
    data_root: Path = field(default_factory=default_data_root)
    """Holds <dataset>/ and metadata/<dataset>/{train,val,test}/."""
    per_class: int = 0
    """Fully labelled images per class of val, or all that a class has; 0 takes the paper's: 5 of OpenImages and of the
    built-in sets, all of any other."""
    seed: int = 0
    """Of built-in images, weights, order and draws."""
    workers: int = max(1, min(8, (os.cpu_count() or 2) - 1))
    """Processes that decode images."""
    cache: Path | None = None
    """Folder for 256 x 256 copies of the images, so that each is decoded once."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""


@dataclass(frozen=True)
class OnDevice:
    """Device and precision."""

    device: str = "auto"
    """auto, cpu or cuda; several processes through torchrun or Slurm."""
    precision: str = "auto"
    """Of training: auto (bf16-mixed on CUDA), or a precision of Fabric's. Maps and metrics are float32 always."""
    compile: bool = False
    """torch.compile the network for training."""
