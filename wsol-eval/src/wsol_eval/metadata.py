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
        ValueError: a malformed line (file and number), an id without class, an id that stands twice.
    """
    folder = Path(folder)
    ids = [row[0] for _, row in _rows(folder / "image_ids.txt", (1,))]
    labels = {row[0]: _whole(row[1], where) for where, row in _rows(folder / "class_labels.txt", (2,))}
    repeated = [name for name, times in Counter(ids).items() if times > 1]
    if repeated or not ids:
        raise ValueError(f"{folder / 'image_ids.txt'}: " + (f"{repeated[0]!r} stands twice" if ids else "no image"))
    missing = [name for name in ids if name not in labels]
    if missing:
        raise ValueError(f"{folder / 'class_labels.txt'}: no class of {missing[0]!r}")
    sizes = {}
    for where, row in _rows(folder / "image_sizes.txt", (3,), optional=True):
        sizes[row[0]] = (_whole(row[1], where), _whole(row[2], where))
    boxes, masks = _localization(folder / "localization.txt")
    proxy = [row[0] for _, row in _rows(folder / "image_ids_proxy.txt", (1,), optional=True)]
    return Metadata(ids, labels, sizes, boxes, masks, proxy)


def _localization(path: Path) -> tuple[dict, dict]:
    boxes: dict[str, list] = {}
    masks: dict[str, tuple[list[str], str]] = {}
    for where, row in _rows(path, (3, 5), optional=True):
        if len(row) == 5:
            boxes.setdefault(row[0], []).append([_whole(value, where) for value in row[1:]])
        elif row[0] in masks:
            masks[row[0]][0].append(row[1])
        else:
            masks[row[0]] = ([row[1]], row[2])
    if boxes and masks:
        raise ValueError(f"{path}: boxes or masks were expected, both were found")
    return {name: check_boxes(np.array(each), f"{path}, {name}") for name, each in boxes.items()}, masks


def _rows(path: Path, widths: tuple[int, ...], optional: bool = False) -> Iterable[tuple[str, list[str]]]:
    if not path.is_file():
        if optional:
            return
        raise FileNotFoundError(f"{path}: no such metadata file")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = line.split(",")
        if len(row) not in widths:
            expected = " or ".join(map(str, widths))
            raise ValueError(f"{path}, line {number}: {expected} values were expected, got {line!r}")
        yield f"{path}, line {number}", row


def _whole(value: str, where: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{where}: a whole number was expected, got {value!r}") from None


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
        (folder / name).write_text("".join(f"{line}\n" for line in each))


def verify(metadata: Metadata, data_root: str | Path) -> list[str]:
    """What is wrong with a split on disk, one line each; empty when all is well.

    Looks for missing files, sizes that differ from the image's, images without boxes or masks, boxes that end
    outside their image, and boxes that look like x,y,width,height.
    """
    from PIL import Image

    root, problems = Path(data_root), []
    for name in metadata.image_ids:
        if not (root / name).is_file():
            problems.append(f"{name}: no such file under {root}")
            continue
        if name in metadata.image_sizes:
            with Image.open(root / name) as image:
                if image.size != metadata.image_sizes[name]:
                    problems.append(f"{name}: the metadata says {metadata.image_sizes[name]}, the image {image.size}")
    if metadata.boxes:
        problems += [f"{name}: no box" for name in metadata.image_ids if name not in metadata.boxes]
        problems += _outside(metadata)
    for name, (paths, ignore) in metadata.masks.items():
        problems += [f"{name}: no mask {path} under {root}" for path in [*paths, ignore] if path and
                     not (root / path).is_file()]  # fmt: skip
    return problems


def _outside(metadata: Metadata) -> list[str]:
    problems = []
    for name, boxes in metadata.boxes.items():
        width, height = metadata.image_sizes.get(name, (np.inf, np.inf))
        if (boxes[:, 2] > width).any() or (boxes[:, 3] > height).any():
            problems.append(f"{name}: a box ends outside the image of {width} x {height}: {boxes.tolist()}")
    return problems


def build_metadata(
    data_root: str | Path, annotations: str | Path, box_format: str = "xyxy", classes: list[str] | None = None
) -> Metadata:
    """Metadata of a user's own split, with image sizes read from the files.

    Args:
        data_root: folder with one folder of images per class; class numbers follow the sorted names.
        annotations: CSV without header, id,x0,y0,x1,y1 or id,mask,ignore; ids are paths under data_root.
        box_format: "xyxy" (both ends inside), or "xywh", whose last pixel is x + width - 1.
        classes: names of the classes in order, where the split lacks some.

    Raises:
        FileNotFoundError: no image.
        ValueError: a malformed line, an annotation of no image, another box format.
    """
    from PIL import Image

    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f"box_format: 'xyxy' or 'xywh' was expected, got {box_format!r}")
    root = Path(data_root)
    suffixes = set(Image.registered_extensions())
    boxes, masks = _localization(Path(annotations)) if box_format == "xyxy" else _from_xywh(Path(annotations))
    mask_files = {path for paths, ignore in masks.values() for path in [*paths, ignore]}
    found = (
        path.relative_to(root).as_posix() for path in sorted(root.glob("*/**/*")) if path.suffix.lower() in suffixes
    )
    ids = [name for name in found if name not in mask_files]
    if not ids:
        raise FileNotFoundError(f"{root}: no image in folders of classes")
    names = classes or sorted({name.split("/")[0] for name in ids})
    unknown = [name for name in [*boxes, *masks] if name not in set(ids)]
    if unknown:
        raise ValueError(f"{annotations}: {unknown[0]!r} is no image under {root}")
    strange = [name for name in ids if name.split("/")[0] not in names]
    if strange:
        raise ValueError(f"{strange[0]}: its folder is none of the classes {', '.join(names)}")
    sizes = {}
    for name in ids:
        with Image.open(root / name) as image:
            sizes[name] = image.size
    return Metadata(ids, {name: names.index(name.split("/")[0]) for name in ids}, sizes, boxes, masks)


def _from_xywh(path: Path) -> tuple[dict, dict]:
    boxes: dict[str, list] = {}
    for where, row in _rows(path, (5,)):
        x, y, width, height = (_whole(value, where) for value in row[1:])
        boxes.setdefault(row[0], []).append([x, y, x + width - 1, y + height - 1])
    return {name: check_boxes(np.array(each), f"{path}, {name}") for name, each in boxes.items()}, {}
