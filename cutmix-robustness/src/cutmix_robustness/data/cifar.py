"""CIFAR-10 and CIFAR-100 through torchvision, and CIFAR-10 recompressed as JPEG, all resident on the device."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from cutmix_robustness.data.sources import ResidentImages, stratified
from shared_utils.images import BrokenFile, read_image

MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
JPEG_ARCHIVE = "cifar10-imagefolder.zip"


def load(
    name: str, data_root: Path, augment: str, device: torch.device | str, train_images: int = 0, seed: int = 0
) -> tuple[ResidentImages, ResidentImages, int]:
    """Training set, test set and number of classes of cifar10, cifar100 or cifar10-jpeg.

    With train_images the training set holds so many images, drawn by the seed with the same number of every class.

    Raises:
        FileNotFoundError: the data set is missing, with what to do.
        ValueError: the JPEG archive holds other folders or sizes.
        BrokenFile: an image of the archive that cannot be decoded.
    """
    if name == "cifar10-jpeg":
        parts = [_read_archive(data_root / JPEG_ARCHIVE, part) for part in ("train", "test")]
    else:
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        try:
            sets = [kind(str(data_root), train=train) for train in (True, False)]
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{data_root} lacks {name}: run `cutmix-robustness data --download {name} --data-root {data_root}`"
            ) from error
        parts = [(np.asarray(each.data), np.asarray(each.targets)) for each in sets]
    classes = 100 if name == "cifar100" else 10
    titles = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar10-jpeg": "CIFAR-10 (JPEG)"}
    train, test = (
        ResidentImages(
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(labels.astype(np.int64)),
            f"{titles[name]}, {part}",
            augment if part == "train" else "none",
            device,
        )
        for part, (images, labels) in zip(("train", "test"), parts, strict=True)
    )
    if train_images:
        train = train.select(stratified(train.labels, train_images, seed), augment)
    return train, test, classes


def _read_archive(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels of <part>/<class>/*.jpg, classes in alphabetical order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such archive; it holds train/<class>/*.jpg and test/<class>/*.jpg")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for number, name in enumerate(names):
            try:
                content = archive.read(name)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise BrokenFile(f"{path}: {name}: {error}; get the archive again") from None
            image = read_image(io.BytesIO(content), name=f"{path}: {name}")
            if image.size != (32, 32):
                raise ValueError(f"{path}: {name} is {image.width} x {image.height}, expected 32 x 32")
            images[number] = np.asarray(image)
    if not names:
        raise ValueError(f"{path}: holds no image below {part}/")
    return images, np.array([classes.index(name.split("/")[1]) for name in names])
