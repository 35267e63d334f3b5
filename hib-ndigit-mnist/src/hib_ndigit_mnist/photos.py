"""A user's labelled images: class folders, a CSV of image and label, or any Dataset; and batches for training."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from hib_ndigit_mnist.images import files_of
from hib_ndigit_mnist.pairs import ClassIndex, two_streams
from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger

logger = get_logger("hib-ndigit-mnist")


class ImageFiles(Dataset):
    """Image files as a data set of (RGB Pillow image, label).

    Args:
        files: paths.
        names: names in reports.
        labels: (n,) class numbers; all 0 without labels.
        classes: class names.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], labels: Tensor, classes: Sequence[str] = ()):
        self.files, self.names, self.labels, self.classes = list(files), list(names), labels, list(classes)

    @classmethod
    def of(cls, source: Path, labelled: bool = True) -> ImageFiles:
        """From a folder with one folder per class, or a CSV with the columns image (path relative to it) and label.

        Raises:
            FileNotFoundError: no such folder or table, or an image of the table is missing.
            ValueError: no images, images outside the class folders, other columns.
        """
        if source.suffix.lower() == ".csv":
            files, names, classes = _read_table(source)
        else:
            files = files_of(source)
            names = [str(file.relative_to(source)) if source.is_dir() else file.name for file in files]
            classes = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
        if not labelled:
            return cls(files, names, torch.zeros(len(files), dtype=torch.long))
        if "" in classes:
            raise ValueError(f"{source}: expected a folder per class, but {names[classes.index('')]} is in none")
        found = sorted(set(classes))
        number = {name: index for index, name in enumerate(found)}
        return cls(files, names, torch.tensor([number[name] for name in classes]), found)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(self.files[index]), int(self.labels[index])

    def keep(self, chosen: Tensor) -> ImageFiles:
        """The images where `chosen` (n,) bool is True."""
        rows = chosen.nonzero()[:, 0].tolist()
        files, names = ([every[row] for row in rows] for every in (self.files, self.names))
        return ImageFiles(files, names, self.labels[chosen], self.classes)

    def without_broken(self, workers: int) -> ImageFiles:
        """The images that can be read completely; the log names the others. ValueError if none is left."""
        problems = list(DataLoader(_Check(self), batch_size=None, num_workers=workers))
        for problem in filter(None, problems):
            logger.warning("skipped: %s", problem)
        if all(problems):
            raise ValueError(f"none of {len(problems)} images can be read")
        return self.keep(torch.tensor([not problem for problem in problems]))

    def with_partners(self) -> ImageFiles:
        """The images of classes with at least two: others have no matching pair. ValueError below two such classes."""
        counts = Counter(self.labels.tolist())
        lonely = [label for label, count in counts.items() if count < 2]
        if len(counts) - len(lonely) < 2:
            raise ValueError(f"expected two classes with two images each, got {len(counts) - len(lonely)}")
        if lonely:
            logger.warning("skipped, only one image: %s", ", ".join(self.classes[label] for label in lonely))
        return self.keep(~torch.isin(self.labels, torch.tensor(lonely, dtype=torch.long)))


def _read_table(path: Path) -> tuple[list[Path], list[str], list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    with path.open(newline="", encoding="utf-8-sig") as table:
        rows = list(csv.DictReader(table))
    if not rows or not {"image", "label"} <= rows[0].keys():
        found = ", ".join(map(str, rows[0])) if rows else "no row"
        raise ValueError(f"{path}: expected the columns image and label, got {found}")
    files = [path.parent / row["image"] for row in rows]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{path}: {file} does not exist")
    return files, [row["image"] for row in rows], [row["label"] for row in rows]


class _Check(Dataset):
    def __init__(self, images: ImageFiles):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images[index]
        except BrokenFile as error:
            return str(error)
        return ""


# ---- batches ----


def read_item(data: Dataset, index: int) -> tuple[Tensor, Any]:
    """data[index] as an image (1 or 3, H, W), uint8 or floating point in [0, 1], and its label.

    Raises:
        ValueError: not (image, label), another number of channels, values outside [0, 1].
        TypeError: not a Pillow image, tensor or array.
    """
    item = data[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        found = f"{type(item).__name__} of {len(item)}" if hasattr(item, "__len__") else type(item).__name__
        raise ValueError(f"data[{index}]: expected (image, label), got {found}")
    image = v2.functional.to_image(item[0].convert("RGB") if isinstance(item[0], Image.Image) else item[0])
    if image.shape[0] not in (1, 3):
        raise ValueError(
            f"data[{index}]: expected 1 or 3 channels, as a tensor (C, H, W) or an array (H, W, C), got the shape "
            f"{tuple(item[0].shape)}"
        )
    if image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"data[{index}]: expected values in [0, 1] or uint8, got {float(image.min()):.3g} to "
            f"{float(image.max()):.3g}; the model normalises them itself"
        )
    return image, item[1]


_TO_UNIT = (v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor())


def evaluation_transform(size: int) -> Callable[[Tensor], Tensor]:
    """An image (1 or 3, H, W) -> RGB (3, size, size) in [0, 1]: resize the shorter side, crop the central square."""
    return v2.Compose([v2.RGB(), v2.Resize(size, antialias=True), v2.CenterCrop(size), *_TO_UNIT])


def training_transform(size: int, augment: str) -> Callable[[Tensor], Tensor]:
    """The same with a random crop of at least half the area, and optionally a random horizontal flip."""
    if augment == "none":
        return evaluation_transform(size)
    mirror = [v2.RandomHorizontalFlip()] if augment == "crop-flip" else []
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    return v2.Compose([v2.RGB(), crop, *mirror, *_TO_UNIT])


class Drawn(Dataset):
    """Images by (index, seed): random changes of an image depend only on the seed, not on workers or restarts.

    ValueError if an image's label differs from the one in `labels` (n,), from which the batches are drawn.
    """

    def __init__(self, data: Dataset, labels: Tensor, transform: Callable[[Tensor], Tensor]):
        self.data, self.labels, self.transform = data, labels, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = read_item(self.data, key[0])
        if label != self.labels[key[0]]:
            raise ValueError(f"data[{key[0]}]: expected the label {int(self.labels[key[0]])}, got {label}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key[1])
            return self.transform(image), int(label)


def check_dataset_labels(labels: Any, data: Dataset) -> Tensor:
    """Labels as a tensor (n,) of integers, one per image of `data`; ValueError for anything else."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels: expected integers ({error})") from error
    count = len(data)  # type: ignore[arg-type]  # map-style
    if labels.shape != (count,) or labels.is_floating_point():
        found = f"{tuple(labels.shape)} {labels.dtype}"
        raise ValueError(f"labels: expected ({count},) integers, one per image, got {found}")
    return labels


class SeededBatches:
    """Batches of the two input streams as keys of `Drawn`, starting at a step: each depends only on seed and step.

    ValueError for a single class or a class with one image.
    """

    def __init__(self, labels: Tensor, batch: int, seed: int, start: int, steps: int):
        self.labels, self.index, self.batch, self.seed = labels, ClassIndex(labels), batch, seed
        if len(labels.unique()) < 2:
            raise ValueError("labels: expected at least two classes, got one")
        self.steps = range(start, steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            generator = torch.Generator().manual_seed(step_seed(self.seed, step))
            images = self._draw(generator)
            while (
                self.labels[images] == self.labels[images[0]]
            ).all():  # a batch of one class has no non-matching pair
                images = self._draw(generator)
            seeds = torch.randint(2**31, (self.batch,), generator=generator)
            yield list(zip(images.tolist(), seeds.tolist(), strict=True))

    def _draw(self, generator: torch.Generator) -> Tensor:
        return two_streams(self.index, len(self.labels), torch.rand(2, self.batch // 2, generator=generator))


def step_seed(seed: int, step: int) -> int:
    """Seed of all random numbers of one step."""
    return seed * 1_000_003 + step
