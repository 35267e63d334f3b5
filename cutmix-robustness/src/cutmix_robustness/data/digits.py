"""Handwritten digits on photographs: 32 x 32 images of ten classes with exact boxes, without a download.

The digits are scikit-learn's, the photographs its `china.jpg` and `flower.jpg`. A digit of 16 to 24 pixels, white or on
a bright patch black, lies anywhere on a patch that is drawn without regard to the class. Training and test images share
neither a digit nor a part of a photograph.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image

from cutmix_robustness.data.sources import ResidentImages

SIDE, CLASSES = 32, 10
MEAN, STD = (0.45,) * 3, (0.25,) * 3
SIZES = (16, 24)  # side of a digit's own square, both included
WRITTEN = {"train": slice(0, 1200), "test": slice(1200, None)}  # of scikit-learn's 1,797 digits
COLUMNS = {"train": slice(0, 384), "test": slice(384, 640)}  # of the photographs' 640


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * (255 / 16)).round().astype(np.uint8), found.target


@cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def digits_on_photographs(n: int, seed: int, part: str) -> tuple[ResidentImages, list[np.ndarray]]:
    """Draw images, the classes taking turns.

    Args:
        n: number of images.
        seed: of all draws.
        part: train or test.

    Returns:
        The images, and for each an array (1, 4) of its box as (x0, y0, x1, y1), end exclusive.
    """
    rng = np.random.default_rng([seed, ("train", "test").index(part)])
    written, classes = (each[WRITTEN[part]] for each in _digits())
    labels = np.arange(n) % CLASSES
    images, boxes = np.empty((n, SIDE, SIDE, 3), np.uint8), []
    for image, label in zip(images, labels, strict=True):
        photograph = _photographs()[rng.integers(2)][:, COLUMNS[part]]
        top, left = (int(rng.integers(length - SIDE + 1)) for length in photograph.shape[:2])
        image[:] = photograph[top : top + SIDE, left : left + SIDE]
        digit = written[rng.choice(np.flatnonzero(classes == label))]
        side = int(rng.integers(*SIZES, endpoint=True))
        ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC))
        y, x = rng.integers(SIDE - side + 1, size=2)
        place = image[y : y + side, x : x + side]
        colour = 0.0 if image.mean() > 127 else 255.0
        place[:] = place + (colour - place) * (ink[..., None] / 255)
        rows, columns = np.nonzero(ink >= 128)
        boxes.append(np.array([[x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1]]))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    name = f"digits on photographs, {part}, seed {seed}"
    return ResidentImages(pixels, torch.from_numpy(labels), name), boxes
