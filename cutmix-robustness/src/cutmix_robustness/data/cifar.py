"""CIFAR-10, CIFAR-100 and CIFAR-10 recompressed as JPEG, all resident on the device."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cutmix_robustness.data.sources import ResidentImages, stratified
from shared_utils.images import BrokenFile, read_image

MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
JPEG_ARCHIVE = "cifar10-imagefolder.zip"
BATCHES = {
    "cifar10": (
        "cifar-10-batches-py",
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    ),
    "cifar100": ("cifar-100-python", {"train": ["train"], "test": ["test"]}),
}


def load(
    name: str, data_root: Path, augment: str, device: torch.device | str, train_images: int = 0, seed: int = 0
) -> tuple[ResidentImages, ResidentImages, int]:
    """Training set, test set and number of classes of cifar10, cifar100 or cifar10-jpeg.

    With train_images the training set holds that number of images, drawn by the seed, equally many of each class.

    Raises:
        FileNotFoundError: the data set is missing; the message says what to do.
        ValueError: the JPEG archive holds other folders or sizes.
        BrokenFile: an image of the archive that cannot be decoded.
    """
    if name == "cifar10-jpeg":
        parts = [_read_archive(data_root / JPEG_ARCHIVE, part) for part in ("train", "test")]
    else:
        parts = [_read_pickles(name, data_root, part) for part in ("train", "test")]
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


def _read_pickles(name: str, data_root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels of the authors' "python version" batches."""
    folder, parts = BATCHES[name]
    images, labels = [], []
    for file in parts[part]:
        path = data_root / folder / file
        if not path.is_file():
            fetch = f"cutmix-robustness data --download {name} --data-root {data_root}"
            raise FileNotFoundError(f"{path}: file not found; run `{fetch}`")
        try:
            content = pickle.loads(path.read_bytes(), encoding="latin1")
            images.append(content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise BrokenFile(f"{path}: {error}; download the archive again") from None
        labels += content["fine_labels"] if name == "cifar100" else content["labels"]
    return np.concatenate(images), np.array(labels)


def _read_archive(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels of <part>/<class>/*.jpg, classes in alphabetical order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: archive not found; it should hold train/<class>/*.jpg and test/<class>/*.jpg")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for number, name in enumerate(names):
            images[number] = _read_member(archive, name)
    if not names:
        raise ValueError(f"{path}: contains no image below {part}/")
    return images, np.array([classes.index(name.split("/")[1]) for name in names])


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    where = f"{archive.filename}: {name}"
    try:
        content = archive.read(name)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise BrokenFile(f"{where}: {error}; get the archive again") from None
    image = read_image(io.BytesIO(content), name=where)
    if image.size != (32, 32):
        raise BrokenFile(f"{where}: {image.width} x {image.height} pixels, expected 32 x 32; get the archive again")
    return np.asarray(image)


def broken_in_archive(path: Path) -> tuple[int, list[str]]:
    """The number of images in the JPEG archive, and a line for each that cannot be decoded."""
    found = []
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        for name in names:
            try:
                _read_member(archive, name)
            except BrokenFile as error:
                found.append(str(error))
    return len(names), found
