"""Corrupted test sets: CIFAR-C and ImageNet-C where they are stored, else generated batch by batch on the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from cutmix_robustness.data.sources import ImageFiles, ResidentImages, generator_for


class Generated:
    """A source behind a corruption; the same images for the same seed, whatever the batches or processes.

    Args:
        source: of uint8 images.
        name: of the corruption.
        severity: 1 .. 5.
        scale: "cifar" or "imagenet".
        seed: of the corruption's draws.
    """

    def __init__(self, source: ResidentImages | ImageFiles, name: str, severity: int, scale: str, seed: int):
        self.source, self.corruption, self.severity, self.scale, self.seed = source, name, severity, scale, seed

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As the source's, corrupted."""
        order = (*CORRUPTIONS, *EXTRA_CORRUPTIONS).index(self.corruption)
        for number, images, labels in self.source.batches(rank, world):
            generator = generator_for(self.seed, order, self.severity, number)
            yield number, corrupt(images, self.corruption, self.severity, self.scale, generator=generator), labels


def corrupted_source(
    source: ResidentImages | ImageFiles, name: str, severity: int, scale: str, stored: Path | None, seed: int
) -> ResidentImages | ImageFiles | Generated:
    """Stored corrupted images of the first len(source) test images where the folder exists, else generated ones.

    Raises:
        FileNotFoundError: the folder exists but lacks this corruption.
        ValueError: its images do not match the test set.
    """
    if stored is None or not stored.is_dir():
        return Generated(source, name, severity, scale, seed)
    if isinstance(source, ResidentImages):
        return _cifar_c(stored, name, severity, source)
    folder = stored / name / str(severity)
    paths = [folder / path.parent.name / path.name for path in source.paths]
    return ImageFiles(paths, source.labels, f"{source.name}, {name} {severity}", "cropped", source.device)


def _cifar_c(folder: Path, name: str, severity: int, test: ResidentImages) -> ResidentImages:
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, though its folder exists")
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or images.dtype != np.uint8:
        raise ValueError(f"{path}: expected (5 n, 32, 32, 3) uint8, got {images.shape} {images.dtype}")
    per_severity = len(images) // 5
    if len(test) > per_severity:
        raise ValueError(f"{path}: holds {per_severity} images per severity, the test set {len(test)}")
    part = torch.from_numpy(np.array(images[(severity - 1) * per_severity :][: len(test)]))
    return ResidentImages(
        part.permute(0, 3, 1, 2).contiguous(), test.labels, f"{test.name}, {name} {severity}", device=test.images.device
    )


def write_cifar_c(test: ResidentImages, folder: Path, names: tuple[str, ...], seed: int = 0) -> None:
    """Write <name>.npy, (5 N, 32, 32, 3) uint8 in the order of the severities, and labels.npy; files there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.tile(test.labels.cpu().numpy().astype(np.uint8), 5)
    _save(folder / "labels.npy", labels)
    for name in names:
        if not (folder / f"{name}.npy").exists():
            sources = [Generated(test, name, severity, "cifar", seed) for severity in range(1, 6)]
            images = torch.cat([images.cpu() for source in sources for _, images, _ in source.batches()])
            _save(folder / f"{name}.npy", images.permute(0, 2, 3, 1).contiguous().numpy())


def write_images(
    source: Path, folder: Path, names: Sequence[str], severities: Sequence[int], scale: str, seed: int
) -> int:
    """Write <folder>/<corruption>/<severity>/<file>.png for an image or every image of a folder; returns how many.

    Raises:
        FileNotFoundError: no image is there.
        ValueError: an image that cannot be decoded, an unknown corruption or severity.
    """
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{source}: no such image or folder of images")
    for path in paths:
        try:
            with Image.open(path) as file:
                image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)[None]
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: cannot be read as an image ({error})") from error
        inside = Path(path.name) if source.is_file() else path.relative_to(source)
        for order, name in enumerate(names):
            for severity in severities:
                generator = generator_for(seed, order, severity, str(inside))
                done = corrupt(image, name, severity, scale, generator=generator)[0]
                target = (folder / name / str(severity) / inside).with_suffix(".png")
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(done.permute(1, 2, 0).numpy()).save(target)
    return len(paths) * len(names) * len(severities)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
