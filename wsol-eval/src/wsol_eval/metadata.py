"""The reference's metadata: plain CSV files without header, one folder per split.

    image_ids.txt      id (a path)                  class_labels.txt  id,class
    image_sizes.txt    id,width,height              localization.txt  id,x0,y0,x1,y1 (repeated for more boxes)
    image_ids_proxy.txt  a smaller training set                       or id,mask path,ignore path (masks)

Boxes are x0,y0,x1,y1 with both ends inside, NOT x,y,width,height.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsol_eval.boxes import check_boxes, resize_boxes


@dataclass(frozen=True)
class Metadata:
    """One split."""

    image_ids: list[str]
    class_labels: dict[str, int]
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """width, height"""
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    """(k, 4) int64 in pixels of the image"""
    masks: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    """paths of the instances' masks, and of the ignored region ("" for none)"""
    proxy_ids: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return max(self.class_labels.values()) + 1

    def boxes_at(self, image_id: str, size: int | tuple[int, int]) -> np.ndarray:
        """Boxes of an image in pixels of its score map. ValueError for an unknown id."""
        for known, what in ((self.boxes, "boxes"), (self.image_sizes, "size")):
            if image_id not in known:
                raise ValueError(f"image {image_id!r} has no {what} in the metadata")
        return resize_boxes(self.boxes[image_id], self.image_sizes[image_id], size)

    def sample(self, per_class: int, seed: int = 0) -> list[str]:
        """Ids of `per_class` images of each class, drawn without replacement by a generator of their own.

        A class with fewer gives all that it has: CUBV2 has 3 to 6 per class, and the paper's 5 is their mean.
        """
        rng = np.random.default_rng(seed)
        groups: dict[int, list[str]] = {}
        for name in self.image_ids:
            groups.setdefault(self.class_labels[name], []).append(name)
        chosen = set()
        for _, names in sorted(groups.items()):
            chosen |= set(rng.choice(names, min(per_class, len(names)), replace=False).tolist())
        return [name for name in self.image_ids if name in chosen]


def read_metadata(folder: str | Path) -> Metadata:
    """Read and check the metadata of one split.

    Raises:
        FileNotFoundError: no image_ids.txt or class_labels.txt.
        ValueError: a malformed line (file and number), an id without class, an id that appears twice.
    """
    folder = Path(folder)
    ids = [row[0] for _, row in rows_of(folder / "image_ids.txt", (1,))]
    labels = {row[0]: whole_number(row[1], where) for where, row in rows_of(folder / "class_labels.txt", (2,))}
    repeated = [name for name, times in Counter(ids).items() if times > 1]
    if repeated or not ids:
        raise ValueError(
            f"{folder / 'image_ids.txt'}: " + (f"{repeated[0]!r} is listed twice" if ids else "it lists no image")
        )
    missing = [name for name in ids if name not in labels]
    if missing:
        raise ValueError(f"{folder / 'class_labels.txt'}: {missing[0]!r} has no class")
    sizes = {}
    for where, row in rows_of(folder / "image_sizes.txt", (3,), optional=True):
        sizes[row[0]] = (whole_number(row[1], where), whole_number(row[2], where))
    boxes, masks = read_localization(folder / "localization.txt")
    proxy = [row[0] for _, row in rows_of(folder / "image_ids_proxy.txt", (1,), optional=True)]
    return Metadata(ids, labels, sizes, boxes, masks, proxy)


def read_localization(path: Path) -> tuple[dict, dict]:
    """Boxes and masks by image id, one of them empty."""
    boxes: dict[str, list] = {}
    masks: dict[str, tuple[list[str], str]] = {}
    for where, row in rows_of(path, (3, 5), optional=True):
        if len(row) == 5:
            boxes.setdefault(row[0], []).append([whole_number(value, where) for value in row[1:]])
        elif row[0] in masks:
            masks[row[0]][0].append(row[1])
        else:
            masks[row[0]] = ([row[1]], row[2])
    if boxes and masks:
        raise ValueError(f"{path}: expected boxes or masks, found both")
    return {name: check_boxes(np.array(each), f"{path}, {name}") for name, each in boxes.items()}, masks


def rows_of(path: Path, widths: tuple[int, ...], optional: bool = False) -> Iterable[tuple[str, list[str]]]:
    """Place and values of each line; ValueError for a line with another number of values."""
    if not path.is_file():
        if optional:
            return
        raise FileNotFoundError(f"{path}: no such metadata file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = line.split(",")
        if len(row) not in widths:
            expected = " or ".join(map(str, widths))
            raise ValueError(f"{path}, line {number}: expected {expected} values, got {line!r}")
        yield f"{path}, line {number}", row


def whole_number(value: str, where: str) -> int:
    """ValueError naming the place where it is none."""
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{where}: expected a whole number, got {value!r}") from None


def write_metadata(metadata: Metadata, folder: str | Path) -> None:
    """Write a split in the reference's format."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = metadata.image_ids
    lines = {
        "image_ids.txt": ids,
        "class_labels.txt": [f"{name},{metadata.class_labels[name]}" for name in ids],
        "image_sizes.txt": [f"{name},{w},{h}" for name, (w, h) in metadata.image_sizes.items()],
        "localization.txt": [
            *(f"{name},{','.join(map(str, box))}" for name, each in metadata.boxes.items() for box in each.tolist()),
            *(
                f"{name},{path},{'' if i else ignore}"
                for name, (paths, ignore) in metadata.masks.items()
                for i, path in enumerate(paths)
            ),
        ],
    }
    if metadata.proxy_ids:
        lines["image_ids_proxy.txt"] = metadata.proxy_ids
    for name, each in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in each), encoding="utf-8")
