"""The verbs below `data`: what is there, is it whole, and how to make metadata, weights and tiny archives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from wsol_eval.recipe import default_data_root


@dataclass
class DataList:
    """What is needed, where it is looked for, and what is there."""

    data_root: Path = field(default_factory=default_data_root)
    """Where to look."""
    tiny: Path | None = None
    """Write small archives in the real layout to this folder instead: what your own must look like."""

    def __call__(self) -> None:
        if self.tiny is not None:
            from wsol_eval.tiny import write

            print(write(self.tiny))
            return
        from rich.table import Table as Grid

        from shared_utils.logging import console
        from wsol_eval.inventory import inventory

        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)
        console().print("To check what is there: wsol-eval data verify --data-root ... --metadata-root ... --split ...")


@dataclass
class Verify:
    """Decode every image and mask of a split, and check sizes and boxes. Ends with 1 where something is wrong."""

    data_root: Path
    """Folder that image ids are relative to."""
    metadata_root: Path
    """Folder with a folder of metadata per split."""
    split: Literal["train", "val", "test"] = "val"
    """Which one."""
    workers: int = 0
    """Processes that decode; 0: one per core."""

    def __call__(self) -> None:
        from wsol_eval.metadata import read_metadata
        from wsol_eval.verify import verify

        metadata = read_metadata(self.metadata_root / self.split)
        problems = verify(metadata, self.data_root, self.workers)
        for line in problems:
            print(line)
        if problems:
            raise RuntimeError(f"problems found: {len(problems)}, among {len(metadata.image_ids)} images")
        annotated = f"{len(metadata.boxes)} with boxes, {len(metadata.masks)} with masks"
        print(f"{len(metadata.image_ids)} images of {metadata.num_classes} classes, {annotated}: nothing is wrong")


@dataclass
class BuildMetadata:
    """Write the metadata of your own set from a folder per class, and boxes or masks.

    Where data_root holds train/, val/ and test/ with a folder per class in each, all of these splits are written.
    """

    data_root: Path
    """One folder of images per class, or one folder per split with these in it: what `train` gets as the data set."""
    annotations: Path
    """CSV of id,x0,y0,x1,y1 or id,mask,ignore (ids are paths under data_root); COCO's .json; a folder of VOC's .xml."""
    output: Path
    """Folder to write: DATA_ROOT/metadata/<name of the set>, or <split> below it for one split."""
    box_format: Literal["xyxy", "xywh"] = "xyxy"
    """Of a CSV; xyxy: both ends inside the object."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order, where this split lacks some."""
    skip_broken: bool = False
    """Leave images out that cannot be read; each is named."""

    def __call__(self) -> None:
        from wsol_eval.build import build_metadata
        from wsol_eval.metadata import write_metadata

        options = (self.box_format, list(self.classes) or None, self.skip_broken)
        built = build_metadata(self.data_root, self.annotations, *options)
        for split, metadata in built.items():
            folder = self.output / split if split else self.output
            write_metadata(metadata, folder)
            print(f"{len(metadata.image_ids)} images of {metadata.num_classes} classes in {folder}")


@dataclass
class Weights:
    """Put torchvision's ImageNet weights where the tables look for them, checked by hash."""

    archs: tyro.conf.Positional[tuple[str, ...]] = ("vgg16", "inception_v3", "resnet50")
    """Which networks."""
    data_root: Path = field(default_factory=default_data_root)
    """They go to weights/<arch>.pth there."""

    def __call__(self) -> None:
        from wsol_eval.models.build import save_weights

        for arch in self.archs:
            print(save_weights(arch, self.data_root / "weights" / f"{arch}.pth"))


DATA_VERBS = {"list": DataList, "verify": Verify, "build-metadata": BuildMetadata, "weights": Weights}
