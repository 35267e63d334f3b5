"""Pascal VOC for detection, through torchvision's reader, and its 11-point mean average precision."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from cutmix_robustness.draws import generator_for
from cutmix_robustness.localization import box_iou
from shared_utils.images import read_image

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
TRAIN, TEST = (("2007", "trainval"), ("2012", "trainval")), (("2007", "test"),)
TRANSFORMS = {
    "faster-rcnn": [v2.RandomHorizontalFlip()],
    "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(), v2.RandomIoUCrop(), v2.RandomHorizontalFlip()],
    "none": [],
}


class VocImages(Dataset):
    """Images with boxes, labels 1 .. 20 and the mark of difficult objects.

    Args:
        data_root: holds VOCdevkit.
        parts: (year, image set) pairs.
        augment: faster-rcnn, ssd or none; training leaves difficult objects out, "none" keeps them.
        seed: seed of the augmentation.

    Raises:
        FileNotFoundError: a part is missing; the message says what to do.
    """

    def __init__(self, data_root: Path, parts: tuple[tuple[str, str], ...], augment: str = "none", seed: int = 0):
        try:
            self.parts = [datasets.VOCDetection(str(data_root), year=year, image_set=name) for year, name in parts]
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{data_root} lacks Pascal VOC: run `cutmix-robustness data --download voc --data-root {data_root}`"
            ) from error
        self.items = [(part, number) for part in self.parts for number in range(len(part))]
        self.augment, self.seed, self.epoch = augment, seed, 0
        self.transform = v2.Compose(
            [
                *TRANSFORMS[augment],
                v2.SanitizeBoundingBoxes(labels_getter=_aligned),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        part, number = self.items[index]
        image = read_image(part.images[number])
        annotation = part.parse_voc_xml(ElementTree.parse(part.annotations[number]).getroot())
        objects = annotation["annotation"]["object"]
        if self.augment != "none":
            objects = [each for each in objects if each["difficult"] == "0"] or objects
        corners = [[float(each["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax")] for each in objects]
        target = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(image.height, image.width)),
            "labels": torch.tensor([1 + CLASSES.index(each["name"]) for each in objects]),
            "difficult": torch.tensor([each["difficult"] == "1" for each in objects]),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(self.seed, self.epoch, index).initial_seed())
            return self.transform(v2.functional.to_image(image), target)

    def record(self) -> dict:
        """Name and number of images, for the run record."""
        return {"name": "Pascal VOC " + ", ".join(part.image_set for part in self.parts), "images": len(self)}


def _aligned(sample: tuple) -> tuple[Tensor, Tensor]:
    """The annotations that are dropped together with a box."""
    return sample[1]["labels"], sample[1]["difficult"]


def mean_average_precision(found: list[dict[str, np.ndarray]], true: list[dict[str, np.ndarray]]) -> float:
    """VOC 2007's measure in %: IoU above 0.5, precision at 11 recalls, mean over the classes that occur.

    Args:
        found: per image `boxes` (n, 4) as (x0, y0, x1, y1), `labels` (n,), `scores` (n,).
        true: per image `boxes`, `labels`, `difficult` (n,) bool; finding a difficult object neither helps nor hurts.

    Raises:
        ValueError: lists of different lengths, or no objects.
    """
    if len(found) != len(true):
        raise ValueError(f"found has {len(found)} images, true has {len(true)}")
    labels = sorted({int(label) for each in true for label in each["labels"][~each["difficult"]]})
    if not labels:
        raise ValueError("true contains no object that is not difficult")
    return 100 * float(np.mean([_average_precision(found, true, label) for label in labels]))


def _average_precision(found: list[dict], true: list[dict], label: int) -> float:
    detections = [
        (score, image, box)
        for image, each in enumerate(found)
        for score, box, kind in zip(each["scores"], each["boxes"], each["labels"], strict=True)
        if kind == label
    ]
    truth = [(each["boxes"][each["labels"] == label], each["difficult"][each["labels"] == label]) for each in true]
    taken = [np.zeros(len(boxes), bool) for boxes, _ in truth]
    positives = sum(int((~difficult).sum()) for _, difficult in truth)
    hits = []
    for _, image, box in sorted(detections, key=lambda each: -each[0]):
        boxes, difficult = truth[image]
        overlap = box_iou(box, boxes) if len(boxes) else np.zeros(0)
        best = int(overlap.argmax()) if len(boxes) else -1
        if best < 0 or overlap[best] <= 0.5:
            hits.append(0)
        elif not difficult[best]:
            hits.append(int(not taken[image][best]))
            taken[image][best] = True
    right = np.cumsum(hits)
    recall, precision = right / positives, right / np.arange(1, len(hits) + 1)
    return float(np.mean([precision[recall >= level].max(initial=0) for level in np.linspace(0, 1, 11)]))
