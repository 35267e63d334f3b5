"""Images of a folder as batches for training and evaluation.

The order of an epoch and the augmentation of an image depend on the seed, the epoch and the image alone: on one
process or several, with any number of workers, after a resume in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared_utils.images import BrokenFile, read_image
from wsol_eval.metadata import Metadata, read_metadata
from wsol_eval.pixels import merge_masks

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("wsol-eval")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZED, CROP = 256, 224
FEW = 8  # batches: fewer are decoded without worker processes
UNTURN = {  # EXIF orientations that swap width and height, and what undoes them
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Batch:
    """Images for evaluation, with their ground truth in pixels of the score map."""

    images: Tensor
    labels: Tensor
    image_ids: list[str]
    boxes: list[np.ndarray] | None
    masks: np.ndarray | None


class Source(Protocol):
    """What training and evaluation need of a split."""

    num_classes: int
    resolution: int
    has_masks: bool
    has_boxes: bool
    skipped: set[str]

    def __len__(self) -> int: ...

    def training(self, batch_size: int, seed: int, epoch: int, first: int, fabric: Fabric, dense: bool) -> Iterator:
        """Batches (images, labels) from number `first` on; with `dense` targets (B, H, W) in place of labels."""

    def evaluation(self, batch_size: int, fabric: Fabric) -> Iterator[Batch]:
        """Each image once, over all ranks."""

    def subset(self, chosen: np.ndarray) -> Source:
        """The images of these indices."""

    def checksum(self) -> str:
        """16 hex digits: the same for the same images, labels, boxes and masks."""


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, rank: int, ranks: int) -> list[np.ndarray]:
    """Indices of this rank's share of each global batch; a last batch too small for all ranks is left out."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    parts = [order[begin : begin + batch_size] for begin in range(0, count, batch_size)]
    return [part[rank::ranks] for part in parts if len(part) >= ranks]


def num_batches(count: int, batch_size: int, ranks: int) -> int:
    """Length of `epoch_batches`."""
    return count // batch_size + (count % batch_size >= ranks)


class WSOLDataset(Dataset):
    """Images of a split with labels: (image (3, 224, 224) float32, label, image id).

    Args:
        data_root: folder that the image ids are relative to.
        metadata_root: folder with one folder of metadata per split; or the metadata of this split.
        split: train (train-weaksup), val (train-fullsup) or test.
        full_supervision_per_class: of val, only so many images per class.
        sample_seed: of that choice alone; it does not follow the training seed.
        proxy: the smaller training set of image_ids_proxy.txt.
        cache: folder for 256 x 256 copies of the images, so that each is decoded once.
        skip_broken: leave unreadable images out, with a warning, instead of ending; `skipped` holds what was said.

    Raises:
        FileNotFoundError, ValueError: missing or malformed metadata.
    """

    skipped: set[str]

    def __init__(
        self,
        data_root: str | Path,
        metadata_root: str | Path | Metadata,
        split: str,
        *,
        full_supervision_per_class: int | None = None,
        sample_seed: int = 0,
        proxy: bool = False,
        cache: str | Path | None = None,
        skip_broken: bool = False,
    ):
        if split not in ("train", "val", "test"):
            raise ValueError(f"split: expected train, val or test, got {split!r}")
        self.data_root, self.split, self.skip_broken, self.skipped = Path(data_root), split, skip_broken, set()
        self._checksum = ""
        if not isinstance(metadata_root, Metadata):
            metadata_root = read_metadata(Path(metadata_root) / split)
        self.metadata = metadata_root
        self.image_ids = self.metadata.image_ids
        if proxy and split == "train":
            if not self.metadata.proxy_ids:
                raise FileNotFoundError(
                    f"{data_root}, {split}: no image_ids_proxy.txt, so no proxy set; leave --proxy out"
                )
            self.image_ids = self.metadata.proxy_ids
        if full_supervision_per_class and split == "val":
            self.image_ids = self.metadata.sample(full_supervision_per_class, sample_seed)
        self._cache = None
        if cache is not None:
            name = f"{split}-{hashlib.sha256(chr(10).join(self.image_ids).encode()).hexdigest()[:12]}"
            self._cache = ImageCache(Path(cache) / name, len(self.image_ids))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """The image as evaluation sees it: 224 x 224, normalised."""
        return (
            to_input(self.load(index, CROP)),
            self.metadata.class_labels[self.image_ids[index]],
            self.image_ids[index],
        )

    def load(self, index: int, side: int) -> np.ndarray:
        """An image as (side, side, 3) uint8, aspect ignored. BrokenFile for one that is missing or broken."""
        if self._cache is not None and side == RESIZED:
            return self._cache.get(index, lambda: self._decode(index, side))
        return self._decode(index, side)

    def mask(self, index: int, side: int = CROP) -> np.ndarray:
        """Foreground 1, background 0, ignored 255: (side, side) uint8."""
        return read_mask(self.metadata, self.image_ids[index], self.data_root, side)

    def checksum(self) -> str:
        """Of ids, labels, sizes in bytes, boxes and names of masks; BrokenFile for an image that is not there."""
        if self._checksum:
            return self._checksum
        digest, metadata = hashlib.sha256(), self.metadata
        for name in self.image_ids:
            try:
                size = os.stat(self.data_root / name).st_size
            except FileNotFoundError:
                if not self.skip_broken:
                    raise BrokenFile(_missing(self.data_root / name)) from None
                size = -1
            boxes = metadata.boxes[name].tolist() if name in metadata.boxes else None
            digest.update(repr((name, metadata.class_labels[name], size, boxes, metadata.masks.get(name))).encode())
        self._checksum = digest.hexdigest()[:16]
        return self._checksum

    def _decode(self, index: int, side: int) -> np.ndarray:
        name = self.image_ids[index]
        image = read_annotated(self.data_root / name, self.metadata.image_sizes.get(name))
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _missing(path: Path) -> str:
    return f"{path}: no such image; `wsol-eval data verify` lists all that are missing"


def read_annotated(path: Path, size: tuple[int, int] | None) -> Image.Image:
    """An RGB image in the orientation that its annotations mean.

    EXIF turns it as a viewer does, unless the metadata give the size of the unturned file: then boxes were drawn on
    that, as in ImageNet.

    Raises:
        BrokenFile: there is no such file, or it cannot be read to its end.
    """
    try:
        image = read_image(path)
    except FileNotFoundError:
        raise BrokenFile(_missing(path)) from None
    if size is not None and image.size != size == image.size[::-1]:
        with Image.open(path) as stored:
            back = UNTURN.get(stored.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if back is None else image.transpose(back)
    return image


class ImageCache:
    """Resized images in one file; a second one says which are there."""

    def __init__(self, folder: Path, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._images = _memmap(folder / "images.u8", (count, RESIZED, RESIZED, 3))
        self._there = _memmap(folder / "there.u8", (count,))

    def get(self, index: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The image, decoded and stored when it is asked for first."""
        if not self._there[index]:
            self._images[index] = decode()
            self._there[index] = 1  # after the pixels: a kill in between leaves it to be decoded again
        return np.array(self._images[index])


def _memmap(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=shape)


def load_mask(path: str | Path, side: int | None = CROP) -> np.ndarray:
    """A mask image as (side, side) bool: OpenCV's nearest resize, then grey > 0.5; with None at its own size.

    OpenCV takes pixel floor(i * (1 / (side / size))), in float64: at some sizes not the same as floor(i * size / side).

    Transparency is not looked at, as OpenCV does not.

    Raises:
        BrokenFile: no such file, or one that cannot be read to its end.
    """
    if not Path(path).is_file():
        raise BrokenFile(f"{path}: no such mask; `wsol-eval data verify` lists all that are missing")
    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BrokenFile(f"{path}: the mask cannot be read ({error}); replace the file") from None
    if side is None:
        return grey > 0
    rows, columns = (_nearest(extent, side) for extent in grey.shape)
    return grey[rows][:, columns] > 0


def _nearest(extent: int, side: int) -> np.ndarray:
    return np.minimum((np.arange(side) * (1 / (side / extent))).astype(np.int64), extent - 1)


def read_mask(metadata: Metadata, image_id: str, root: Path, side: int | None = CROP) -> np.ndarray:
    """All instances of an image in one mask, see `merge_masks`. ValueError for an image without masks.

    With `side` None the masks keep their own size, which must be the same for all of an image.
    """
    if image_id not in metadata.masks:
        raise ValueError(f"image {image_id!r} has no mask in the metadata")
    paths, ignore = metadata.masks[image_id]
    instances = [load_mask(Path(root) / path, side) for path in paths]
    ignored = load_mask(Path(root) / ignore, side) if ignore else None
    if len({each.shape for each in [*instances, *([] if ignored is None else [ignored])]}) > 1:
        raise ValueError(f"image {image_id!r}: its masks have different sizes; score it without --native")
    return merge_masks(instances, ignored)


def to_input(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32, normalised by ImageNet's mean and deviation."""
    tensor = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1).float() / 255
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


class FolderSource:
    """A `WSOLDataset` as batches, decoded by worker processes.

    Args:
        dataset: the split.
        workers: processes that decode.
    """

    resolution = CROP

    def __init__(self, dataset: WSOLDataset, workers: int = 4, chosen: np.ndarray | None = None):
        self.dataset, self.workers = dataset, workers
        self.chosen = np.arange(len(dataset)) if chosen is None else chosen
        self.num_classes = dataset.metadata.num_classes
        self.has_masks, self.has_boxes = bool(dataset.metadata.masks), bool(dataset.metadata.boxes)
        self.skipped = dataset.skipped

    def __len__(self) -> int:
        return len(self.chosen)

    def training(self, batch_size: int, seed: int, epoch: int, first: int, fabric: Fabric, dense: bool) -> Iterator:
        batches = epoch_batches(len(self), batch_size, seed, epoch, fabric.global_rank, fabric.world_size)
        sample = partial(self._augmented, seed=seed, epoch=epoch, dense=dense)
        for images, labels in self._loader(sample, batches[first:], fabric):
            yield images.to(fabric.device, non_blocking=True), labels.to(fabric.device, non_blocking=True)

    def evaluation(self, batch_size: int, fabric: Fabric) -> Iterator[Batch]:
        mine = np.arange(len(self))[fabric.global_rank :: fabric.world_size]
        batches = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
        for images, labels, places in self._loader(self._plain, batches, fabric):
            names = [self.dataset.image_ids[place] for place in places.tolist()]
            boxes = masks = None
            if self.has_boxes:
                boxes = [self.dataset.metadata.boxes_at(name, self.resolution) for name in names]
            if self.has_masks:
                masks = np.stack([self.dataset.mask(place) for place in places.tolist()])
            yield Batch(images.to(fabric.device, non_blocking=True), labels.to(fabric.device), names, boxes, masks)

    def _plain(self, place: int) -> tuple[Tensor, int, int]:
        image, label, _ = self.dataset[place]
        return image, label, place

    def _augmented(self, place: int, seed: int, epoch: int, dense: bool) -> tuple[Tensor, int | Tensor]:
        """256 x 256, random crop 224, random flip; dense targets take the same crop and flip."""
        rng = np.random.default_rng([seed, epoch, place])
        top, left = rng.integers(0, RESIZED - CROP + 1, 2)
        step = -1 if rng.random() < 0.5 else 1

        def augment(array: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(array[top : top + CROP, left : left + CROP][:, ::step])

        image = to_input(augment(self.dataset.load(place, RESIZED)))
        if dense:
            return image, torch.from_numpy(augment(self._target(place)))
        return image, self.dataset.metadata.class_labels[self.dataset.image_ids[place]]

    def _target(self, place: int) -> np.ndarray:
        """The mask, or else the boxes filled as foreground: (256, 256) uint8."""
        if self.has_masks:
            return self.dataset.mask(place, RESIZED)
        target = np.zeros((RESIZED, RESIZED), np.uint8)
        for x0, y0, x1, y1 in self.dataset.metadata.boxes_at(self.dataset.image_ids[place], RESIZED):
            target[y0 : y1 + 1, x0 : x1 + 1] = 1
        return target

    def subset(self, chosen: np.ndarray) -> FolderSource:
        return FolderSource(self.dataset, self.workers, self.chosen[chosen])

    def checksum(self) -> str:
        return self.dataset.checksum()

    def _loader(self, sample: Callable[[int], tuple], batches: list[np.ndarray], fabric: Fabric) -> Iterator:
        workers = self.workers if len(batches) > FEW else 0
        loader = DataLoader(
            _View(self, sample),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=workers,
            pin_memory=fabric.device.type == "cuda",
            collate_fn=collate,
            prefetch_factor=4 if workers else None,
        )
        for batch, broken in loader:
            for message in broken:
                if message not in self.dataset.skipped:
                    logger.warning("left out: %s", message)
                    self.dataset.skipped.add(message)
            if batch is not None:
                yield batch


def collate(samples: list[tuple | str]) -> tuple[list[Tensor] | None, list[str]]:
    """Samples stacked (None where there are none), and the messages that stand for broken files."""
    kept = [sample for sample in samples if not isinstance(sample, str)]
    broken = [sample for sample in samples if isinstance(sample, str)]
    return torch.utils.data.default_collate(kept) if kept else None, broken


class _View(Dataset):
    """Index of the source -> what `sample` makes of that image, or the message of a broken one to be left out."""

    def __init__(self, source: FolderSource, sample: Callable[[int], tuple]):
        self.source, self.sample = source, sample

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple | str:
        try:
            return self.sample(int(self.source.chosen[index]))
        except BrokenFile as error:
            if not self.source.dataset.skip_broken:
                raise
            return str(error)
