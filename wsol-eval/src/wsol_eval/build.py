"""Metadata of a user's own set: a folder per class, and boxes or masks as CSV, COCO or VOC."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from shared_utils.images import BrokenFile, image_files
from wsol_eval.boxes import check_boxes
from wsol_eval.data import read_annotated
from wsol_eval.metadata import Metadata, read_localization, rows_of, whole_number

logger = logging.getLogger("wsol-eval")
SPLITS = ("train", "val", "test")
Boxes = dict[str, np.ndarray]
Masks = dict[str, tuple[list[str], str]]
Sizes = dict[str, tuple[int, int]]


def build_metadata(
    data_root: str | Path,
    annotations: str | Path,
    box_format: str = "xyxy",
    classes: list[str] | None = None,
    skip_broken: bool = False,
) -> dict[str, Metadata]:
    """Metadata of a user's own set, with image sizes read from the files, by split ("" where there are none).

    Ids are paths under data_root, so that `train` finds them there. Class numbers follow the sorted names of the
    folders, over all splits.

    Args:
        data_root: folder with one folder of images per class, or folders train, val and test with these in them.
        annotations: CSV without header, id,x0,y0,x1,y1 or id,mask,ignore; a .json of COCO; a folder of VOC's .xml.
            COCO names images by file name or path; VOC's XML is named as its image is, or names it inside.
        box_format: of a CSV: "xyxy" (both ends inside), or "xywh", whose last pixel is x + width - 1.
        classes: names of the classes in order, where the set lacks some.
        skip_broken: leave images out that cannot be read, with a warning.

    Raises:
        FileNotFoundError: no image, or no such annotations.
        BrokenFile: an image that cannot be read.
        ValueError: a malformed line, an annotation of no image or of one of another size, another box format.
    """
    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f"box_format: expected 'xyxy' or 'xywh', got {box_format!r}")
    root = Path(data_root)
    names = [path.relative_to(root).as_posix() for path in image_files(root)[0]]
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(name.split("/")[-1], []).append(name)
    boxes, masks, stated = _annotations(Path(annotations), box_format, by_file)
    mask_files = {path for paths, ignore in masks.values() for path in [*paths, ignore]}
    names = [name for name in names if name not in mask_files]
    split_of = {name: name.split("/")[0] if name.split("/")[0] in SPLITS else "" for name in names}
    if len(set(split_of.values())) > 1 and "" in split_of.values():
        stray = next(name for name, split in split_of.items() if not split)
        raise ValueError(f"{stray}: expected only the folders train, val and test; move this image into one of them")
    class_of = {n: n.split("/")[1 if split_of[n] else 0] for n in names if n.count("/") > bool(split_of[n])}
    if not class_of:
        raise FileNotFoundError(f"{root}: no image in folders of classes (<class>/*.jpg or <split>/<class>/*.jpg)")
    unknown = [name for name in [*boxes, *masks] if name not in class_of]
    if unknown:
        raise ValueError(f"{annotations}: {unknown[0]!r} is no image in a class's folder under {root}")
    known = classes or sorted(set(class_of.values()))
    strange = [name for name in class_of if class_of[name] not in known]
    if strange:
        raise ValueError(f"{strange[0]}: its folder is none of the classes {', '.join(known)}")
    found = {}
    for split in sorted(set(split_of.values())):
        ids = [name for name in class_of if split_of[name] == split]
        sizes = {}
        for name in ids:
            try:
                sizes[name] = _size(root / name, stated.get(name))
            except BrokenFile as error:
                if not skip_broken:
                    raise
                logger.warning("left out: %s", error)
        ids = [name for name in ids if name in sizes]
        parts = ({name: known_[name] for name in ids if name in known_} for known_ in (boxes, masks))
        labels = {name: known.index(class_of[name]) for name in ids}
        found[split] = Metadata(ids, labels, sizes, *parts)  # type: ignore[arg-type]
    return found


def _size(path: Path, stated: tuple[int, int] | None) -> tuple[int, int]:
    size = read_annotated(path, stated).size
    if stated not in (None, (0, 0), size):
        raise ValueError(
            f"{path}: its annotation says {stated}, the image has {size}; its boxes may not fit: correct the annotation"
        )
    return size


def _annotations(path: Path, box_format: str, by_file: dict[str, list[str]]) -> tuple[Boxes, Masks, Sizes]:
    """Boxes, masks, and the sizes of images that the annotations state."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        boxes, sizes = _from_voc(path, by_file)
        if not sizes:
            raise FileNotFoundError(f"{path}: no .xml below this folder")
        return boxes, {}, sizes
    if path.suffix.lower() == ".json":
        return _from_coco(path, by_file), {}, {}
    return (*read_localization(path), {}) if box_format == "xyxy" else (_from_xywh(path), {}, {})


def _from_xywh(path: Path) -> Boxes:
    boxes: dict[str, list] = {}
    for where, row in rows_of(path, (5,)):
        x, y, width, height = (whole_number(value, where) for value in row[1:])
        boxes.setdefault(row[0], []).append([x, y, x + width - 1, y + height - 1])
    return _checked(boxes, path)


def _from_coco(path: Path, by_file: dict[str, list[str]]) -> Boxes:
    """`bbox` is x, y, width, height in fractions of pixels: the last pixel is the one that the box ends in."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in stored["images"]}
        lines = [(files[each["image_id"]], each["bbox"]) for each in stored["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected COCO's images and annotations with bbox ({error!r})") from error
    boxes: dict[str, list] = {}
    for file, (x, y, width, height) in lines:
        end = [max(int(x), int(np.ceil(x + width)) - 1), max(int(y), int(np.ceil(y + height)) - 1)]
        boxes.setdefault(_id_of(file, by_file, path), []).append([int(x), int(y), *end])
    return _checked(boxes, path)


def _from_voc(folder: Path, by_file: dict[str, list[str]]) -> tuple[Boxes, Sizes]:
    """xmin, ymin, xmax and ymax count from 1, both ends inside.

    An XML belongs to the image of its own name, as in VOC: what it holds as `filename` often lacks the suffix or is
    that of an older copy. That decides only where no image, or more than one, has the name.
    """
    boxes: dict[str, list] = {}
    sizes: Sizes = {}
    by_stem: dict[str, list[str]] = {}
    for names in by_file.values():
        for name in names:
            by_stem.setdefault(Path(name).stem, []).append(name)
    for path in sorted(folder.rglob("*.xml")):
        try:
            tree = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path}: expected VOC's XML ({error})") from error
        same = by_stem.get(path.stem, [])
        name = same[0] if len(same) == 1 else _id_of(tree.findtext("filename", ""), by_file, path)
        width, height = (whole_number(tree.findtext(f"size/{side}", "0"), str(path)) for side in ("width", "height"))
        sizes[name] = width, height
        for box in tree.iterfind("object/bndbox"):
            ends = [float(box.findtext(name, "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not np.isfinite(ends).all():
                raise ValueError(f"{path}: expected xmin, ymin, xmax and ymax of each object")
            boxes.setdefault(name, []).append([max(0, int(value) - 1) for value in ends])
    return _checked(boxes, folder), sizes


def _id_of(file: str, by_file: dict[str, list[str]], where: Path) -> str:
    """The one image whose path ends with this one."""
    same = by_file.get(file.split("/")[-1], [])
    fitting = [name for name in same if name == file or name.endswith(f"/{file}")]
    if len(fitting) != 1:
        raise ValueError(f"{where}: expected one image named {file!r}, found {len(fitting)}")
    return fitting[0]


def _checked(boxes: dict[str, list], where: Path) -> Boxes:
    return {name: check_boxes(np.array(each), f"{where}, {name}") for name, each in boxes.items()}
