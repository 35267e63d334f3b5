"""Image files as a training or test set: shared by ImageNet-9, ImageNet-A and ImageNet-C.

Every augmentation is drawn from a generator seeded by (seed, epoch, index): it depends neither on the number of
workers nor on where a killed run resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rebias.data.dataset import Reading
from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger

logger = get_logger("rebias")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_TRANSFORM = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
TEST_TRANSFORM = [v2.Resize(256), v2.CenterCrop(224)]


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """One 63-bit seed per sample and epoch."""
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class ImageFiles:
    """Labelled image files read by worker processes.

    Args:
        root: folder of the files.
        names: their paths below it.
        labels: (n,) int64.
        name: name in the run record.
        augment: random crop and flip of training; else resize to 256 and crop the centre.
        seed: seed of the augmentation.
        device: device of the batches.
        reading: workers, and whether images that cannot be decoded are dropped.
        bias: (n,) int64 bias labels, if known.

    Attributes:
        skipped: names of the images that were dropped.

    Raises:
        FileNotFoundError: files are missing; the message gives their number and the name of the first.
        BrokenFile: on reading, if an image cannot be decoded; names it.
    """

    def __init__(
        self,
        root: str | Path,
        names: list[str],
        labels: Tensor,
        name: str,
        *,
        augment: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        reading: Reading = Reading(),  # noqa: B008  frozen
        bias: Tensor | None = None,
    ):
        missing = [each for each in names if not (Path(root) / each).is_file()]
        if missing:
            raise FileNotFoundError(f"{root}: {len(missing)} of {len(names)} images are missing, first {missing[0]}")
        self.root, self.names, self.labels, self.name = Path(root), names, labels, name
        self.transform = v2.Compose([v2.ToImage(), *(TRAIN_TRANSFORM if augment else TEST_TRANSFORM)])
        self.seed, self.device, self.num_workers = seed, torch.device(device), reading.num_workers
        self.skipped: list[str] = []
        self.bias = bias
        if reading.skip_broken:
            broken = self.broken()
            self.skipped = [names[number] for number in broken]
            kept = [number for number in range(len(names)) if number not in broken]
            self.names, self.labels = [names[number] for number in kept], labels[kept]
            self.bias = None if bias is None else bias[kept]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """One image (3, 224, 224) float32, its label, and its bias label if known."""
        item = normalized(self.read(0, index)), int(self.labels[index])
        return item if self.bias is None else (*item, int(self.bias[index]))

    def to(self, device: torch.device | str) -> ImageFiles:
        """Set the device of the batches; returns itself."""
        self.device = torch.device(device)
        return self

    def read(self, epoch: int, index: int) -> Tensor:
        """One cropped image (3, 224, 224) uint8: a worker sends bytes four times faster than floats."""
        return self.transform(read_image(self.root / self.names[index]))

    def broken(self) -> dict[int, str]:
        """Decode every image completely: see `broken_files`."""
        return broken_files(read_image, [self.root / name for name in self.names], self.num_workers)

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: channels-last images (B, 3, 224, 224) float32 and targets (B,)."""
        for images, index in loaded(self.read, self.seed, index_batches, epoch, self.num_workers, self.device):
            images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield normalized(images), self.labels[index].to(self.device, non_blocking=True)

    def record(self) -> dict:
        """Name, number of images and checksum of the sorted file names and labels, for the run record."""
        record = {"name": self.name, "images": len(self), "sha256": digest_of(self.names, self.labels)}
        return record | ({"skipped": self.skipped} if self.skipped else {})


def normalized(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 to the float32 that the networks take, allocating one tensor."""
    mean, std = (255 * torch.tensor(each, device=images.device)[:, None, None] for each in (MEAN, STD))
    return images.float().sub_(mean).div_(std)


def loaded(
    read: Callable[[int, int], Tensor],
    seed: int,
    index_batches: Iterable[Tensor],
    epoch: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run `read(epoch, index)` in workers over batches of indices: (samples (B, ...), index (B,))."""
    loader = DataLoader(
        _Reader(read, seed, epoch),
        batch_sampler=[batch.tolist() for batch in index_batches],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    yield from loader


def broken_files(read: Callable[[Path], Any], paths: Sequence[Path], workers: int) -> dict[int, str]:
    """Read every file; returns the indices of those that raise BrokenFile with the message, which is also logged."""

    def reason(path: Path) -> str:
        try:
            read(path)
        except BrokenFile as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        found = {number: line for number, line in enumerate(pool.map(reason, paths)) if line}
    for line in found.values():
        logger.warning(line)
    return found


def digest_of(names: list[str], labels: Tensor) -> str:
    """16 hex digits over names and labels."""
    lines = "\n".join(f"{name} {label}" for name, label in zip(names, labels.tolist(), strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


class _Reader(Dataset):
    def __init__(self, read: Callable[[int, int], Tensor], seed: int, epoch: int):
        self.read, self.seed, self.epoch = read, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.seed, self.epoch, index))  # CPU only: 1 ms less
            return self.read(self.epoch, index), index
