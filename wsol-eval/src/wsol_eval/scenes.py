"""Procedural scenes of the embedded scale: an object with a telling part, on a background that may tell more.

32 x 32 images of 8 classes. The object is an elliptic body, whose colour goes with the class only loosely, and a
round head at one end, whose stripes have the angle of the class: a classifier needs the head alone. In the ill-posed
variant the background's texture goes with the class too (the paper's duck on water): then the background is a better
cue than most of the foreground, and no threshold can localise (the paper's section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIDE = 32
CLASSES = 8
TRAIN_SCENES, TEST_SCENES = 800, 300
CENTRE_SD = 4.5  # pixels
MAJOR = (5.0, 8.5)  # semi-axis in pixels
MINOR = (0.55, 0.8)  # of the major one
HEAD = (0.5, 0.7)  # radius, of the minor semi-axis
STRIPES = (2.0, 0.35)  # radians per pixel, amplitude
BACKGROUND = (0.45, 0.13)  # mean and deviation of 4 x 4 blocks
TEXTURE = (0.9, 0.16)  # of the ill-posed background: radians per pixel, amplitude
NOISE = 0.04  # deviation per pixel
BODY_CUE = {False: 0.85, True: 0.3}  # probability that the body has the colour of its class; key: ill-posed
BACKGROUND_CUE = 0.9
PARTS = {"train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class Scenes:
    """N images with everything that can be known about them."""

    images: Tensor
    """(N, 3, 32, 32) float32, about zero mean"""
    labels: Tensor
    """(N,) int64"""
    masks: np.ndarray
    """(N, 32, 32) uint8, 1 on the object"""
    boxes: list[np.ndarray]
    """N arrays (1, 4): x0, y0, x1, y1, both ends on the object"""

    def __getitem__(self, chosen: slice | np.ndarray) -> Scenes:
        index = np.arange(len(self.boxes))[chosen]
        return Scenes(self.images[index], self.labels[index], self.masks[index], [self.boxes[i] for i in index])


def make_scenes(labels: np.ndarray, seed: int, ill_posed: bool = False) -> Scenes:
    """One scene per label, the same for the same seed.

    Args:
        labels: (N,) integers in 0..7.
        seed: of every draw.
        ill_posed: the background tells the class, the body hardly does.
    """
    rng = np.random.default_rng(seed)
    colours = 0.5 + 0.35 * np.array([[np.cos(a), np.cos(a - 2.1), np.cos(a + 2.1)] for a in np.arange(8) * np.pi / 4])
    drawn = [_draw(int(label), rng, colours, ill_posed) for label in labels]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]).astype(np.float32))
    masks = np.stack([mask for _, mask in drawn]).astype(np.uint8)
    boxes = []
    for mask in masks:
        y, x = mask.nonzero()
        boxes.append(np.array([[x.min(), y.min(), x.max(), y.max()]]))
    return Scenes((images - 0.45) / 0.25, torch.from_numpy(np.asarray(labels, np.int64)), masks, boxes)


def _draw(label: int, rng: np.random.Generator, colours: np.ndarray, ill_posed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image (3, 32, 32) and mask (32, 32)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    image = np.kron(rng.normal(*BACKGROUND, (3, SIDE // 4, SIDE // 4)), np.ones((4, 4)))
    if ill_posed:
        shown = label if rng.random() < BACKGROUND_CUE else int(rng.integers(CLASSES))
        image += _stripes(x, y, shown, TEXTURE, rng.uniform(0, 2 * np.pi))
    centre = np.clip(rng.normal(SIDE / 2, CENTRE_SD, 2), 3, SIDE - 4)
    angle, major = rng.uniform(0, 2 * np.pi), rng.uniform(*MAJOR)
    minor = major * rng.uniform(*MINOR)
    radius = minor * rng.uniform(*HEAD)
    along = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
    across = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
    body = (along / major) ** 2 + (across / minor) ** 2 <= 1
    head = (along - major) ** 2 + across**2 <= radius**2
    telling = rng.random() < BODY_CUE[ill_posed]
    body_colour = colours[label if telling else rng.integers(CLASSES)] + rng.normal(0, 0.05, 3)
    image[:, body] = body_colour[:, None]
    striped = rng.uniform(0.35, 0.65, 3)[:, None, None] + _stripes(x, y, label, STRIPES, rng.uniform(0, 2 * np.pi))
    image[:, head] = striped[:, head]
    return image + rng.normal(0, NOISE, image.shape), body | head


def _stripes(x: np.ndarray, y: np.ndarray, label: int, kind: tuple[float, float], phase: float) -> np.ndarray:
    """A wave across the direction of a class, (32, 32)."""
    angle = label * np.pi / CLASSES
    return kind[1] * np.sin(kind[0] * (x * np.cos(angle) + y * np.sin(angle)) + phase)


def make_split(name: str, count: int, seed: int, ill_posed: bool = False) -> Scenes:
    """The first `count` scenes of a split; two seeds, and two splits of a seed, share no image.

    Args:
        name: train (train-weaksup), val (train-fullsup) or test.
        count: images, the classes taking turns.
        seed: of the data set.
        ill_posed: see `make_scenes`.
    """
    return make_scenes(np.arange(count) % CLASSES, 1000 * seed + PARTS[name], ill_posed)
