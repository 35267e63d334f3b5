"""Where images come from: tensors on the device, or files that workers read.

Both hand out uint8 batches. A training batch's augmentation is drawn from generators seeded by (seed, epoch, batch or
image), so it depends neither on the number of workers or ranks nor on where a killed run resumed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cutmix_robustness.draws import generator_for
from shared_utils.images import BrokenFile, image_files, read_image
from shared_utils.logging import get_logger

logger = get_logger("cutmix-robustness")


class Lighting(nn.Module):
    """AlexNet's colour noise as in the authors' code: along the principal axes of ImageNet's colours.

    The shift of an image is the sum over axes of axis * variance * N(0, std); constants are those of fb.resnet.torch.

    Args:
        std: 0.1 in the authors' code.
    """

    variances = torch.tensor([0.2175, 0.0188, 0.0045])
    axes = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )  # a column per axis

    def __init__(self, std: float = 0.1):
        super().__init__()
        self.std = std

    def forward(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 to the same, clipped."""
        shift = self.axes @ (self.variances * self.std * torch.randn(3))
        return (image + 255 * shift[:, None, None]).round().clamp(0, 255).to(torch.uint8)


TRANSFORMS = {
    "imagenet": [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), Lighting()],
    "wsol": [v2.Resize((256, 256)), v2.RandomCrop(224), v2.RandomHorizontalFlip()],
    "none": [v2.Resize(256), v2.CenterCrop(224)],
    "cropped": [v2.CenterCrop(224)],
    "wsol-test": [v2.Resize((256, 256)), v2.CenterCrop(224)],
}


def index_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Every full global batch of an epoch, in an order given by seed and epoch; ValueError if there is none."""
    if n < batch_size:
        raise ValueError(f"{n} training images do not fill a batch of {batch_size}")
    order = torch.randperm(n, generator=generator_for(seed, epoch))
    return [batch for batch in order.split(batch_size) if len(batch) == batch_size]


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """Ascending indices (n,) of randomly drawn images that keep every class's share to within one image.

    Args:
        labels: (N,) int64.
        n: how many; at most N.
        seed: seed of the draw.

    Raises:
        ValueError: n outside 1 .. N.
    """
    if not 1 <= n <= len(labels):
        raise ValueError(f"cannot draw a subset of {n} images from {len(labels)}")
    labels, generator = labels.cpu(), generator_for(seed, "stratified")
    quota = n * labels.bincount().double() / len(labels)
    take = quota.long()
    remainder = quota - take + 1e-9 * torch.rand(len(quota), dtype=torch.float64, generator=generator)
    take[remainder.argsort(descending=True)[: n - int(take.sum())]] += 1
    drawn = []
    for label, count in enumerate(take.tolist()):
        members = (labels == label).nonzero()[:, 0]
        drawn.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(drawn).sort().values


class Batches(Protocol):
    """Images to evaluate on."""

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every `world`-th batch from `rank` on: its number, images (B, 3, H, W) uint8 and labels (B,)."""


class ResidentImages:
    """Small images as uint8 on the device, cropped and flipped there.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        name: name in the run record.
        augment: "none" or "crop-flip".
        device: device of the images.
        index: (N,) int64, position of each image in the full set; None: this is the full set.

    Raises:
        ValueError: other shapes, dtypes or lengths.
    """

    whole_batches = True  # every rank sees the global batch and mixes it before taking its share
    step = 500  # images of an evaluation step

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        name: str,
        augment: str = "none",
        device: torch.device | str = "cpu",
        index: Tensor | None = None,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be ({len(images)},) int64, got {tuple(labels.shape)} {labels.dtype}")
        self.images, self.labels = images.to(device), labels.to(device)
        self.name, self.augment, self.index = name, augment, index

    def __len__(self) -> int:
        return len(self.labels)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int, rank: int, world: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, images (B, 3, H, W) uint8, labels (B,)) of an epoch's global batches from `start` on."""
        for number, index in list(enumerate(index_batches(len(self), batch_size, seed, epoch)))[start:]:
            index = index.to(self.images.device, non_blocking=True)
            images = self.images[index]
            if self.augment == "crop-flip":
                images = crop_and_flip(images, generator_for(seed, epoch, number, 1))
            yield number, images, self.labels[index]

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, images (B, 3, H, W) uint8, labels (B,)) in order, every world-th batch from rank on."""
        parts = list(zip(self.images.split(self.step), self.labels.split(self.step), strict=True))
        yield from ((number, *parts[number]) for number in range(rank, len(parts), world))

    def to(self, device: torch.device | str) -> ResidentImages:
        """A copy on another device."""
        return ResidentImages(self.images, self.labels, self.name, self.augment, device, self.index)

    def select(self, index: Tensor, augment: str | None = None) -> ResidentImages:
        """Some of the images, with this augmentation; None keeps the present one."""
        images, labels, device = self.images[index], self.labels[index], self.images.device
        return ResidentImages(images, labels, self.name, augment or self.augment, device, _composed(self.index, index))

    def record(self) -> dict:
        """Name, shape, checksum and, for a part, its class counts, for the run record."""
        content = hashlib.sha256(self.images.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes())
        found = {"name": self.name, "shape": list(self.images.shape), "sha256": content.hexdigest()[:16]}
        return found | _counted(self.index, self.labels)


def _composed(outer: Tensor | None, inner: Tensor) -> Tensor:
    inner = inner.cpu()
    return inner if outer is None else outer[inner]


def _counted(index: Tensor | None, labels: Tensor) -> dict:
    return {} if index is None else {"class_counts": labels.bincount().tolist()}


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random crop of the zero-padded images and horizontal flip, one draw per image: (B, 3, H, W) to the same."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n), generator=generator).to(images.device, non_blocking=True)
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device, non_blocking=True)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    padded = F.pad(images, [padding] * 4)
    sample, channel = torch.arange(n, device=images.device), torch.arange(3, device=images.device)
    return padded[
        sample[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


class ImageFiles:
    """Labelled image files read by worker processes.

    Args:
        paths: paths of the files.
        labels: (N,) int64.
        name: name in the run record.
        augment: a key of `TRANSFORMS`.
        device: device of the batches.
        num_workers: reading processes; None: one per core, at most eight.
        index: (N,) int64, position of each image in the full set; None: this is the full set.

    Attributes:
        skipped: files that `without_broken` left out.

    Raises:
        FileNotFoundError: files are missing; the message gives their number and the name of the first.
        ValueError: no images.
        BrokenFile: on reading, an image that cannot be decoded.
    """

    whole_batches = False  # a rank reads its own share only
    step = 250  # images of an evaluation step

    def __init__(
        self,
        paths: list[Path],
        labels: Tensor,
        name: str,
        augment: str = "none",
        device: torch.device | str = "cpu",
        num_workers: int | None = None,
        index: Tensor | None = None,
    ):
        if not paths:
            raise ValueError(f"{name} contains no images")
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} images of {name} are missing, first {missing[0]}")
        self.paths, self.labels, self.name, self.augment = paths, labels, name, augment
        self.device, self.index = torch.device(device), index
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.skipped: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int, rank: int, world: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, images (B / world, 3, 224, 224) uint8, labels) of this rank's share of every batch."""
        batches = index_batches(len(self), batch_size, seed, epoch)[start:]
        loaded = self._load([batch[rank::world].tolist() for batch in batches], seed, epoch)
        yield from ((number, images, labels) for number, (images, labels) in enumerate(loaded, start))

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, images (B, 3, 224, 224) uint8, labels (B,)) in order, every world-th batch from rank on."""
        parts = torch.arange(len(self)).split(self.step)[rank::world]
        loaded = self._load([part.tolist() for part in parts], 0, 0)
        yield from ((rank + world * i, images, labels) for i, (images, labels) in enumerate(loaded))

    def select(self, index: Tensor, augment: str | None = None) -> ImageFiles:
        """Some of the images, with this augmentation; None keeps the present one."""
        paths, index = [self.paths[i] for i in index.tolist()], index.cpu()
        place, augment = _composed(self.index, index), augment or self.augment
        return ImageFiles(paths, self.labels[index], self.name, augment, self.device, self.num_workers, place)

    def broken(self) -> dict[int, str]:
        """Decode every file completely; returns index and message of those that cannot be decoded."""
        checks = DataLoader(_Check(self.paths), batch_size=None, num_workers=self.num_workers)
        return {number: message for number, message in enumerate(checks) if message}

    def without_broken(self) -> ImageFiles:
        """The images that can be decoded; `skipped` holds the others."""
        broken = self.broken()
        kept = self.select(torch.tensor([i for i in range(len(self)) if i not in broken])) if broken else self
        kept.skipped = [self.paths[i] for i in broken]
        for message in broken.values():
            logger.warning("skipped: %s", message)
        return kept

    def _load(self, batches: list[list[int]], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        cuda = self.device.type == "cuda"
        reader = _Reader(self.paths, self.augment, seed, epoch)
        workers = min(self.num_workers, len(batches)) if len(batches) > 1 else 0  # not worth it for one batch
        for images, index in DataLoader(reader, batch_sampler=batches, num_workers=workers, pin_memory=cuda):
            yield images.to(self.device, non_blocking=True), self.labels[index].to(self.device, non_blocking=True)

    def record(self) -> dict:
        """Name, number of images, checksum of file names and labels and, for a part, its class counts."""
        lines = "\n".join(f"{path.name} {label}" for path, label in zip(self.paths, self.labels.tolist(), strict=True))
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        return {"name": self.name, "images": len(self), "sha256": digest} | _counted(self.index, self.labels)


class _Reader(Dataset):
    def __init__(self, paths: list[Path], augment: str, seed: int, epoch: int):
        self.paths, self.seed, self.epoch = paths, seed, epoch
        self.transform = v2.Compose([v2.ToImage(), *TRANSFORMS[augment]])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(self.seed, self.epoch, index).initial_seed())
            return self.transform(image), index


class _Check(Dataset):
    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        try:
            read_image(self.paths[index])
        except BrokenFile as error:
            return str(error)
        return ""


def image_folder(root: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels and class names of a folder with one folder per class, in alphabetical order.

    Hidden files and folders and files that are not images are skipped; images may be in subfolders of their class.

    Raises:
        FileNotFoundError: no such folder, or no folder in it.
        ValueError: a class without an image.
    """
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    classes = [name for name in classes if not name.startswith(".")]
    if not classes:
        raise FileNotFoundError(f"{root}: is not a folder with one folder of images per class")
    files = [image_files(root / name)[0] for name in classes]
    for name, found in zip(classes, files, strict=True):
        if not found:
            raise ValueError(f"{root / name}: a class without images; put some there, or move the folder away")
    labels = torch.tensor([label for label, found in enumerate(files) for _ in found], dtype=torch.int64)
    return [path for found in files for path in found], labels, classes
