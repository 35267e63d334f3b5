"""ImageNet and CUB-200-2011 as image files, with the boxes of the localization protocol."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cutmix_robustness.data.sources import ImageFiles, image_folder
from shared_utils.images import BrokenFile

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(root: Path, augment: str, device: torch.device | str) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation set of root/train/<wnid>/ and root/val/<wnid>/; wnids in alphabetical order.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the two have different classes.
    """
    (paths, labels, classes), (val_paths, val_labels, val_classes) = (image_folder(root / p) for p in ("train", "val"))
    if classes != val_classes:
        raise ValueError(f"{root}: train has {len(classes)} class folders and val {len(val_classes)}, or they differ")
    train = ImageFiles(paths, labels, "ImageNet, train", augment, device)
    return train, ImageFiles(val_paths, val_labels, "ImageNet, val", _test_transform(augment), device)


def _test_transform(augment: str) -> str:
    return "wsol-test" if augment == "wsol" else "none"


def val_boxes(root: Path, test: ImageFiles) -> list[np.ndarray]:
    """Boxes of the validation images as their transform crops them, from root/val_boxes/<image>.xml.

    Raises:
        FileNotFoundError: an annotation is missing.
    """
    found = []
    for path in test.paths:
        annotation = root / "val_boxes" / f"{path.stem}.xml"
        if not annotation.is_file():
            raise FileNotFoundError(f"{annotation}: no annotation for {path.name} (ILSVRC's validation boxes)")
        tree = ElementTree.parse(annotation).getroot()
        width, height = (int(tree.findtext(f"size/{name}", "")) for name in ("width", "height"))
        boxes = [
            [int(each.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax")]
            for each in tree.findall("object")
        ]
        found.append(on_crop(np.array(boxes, float), width, height, test.augment))
    return found


def on_crop(boxes: np.ndarray, width: int, height: int, transform: str) -> np.ndarray:
    """(n, 4) boxes of a width x height image after a test transform, on its central 224 x 224 pixels.

    "wsol-test" resizes to 256 x 256, "none" the shorter side to 256 pixels.
    """
    short = min(width, height)
    resized = (256, 256) if transform == "wsol-test" else (256 * width // short, 256 * height // short)
    factors = np.array(resized * 2) / (width, height, width, height)
    margins = [round((side - 224) / 2) for side in resized]
    return (boxes * factors - margins * 2).clip(0, 224)


def load_cub(root: Path, augment: str, device: torch.device | str) -> tuple[ImageFiles, ImageFiles, list[np.ndarray]]:
    """Training set, test set and the test images' boxes of CUB_200_2011, from its text files.

    Raises:
        FileNotFoundError: one of the text files or images is missing.
    """
    columns = {}
    for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes"):
        path = root / f"{name}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; unpack CUB_200_2011.tgz below the data root")
        columns[name] = [line.split()[1:] for line in path.read_text().splitlines()]
    paths = [root / "images" / name for (name,) in columns["images"]]
    labels = torch.tensor([int(label) - 1 for (label,) in columns["image_class_labels"]])
    train = torch.tensor([part == "1" for (part,) in columns["train_test_split"]])

    def part(name: str, index: Tensor, transform: str) -> ImageFiles:
        return ImageFiles([paths[i] for i in index.tolist()], labels[index], f"CUB-200-2011, {name}", transform, device)

    boxes = []
    for i in (~train).nonzero()[:, 0].tolist():
        x, y, width, height = map(float, columns["bounding_boxes"][i])
        try:
            with Image.open(paths[i]) as image:
                size = image.size
        except UnidentifiedImageError:
            raise BrokenFile(f"{paths[i]}: this is not an image; unpack the archive again") from None
        boxes.append(on_crop(np.array([[x, y, x + width, y + height]]), *size, _test_transform(augment)))
    return (
        part("train", train.nonzero()[:, 0], augment),
        part("test", (~train).nonzero()[:, 0], _test_transform(augment)),
        boxes,
    )
