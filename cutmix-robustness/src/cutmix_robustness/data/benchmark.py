"""The images on which a model is trained and evaluated, by the name of the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutmix_robustness.data import cifar, digits, imagenet, ood, twowave
from cutmix_robustness.data.corrupted import corrupted_source
from cutmix_robustness.data.sources import Batches, ImageFiles, ResidentImages, image_folder, stratified
from cutmix_robustness.settings import Settings

Source = ResidentImages | ImageFiles
SMALL = 64  # up to this many pixels, images are corrupted with the constants of CIFAR-C


@dataclass
class Benchmark:
    """Training and test images, and what else the suites need.

    Attributes:
        train: training set.
        test: test set; the suites derive everything else from it.
        validation: part of the training images, held out to choose an epoch and prepared like the test set; or None.
        num_classes: K.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        corruption_scale: "cifar" or "imagenet": which severities.
        stored_corruptions: folder of CIFAR-C or ImageNet-C, read if it exists; else corruptions are generated.
        unknown: opens the out-of-distribution sets, by name.
        boxes: (n_i, 4) true boxes of every test image as (x0, y0, x1, y1) in pixels of the network's input.
    """

    train: Source
    test: Source
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    corruption_scale: str = "cifar"
    stored_corruptions: Path | None = None
    unknown: Callable[[], Mapping[str, Batches]] = field(default=dict)
    boxes: list[np.ndarray] | None = None
    validation: Source | None = None

    def corrupted(self, source: Source, name: str, severity: int, seed: int) -> Batches:
        """A corrupted copy of the test set or part of it."""
        return corrupted_source(source, name, severity, self.corruption_scale, self.stored_corruptions, seed)


def open_benchmark(
    settings: Settings,
    seed: int,
    data_root: Path,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    skip_broken: bool = False,
) -> Benchmark:
    """The data set of the settings.

    Args:
        settings: settings of the run.
        seed: seed of drawn parts of the training set, and of TwoWave.
        data_root: folder that holds the data sets.
        device: device of the images.
        workers: processes that read image files; None: one per core, at most eight.
        skip_broken: decode all image files first and skip those that cannot be decoded; the log names them.

    Raises:
        FileNotFoundError: a data set is missing; the message says what to do.
    """
    benchmark = _open(settings, seed, data_root, device, skip_broken)
    for part in (benchmark.train, benchmark.test):
        if isinstance(part, ImageFiles) and workers is not None:
            part.num_workers = workers
    if skip_broken and isinstance(benchmark.train, ImageFiles) and isinstance(benchmark.test, ImageFiles):
        benchmark.train, benchmark.test = benchmark.train.without_broken(), benchmark.test.without_broken()
        kept = benchmark.test.index
        if benchmark.boxes is not None and kept is not None:
            benchmark.boxes = [benchmark.boxes[number] for number in kept.tolist()]
    if settings.validation_images:
        whole, chosen = benchmark.train, stratified(benchmark.train.labels, settings.validation_images, seed)
        rest = torch.ones(len(whole), dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]
        benchmark.train, benchmark.validation = whole.select(rest), whole.select(chosen, benchmark.test.augment)
    return benchmark


def benchmark_of(images: Tensor, labels: Tensor, unknown: Mapping[str, Tensor] | None = None) -> Benchmark:
    """Your own test images, as tensors.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        unknown: out-of-distribution sets by name, each in the form of `images`.

    Raises:
        ValueError: a negative label.
    """
    if labels.min() < 0:
        raise ValueError(f"labels must be 0 or more, got {int(labels.min())}")
    test = ResidentImages(images, labels, "images")
    outside = {
        name: ResidentImages(each, torch.zeros(len(each), dtype=torch.int64), name)
        for name, each in (unknown or {}).items()
    }
    size = "imagenet" if max(images.shape[2:]) > SMALL else "cifar"
    mean = tuple((images.double().mean((0, 2, 3)) / 255).tolist())
    return Benchmark(test, test, int(labels.max()) + 1, mean, (1.0,) * 3, size, None, lambda: outside)


def folder_benchmark(
    root: Path | str, device: torch.device | str = "cpu", workers: int | None = None, skip_broken: bool = False
) -> Benchmark:
    """Test images of a folder with one folder per class, in alphabetical order, resized and cropped to 224 x 224."""
    paths, labels, classes = image_folder(Path(root))
    test = ImageFiles(paths, labels, "image folder", "none", device, workers)
    test = test.without_broken() if skip_broken else test
    return Benchmark(test, test, len(classes), imagenet.MEAN, imagenet.STD, "imagenet")


def _open(settings: Settings, seed: int, data_root: Path, device: torch.device | str, skip_broken: bool) -> Benchmark:
    if settings.dataset == "twowave":
        return _twowave(seed, device)
    if settings.dataset == "digits":
        return _digits(seed, device)
    if settings.dataset in ("cifar10", "cifar100", "cifar10-jpeg"):
        return _cifar(settings, seed, data_root, device, skip_broken)
    if settings.dataset == "imagenet":
        return _imagenet(settings, data_root, device)
    if settings.dataset == "cub":
        train, test, boxes = imagenet.load_cub(data_root / "CUB_200_2011", settings.augment, device)
        return Benchmark(train, test, 200, imagenet.MEAN, imagenet.STD, "imagenet", boxes=boxes)
    return _image_folder(settings, data_root, device)


def _cifar(settings: Settings, seed: int, data_root: Path, device: torch.device | str, skip_broken: bool) -> Benchmark:
    train, test, classes = cifar.load(
        settings.dataset, data_root, settings.augment, device, settings.train_images, seed
    )
    stored = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(settings.dataset)

    def unknown() -> dict[str, ResidentImages]:
        if stored:
            return ood.open_sets(data_root, len(test), device, skip_broken)
        return ood.digits_and_noise(data_root, len(test), device)

    return Benchmark(
        train, test, classes, cifar.MEAN, cifar.STD, "cifar", data_root / stored if stored else None,
        unknown,
    )  # fmt: skip


def _imagenet(settings: Settings, data_root: Path, device: torch.device | str) -> Benchmark:
    root = data_root / "imagenet"
    train, test = imagenet.load(root, settings.augment, device)
    boxes = imagenet.val_boxes(root, test) if "localization" in settings.suites else None
    return Benchmark(train, test, 1000, imagenet.MEAN, imagenet.STD, "imagenet", data_root / "imagenet-c", boxes=boxes)


def _image_folder(settings: Settings, data_root: Path, device: torch.device | str) -> Benchmark:
    paths, labels, classes = image_folder(data_root / "train")
    test_paths, test_labels, test_classes = image_folder(data_root / "test")
    if classes != test_classes:
        raise ValueError(f"{data_root}: train and test have different class folders")
    train = ImageFiles(paths, labels, "image folder, train", settings.augment, device)
    test = ImageFiles(test_paths, test_labels, "image folder, test", "none", device)
    return Benchmark(train, test, len(classes), imagenet.MEAN, imagenet.STD, "imagenet")


def _digits(seed: int, device: torch.device | str) -> Benchmark:
    """1,000 training and 1,000 test images."""
    (train, _), (test, boxes) = (digits.digits_on_photographs(1000, seed, part) for part in ("train", "test"))
    train, test = train.to(device), test.to(device)
    return Benchmark(train, test, digits.CLASSES, digits.MEAN, digits.STD, boxes=boxes)


def _twowave(seed: int, device: torch.device | str) -> Benchmark:
    """500 training and 1,000 test images; out-of-distribution: noise, unseen classes, background alone."""

    def draw(n: int, part: int, waves: str = "known") -> ResidentImages:
        return twowave.twowave(n, 4 * seed + part, waves).to(device)

    def unknown() -> dict[str, ResidentImages]:
        noise = ood.noise_sets(1000, twowave.SIDE, seed, device)
        return noise | {"unseen_classes": draw(1000, 2, "unseen"), "background": draw(1000, 3, "none")}

    return Benchmark(draw(500, 0), draw(1000, 1), twowave.CLASSES, twowave.MEAN, twowave.STD, "cifar", None, unknown)
