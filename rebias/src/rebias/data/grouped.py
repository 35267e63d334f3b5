"""Images with a label and a bias label, in the layouts of released sets, or from your own CSV file.

Every set gives items (image, label, bias). Bias labels are for evaluation; training does not see them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rebias.data.images import ImageFiles
from shared_utils.images import image_files

SPLITS = ("train", "val", "test")


def csv_set(csv: str | Path, split: str = "", **options: Any) -> ImageFiles:
    """Your own images: a CSV file with the columns image, label, bias and, if it has splits, split.

    Args:
        csv: the file; image paths are relative to its folder.
        split: read only this split: train, val or test; "" takes all lines.
        options: options of `ImageFiles`: augment, seed, device, reading.

    Raises:
        FileNotFoundError: no such file, or images that are missing.
        ValueError: columns are missing, no line of the split, or labels that are not 0, 1, 2 ..
    """
    csv = Path(csv)
    table = _table(csv, ("image", "label", "bias") + (("split",) if split else ()))
    if split:
        table = table[table.split == split]
    return _images(csv.parent, table.image, table.label, table.bias, f"{csv.stem} {split}".strip(), csv, options)


def _number_of(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)


def waterbirds(folder: str | Path, split: str, **options: Any) -> ImageFiles:
    """Waterbirds (Sagawa et al. 2020) as released, with metadata.csv; bias is the place, land or water."""
    table = _table(Path(folder) / "metadata.csv", ("img_filename", "y", "place", "split"))
    table = table[table.split == _number_of(split)]
    where = Path(folder) / "metadata.csv"
    return _images(Path(folder), table.img_filename, table.y, table.place, f"Waterbirds {split}", where, options)


def celeba(
    folder: str | Path, split: str, *, target: str = "Blond_Hair", bias: str = "Male", **options: Any
) -> ImageFiles:
    """CelebA as released: list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba; any two attributes."""
    folder = Path(folder)
    attributes = _table(folder / "list_attr_celeba.txt", (target, bias), sep=r"\s+", skiprows=1)
    parts = _table(folder / "list_eval_partition.txt", (), sep=r"\s+", header=None, names=["split"], index_col=0)
    table = attributes[parts.split.reindex(attributes.index) == _number_of(split)]
    labels, biases = (table[name].eq(1).astype(int) for name in (target, bias))  # -1 means no
    where = folder / "list_attr_celeba.txt"
    names = pd.Series(table.index.astype(str))
    return _images(folder / "img_align_celeba", names, labels, biases, f"CelebA {split}", where, options)


def bffhq(folder: str | Path, split: str, *, percent: str = "0.5pct", **options: Any) -> ImageFiles:
    """The released bFFHQ (Lee et al. 2021): label (age) and bias (gender) are in <number>_<label>_<bias>.png.

    Training images are in <percent>/align and <percent>/conflict, the others in valid and test.
    """
    folder = Path(folder)
    places = ((f"{percent}/align", f"{percent}/conflict"), ("valid",), ("test",))[_number_of(split)]
    paths = [path for place in places for path in image_files(folder / place)[0]]
    ends = [path.stem.split("_")[-2:] for path in paths]
    wrong = [path for path, end in zip(paths, ends, strict=True) if len(end) < 2 or not "".join(end).isdigit()]
    if wrong:
        raise ValueError(f"{wrong[0]}: bFFHQ's files are named <number>_<label>_<bias>.png")
    names = pd.Series([path.relative_to(folder).as_posix() for path in paths], dtype=str)
    label, bias = (pd.Series([int(end[place]) for end in ends], dtype=int) for place in (0, 1))
    return _images(folder, names, label, bias, f"bFFHQ {percent} {split}", folder, options)


class ColoredMNIST:
    """Colored MNIST of LfF (Nam et al. 2020) as written by its script: images.npy and attrs.npy (digit, colour).

    Args:
        folder: such as ColoredMNIST-Skewed0.01-Severity4.
        split: "train" or "valid".
        device: device of the data.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: arrays have other shapes.
    """

    def __init__(self, folder: str | Path, split: str, device: torch.device | str = "cpu"):
        place = Path(folder) / split
        images, attrs = (np.load(place / f"{name}.npy") for name in ("images", "attrs"))
        if (
            images.ndim != 4
            or images.shape[3] != 3
            or attrs.ndim != 2
            or attrs.shape[1] < 2
            or len(attrs) != len(images)
        ):
            raise ValueError(
                f"{place}: expected images (n, H, W, 3) and attrs (n, 2), got {images.shape}, {attrs.shape}"
            )
        self.name = f"Colored MNIST {split}"
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)  # (n, 3, H, W) uint8
        self.labels, self.bias = (torch.from_numpy(attrs[:, number]).long().to(device) for number in (0, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One image (3, H, W) float32 in [-1, 1], its digit and its colour."""
        return self.images[index] / 127.5 - 1, int(self.labels[index]), int(self.bias[index])

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: images (B, 3, H, W) float32 in [-1, 1], targets (B,)."""
        for index in index_batches:
            index = index.to(self.labels.device)
            yield self.images[index] / 127.5 - 1, self.labels[index]

    def record(self) -> dict:
        """Name, size and checksum, for the run record."""
        parts = (self.images, self.labels, self.bias)
        digest = hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts))
        return {"name": self.name, "images": len(self), "sha256": digest.hexdigest()[:16]}


def _table(path: Path, columns: tuple[str, ...], **options: Any) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    table = pd.read_csv(path, **options)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return table


def _images(
    root: Path, names: pd.Series, labels: pd.Series, bias: pd.Series, name: str, where: Path, options: dict[str, Any]
) -> ImageFiles:
    if not len(names):
        raise ValueError(f"{where}: has no image path for {name}")
    numbers = []
    for column, values in (("label", labels), ("bias", bias)):
        if not pd.api.types.is_integer_dtype(values) or values.min() < 0:
            raise ValueError(f"{where}: {column} must hold 0, 1, 2 .., got {values.iloc[0]!r}")
        numbers.append(torch.from_numpy(values.to_numpy(dtype=np.int64, copy=True)))
    return ImageFiles(root, names.tolist(), numbers[0], name, bias=numbers[1], **options)
