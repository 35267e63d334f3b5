"""Metadata of a user's own set: a folder per class, and boxes or masks as CSV, COCO or VOC."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from shared_utils.images import image_files, read_image
from wsol_eval.boxes import check_boxes
from wsol_eval.metadata import Metadata, read_localization, rows_of, whole_number

SPLITS = ("train", "val", "test")
Boxes = dict[str, np.ndarray]
Masks = dict[str, tuple[list[str], str]]


def build_metadata(
    data_root: str | Path, annotations: str | Path, box_format: str = "xyxy", classes: list[str] | None = None
) -> dict[str, Metadata]:
    """Metadata of a user's own set, with image sizes read from the files, by split ("" where there are none).

    Ids are paths under data_root, so that `train` finds them there. Class numbers follow the sorted names of the
    folders, over all splits.

    Args:
        data_root: folder with one folder of images per class, or folders train, val and test with these in them.
        annotations: CSV without header, id,x0,y0,x1,y1 or id,mask,ignore; a .json of COCO; a folder of VOC's .xml.
            COCO and VOC name images by file name or path.
        box_format: of a CSV: "xyxy" (both ends inside), or "xywh", whose last pixel is x + width - 1.
        classes: names of the classes in order, where the set lacks some.

    Raises:
        FileNotFoundError: no image.
        BrokenFile: an image that cannot be read.
        ValueError: a malformed line, an annotation of no image, another box format.
    """
    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f"box_format: 'xyxy' or 'xywh' was expected, got {box_format!r}")
    root = Path(data_root)
    names = [path.relative_to(root).as_posix() for path in image_files(root)[0]]
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(name.split("/")[-1], []).append(name)
    boxes, masks = _annotations(Path(annotations), box_format, by_file)
    mask_files = {path for paths, ignore in masks.values() for path in [*paths, ignore]}
    names = [name for name in names if name not in mask_files]
    split_of = {name: name.split("/")[0] if name.split("/")[0] in SPLITS else "" for name in names}
    if len(set(split_of.values())) > 1 and "" in split_of.values():
        stray = next(name for name, split in split_of.items() if not split)
        raise ValueError(
            f"{stray}: only the folders train, val and test were expected beside each other; move it into one"
        )
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
        sizes = {name: read_image(root / name).size for name in ids}
        parts = ({name: known_[name] for name in ids if name in known_} for known_ in (boxes, masks))
        labels = {name: known.index(class_of[name]) for name in ids}
        found[split] = Metadata(ids, labels, sizes, *parts)  # type: ignore[arg-type]
    return found


def _annotations(path: Path, box_format: str, by_file: dict[str, list[str]]) -> tuple[Boxes, Masks]:
    if path.is_dir():
        return _from_voc(path, by_file), {}
    if path.suffix.lower() == ".json":
        return _from_coco(path, by_file), {}
    return read_localization(path) if box_format == "xyxy" else (_from_xywh(path), {})


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
        raise ValueError(f"{path}: COCO's images and annotations with bbox were expected ({error!r})") from error
    boxes: dict[str, list] = {}
    for file, (x, y, width, height) in lines:
        end = [max(int(x), int(np.ceil(x + width)) - 1), max(int(y), int(np.ceil(y + height)) - 1)]
        boxes.setdefault(_id_of(file, by_file, path), []).append([int(x), int(y), *end])
    return _checked(boxes, path)


def _from_voc(folder: Path, by_file: dict[str, list[str]]) -> Boxes:
    """xmin, ymin, xmax and ymax count from 1, both ends inside."""
    boxes: dict[str, list] = {}
    for path in sorted(folder.rglob("*.xml")):
        try:
            tree = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path}: VOC's XML was expected ({error})") from error
        for box in tree.iterfind("object/bndbox"):
            ends = [float(box.findtext(name, "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not np.isfinite(ends).all():
                raise ValueError(f"{path}: xmin, ymin, xmax and ymax of each object were expected")
            name = _id_of(tree.findtext("filename", ""), by_file, path)
            boxes.setdefault(name, []).append([max(0, int(value) - 1) for value in ends])
    return _checked(boxes, folder)


def _id_of(file: str, by_file: dict[str, list[str]], where: Path) -> str:
    """The one image whose path ends with this one."""
    same = by_file.get(file.split("/")[-1], [])
    fitting = [name for name in same if name == file or name.endswith(f"/{file}")]
    if len(fitting) != 1:
        raise ValueError(f"{where}: {file!r} is the name of {len(fitting)} images, one was expected")
    return fitting[0]


def _checked(boxes: dict[str, list], where: Path) -> Boxes:
    return {name: check_boxes(np.array(each), f"{where}, {name}") for name, each in boxes.items()}
