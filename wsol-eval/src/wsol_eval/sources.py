"""A split of a data set by its name: cut-outs in memory, or images of a folder; and what a run needs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shared_utils.preflight import Need
from wsol_eval import cutouts, kangaroo_raccoon
from wsol_eval.cutouts import CLASSES, DATASETS, SIDE, Cutouts, make_split
from wsol_eval.data import Batch, FolderSource, Source, WSOLDataset, epoch_batches
from wsol_eval.recipe import OnData

if TYPE_CHECKING:
    from lightning.fabric import Fabric

FULL_SUPERVISION = {"OpenImages": 5} | dict.fromkeys(DATASETS, 5)  # images per class; of other sets all
PAPER_IMAGES = {  # train-weaksup, train-fullsup, test
    "CUB": (5_994, 1_000, 5_794),
    "ILSVRC": (1_281_167, 10_000, 50_000),
    "OpenImages": (29_819, 500, 5_000),
}
SPLITS = ("train", "val", "test")


def source_of(on: OnData, split: str, proxy: bool = False) -> Source:
    """A split: train (train-weaksup), val (train-fullsup) or test.

    Raises:
        FileNotFoundError, ValueError: data or metadata that are missing or malformed.
    """
    per_class = on.per_class or FULL_SUPERVISION.get(on.dataset)
    if on.dataset in DATASETS:
        kind = DATASETS[on.dataset]
        count = {"train": kind.train, "val": (per_class or 1) * CLASSES, "test": kind.test}[split]
        return MemorySource(make_split(split, count, on.seed, on.dataset, on.data_root), split)
    ours = on.dataset == kangaroo_raccoon.DATASET
    dataset = WSOLDataset(
        on.data_root if ours else on.data_root / on.dataset,
        kangaroo_raccoon.split_metadata(on.data_root)[split] if ours else on.data_root / "metadata" / on.dataset,
        split,
        full_supervision_per_class=per_class,
        proxy=proxy,
        cache=on.cache,
        skip_broken=on.skip_broken,
    )
    return FolderSource(dataset, on.workers)


def sources_of(on: OnData) -> dict[str, Source]:
    """train, val and test; and proxy, where the set has a smaller training set for the search."""
    found = {split: source_of(on, split) for split in SPLITS}
    train = found["train"]
    if isinstance(train, FolderSource) and train.dataset.metadata.proxy_ids:
        found["proxy"] = source_of(on, "train", proxy=True)
    return found


def smaller_than_the_papers(dataset: str, counts: dict[str, int]) -> list[str]:
    """A phrase for each split that has not the paper's size."""
    return [
        f"{counts[split]:,} of the paper's {wanted:,} {split} images"
        for split, wanted in zip(SPLITS, PAPER_IMAGES.get(dataset, ()), strict=False)
        if split in counts and counts[split] != wanted
    ]


def needs_of(on: OnData, splits: tuple[str, ...] = SPLITS) -> Iterator[Need]:
    """All files of a data set: metadata, and each image and mask that they name."""
    if on.dataset in DATASETS:
        if DATASETS[on.dataset].downloaded:
            root = on.data_root
            yield Need(f"MNIST ({root / 'MNIST' / 'raw'})", cutouts.MNIST_REMEDY, (root / "MNIST" / "raw").is_dir())
            archive = root / cutouts.ARCHIVE
            yield Need(f"CIFAR-10 as JPEG ({archive})", cutouts.CIFAR_REMEDY, archive.is_file())
        return
    if on.dataset == kangaroo_raccoon.DATASET:
        yield kangaroo_raccoon.clones_needed(on.data_root)
        return
    for split in splits:
        folder = on.data_root / "metadata" / on.dataset / split
        what, there = f"metadata of {on.dataset}, {split} ({folder})", (folder / "image_ids.txt").is_file()
        yield Need(what, METADATA_REMEDY, there)
        if there:
            source = source_of(replace(on, cache=None), split)
            assert isinstance(source, FolderSource)
            yield _files(source.dataset, f"{on.dataset}, {split}")


def _files(dataset: WSOLDataset, what: str) -> Need:
    wanted = list(dataset.image_ids)
    if dataset.split != "train":
        every = (dataset.metadata.masks.get(name, ([], "")) for name in dataset.image_ids)
        wanted += [path for paths, ignore in every for path in [*paths, ignore] if path]
    absent = [name for name in wanted if not (dataset.data_root / name).is_file()]
    if not absent:
        return Need(what, "", True)
    missing = f"{len(absent):,} of {len(wanted):,} files of {what}, such as {dataset.data_root / absent[0]}"
    return Need(missing, "put them there; `wsol-eval data verify` lists them all", False)


METADATA_REMEDY = "copy metadata/ of clovaai/wsolevaluation there, or `wsol-eval data build-metadata` for your own set"


class MemorySource:
    """Cut-outs, copied to the device once. Training on dense targets mirrors them; a mirrored digit is no digit."""

    num_classes, resolution, has_masks, has_boxes = CLASSES, SIDE, True, True

    def __init__(self, images: Cutouts, name: str = "image"):
        self.images, self.name, self.skipped = images, name, set[str]()
        self._here: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images.boxes)

    def _resident(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if self._here is None or self._here[0].device != device:
            parts = (self.images.images, self.images.labels, torch.from_numpy(_filled(self.images)))
            images, labels, targets = (part.to(device) for part in parts)
            self._here = images, labels, targets
        return self._here

    def training(self, batch_size: int, seed: int, epoch: int, first: int, fabric: Fabric, dense: bool) -> Iterator:
        images, labels, targets = self._resident(fabric.device)
        rank, ranks = fabric.global_rank, fabric.world_size
        for number, chosen in enumerate(epoch_batches(len(self), batch_size, seed, epoch, rank, ranks)):
            if number < first:
                continue
            index = torch.from_numpy(chosen).to(fabric.device)
            if not dense:
                yield images[index], labels[index]
                continue
            x, y = images[index], targets[index]
            for axis, flip in zip((-1, -2), np.random.default_rng([seed, epoch, number]).random(2) < 0.5, strict=True):
                if flip:
                    x, y = x.flip(axis), y.flip(axis)
            yield x, y

    def evaluation(self, batch_size: int, fabric: Fabric) -> Iterator[Batch]:
        images, labels, _ = self._resident(fabric.device)
        mine = np.arange(len(self))[fabric.global_rank :: fabric.world_size]
        for begin in range(0, len(mine), batch_size):
            chosen = mine[begin : begin + batch_size]
            names = [f"{self.name} {i}" for i in chosen]
            boxes = [self.images.boxes[i] for i in chosen]
            yield Batch(images[chosen], labels[chosen], names, boxes, self.images.masks[chosen])

    def subset(self, chosen: np.ndarray) -> MemorySource:
        return MemorySource(self.images[chosen], self.name)

    def checksum(self) -> str:
        parts = (self.images.images.numpy(), self.images.labels.numpy(), self.images.masks)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def _filled(cutouts: Cutouts) -> np.ndarray:
    """FSL's targets on box data: every pixel of the box is foreground, (N, H, W) uint8."""
    targets = np.zeros_like(cutouts.masks)
    for target, boxes in zip(targets, cutouts.boxes, strict=True):
        for x0, y0, x1, y1 in boxes:
            target[y0 : y1 + 1, x0 : x1 + 1] = 1
    return targets
