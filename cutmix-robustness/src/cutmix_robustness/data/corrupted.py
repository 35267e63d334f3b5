"""Corrupted test sets: CIFAR-C and ImageNet-C where they are stored, else generated batch by batch on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cutmix_robustness.corruptions import corrupt
from cutmix_robustness.data.sources import ImageFiles, ResidentImages
from cutmix_robustness.draws import generator_for
from shared_utils.files import whole_file
from shared_utils.images import BrokenFile, image_files, read_image
from shared_utils.logging import get_logger

logger = get_logger("cutmix-robustness")


class Generated:
    """A source with a corruption applied; with the same seed an image looks the same in any batch, process or subset.

    Args:
        source: source of uint8 images.
        name: name of the corruption.
        severity: 1 .. 5.
        scale: "cifar" or "imagenet".
        seed: seed of the corruption's draws.
    """

    def __init__(self, source: ResidentImages | ImageFiles, name: str, severity: int, scale: str, seed: int):
        self.source, self.corruption, self.severity, self.scale, self.seed = source, name, severity, scale, seed

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The source's record, and the corruption."""
        source = self.source
        index = torch.arange(len(source)) if source.index is None else source.index
        generator = generator_for(self.seed, self.corruption, self.severity)
        seeds = torch.randint(2**63 - 1, (int(index.max()) + 1,), generator=generator)[index].split(source.step)
        for number, images, labels in source.batches(rank, world):
            yield number, corrupt(images, self.corruption, self.severity, self.scale, seeds=seeds[number]), labels


def corrupted_source(
    source: ResidentImages | ImageFiles, name: str, severity: int, scale: str, stored: Path | None, seed: int
) -> ResidentImages | ImageFiles | Generated:
    """Corrupted test images: stored ones if the folder exists, else generated ones.

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
        raise FileNotFoundError(f"{path}: missing, although its folder exists")
    images = read_cifar_c(path)
    per_severity = len(images) // 5
    index = np.arange(len(test)) if test.index is None else test.index.numpy()
    if index.max() >= per_severity:
        raise ValueError(f"{path}: has {per_severity} images per severity, fewer than the test set")
    part = torch.from_numpy(images[(severity - 1) * per_severity + index])
    return ResidentImages(
        part.permute(0, 3, 1, 2).contiguous(), test.labels, f"{test.name}, {name} {severity}", device=test.images.device
    )


def read_cifar_c(path: Path) -> np.ndarray:
    """One corruption's images of all five severities, (5 n, 32, 32, 3) uint8, mapped from the file.

    Raises:
        BrokenFile: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BrokenFile(f"{path}: {error}; get the archive again") from None
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or images.dtype != np.uint8:
        raise ValueError(f"{path}: expected (5 n, 32, 32, 3) uint8, got {images.shape} {images.dtype}")
    return images


def write_cifar_c(test: ResidentImages, folder: Path, names: tuple[str, ...], seed: int = 0) -> None:
    """Write <name>.npy, (5 N, 32, 32, 3) uint8 by severity, and labels.npy; existing files are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.tile(test.labels.cpu().numpy().astype(np.uint8), 5)
    _save(folder / "labels.npy", labels)
    for name in names:
        if (folder / f"{name}.npy").exists():
            logger.info("%s.npy is already there and stays as it is", name)
        else:
            sources = [Generated(test, name, severity, "cifar", seed) for severity in range(1, 6)]
            images = torch.cat([images.cpu() for source in sources for _, images, _ in source.batches()])
            _save(folder / f"{name}.npy", images.permute(0, 2, 3, 1).contiguous().numpy())


def write_images(
    source: Path,
    folder: Path,
    names: Sequence[str],
    severities: Sequence[int],
    scale: str,
    seed: int,
    skip_broken: bool = False,
) -> int:
    """Write <folder>/<corruption>/<severity>/<file>.png for an image or every image of a folder; returns how many.

    A PNG keeps its name; other files get .png appended (cat.jpg.png), so that no two collide. Hidden files and files
    that are not images are skipped.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: an unknown corruption or severity, or two files that would be written to the same place.
        BrokenFile: an image cannot be decoded and is not to be skipped.
    """
    if source.is_file():
        targets = {source: _png_name(Path(source.name))}
    else:
        targets = {path: _png_name(path.relative_to(source)) for path in image_files(source)[0]}
    if not targets:
        raise FileNotFoundError(f"{source}: contains no images")
    by_target = {target: path for path, target in targets.items()}
    for path, target in targets.items():
        if by_target[target] != path:
            raise ValueError(f"{path} and {by_target[target].name} would both be written to {target}; rename one")
    written = 0
    for path, target in targets.items():
        try:
            image = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)[None]
        except BrokenFile as error:
            if not skip_broken:
                raise
            logger.warning("skipped: %s", error)
            continue
        for name in names:
            for severity in severities:
                generator = generator_for(seed, name, severity, str(target))
                done = corrupt(image, name, severity, scale, generator=generator)[0]
                place = folder / name / str(severity) / target
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(done.permute(1, 2, 0).numpy()).save(place)
                written += 1
    if not written:
        raise ValueError(f"{source}: nothing to write; no image can be decoded, or no corruption or severity is named")
    return written


def _png_name(path: Path) -> Path:
    return path if path.suffix.lower() == ".png" else path.with_name(path.name + ".png")


def _save(path: Path, array: np.ndarray) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
