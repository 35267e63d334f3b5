"""Boxes as the reference has them: integers x0, y0, x1, y1 with both ends counted (widths are x1 - x0 + 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def check_boxes(boxes: np.ndarray, image: str = "boxes") -> np.ndarray:
    """Boxes as an int64 array of shape (k, 4).

    Args:
        boxes: (k, 4) integers, or floats without a fraction, k >= 1.
        image: name used in messages.

    Raises:
        TypeError: no numbers.
        ValueError: another shape, no box, a fraction, a negative coordinate, or an end before its start.
    """
    array = np.asarray(boxes)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{image}: expected boxes of integers, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 4 or not len(array):
        raise ValueError(f"{image}: expected boxes of shape (k, 4) with k >= 1, got {array.shape}")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.trunc(array)).all()):
        raise ValueError(f"{image}: expected boxes of whole numbers, got {array.tolist()}")
    array = array.astype(np.int64)
    bad = (array < 0).any(1) | (array[:, 2] < array[:, 0]) | (array[:, 3] < array[:, 1])
    if bad.any():
        raise ValueError(f"{image}: expected 0 <= x0 <= x1 and 0 <= y0 <= y1, got {array[bad][0].tolist()}")
    return array


def box_iou_inclusive(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of `a` with every box of `b`, both ends counted; a union of 0 or less gives 0.

    Args:
        a: (n, 4) integers.
        b: (m, 4) integers.

    Returns:
        (n, m) float64.
    """
    a, b = np.asarray(a, np.int64)[:, None], np.asarray(b, np.int64)[None]  # (n, 1, 4), (1, m, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1  # (n, m, 2)
    overlap = sides.clip(0).prod(-1)
    union = (a[..., 2:] - a[..., :2] + 1).prod(-1) + (b[..., 2:] - b[..., :2] + 1).prod(-1) - overlap
    return np.where(union > 0, overlap / np.where(union > 0, union, 1), 0.0)


def resize_boxes(boxes: np.ndarray, image_wh: Sequence[int], size: int | tuple[int, int] = 224) -> np.ndarray:
    """Boxes of an image moved onto its score map: scaled per axis, truncated, not clipped.

    Args:
        boxes: (k, 4) in pixels of the image.
        image_wh: width and height of the image.
        size: side of the map, or its (height, width).

    Returns:
        (k, 4) int64.
    """
    height, width = (size, size) if isinstance(size, int) else size
    new, old = np.array([width, height] * 2, np.float64), np.array([*image_wh] * 2, np.float64)
    return (np.asarray(boxes) * new / old).astype(np.int64)  # product first: the truncation depends on it


def crop_boxes(boxes: np.ndarray, image_wh: Sequence[int], resized: int = 256, crop: int = 224) -> np.ndarray:
    """Boxes in the middle square of an image whose shorter side became `resized` (torchvision's Resize, CenterCrop).

    What lies outside the square is cut off; a box that is outside of it altogether is left out, unless all are: then
    the nearest pixels of the border stand for them.

    Args:
        boxes: (k, 4) in pixels of the image.
        image_wh: width and height of the image.
        resized: length of the shorter side.
        crop: side of the square.

    Returns:
        (up to k, 4) int64.
    """
    short = min(image_wh)
    sides = [resized if side == short else int(resized * side / short) for side in image_wh]
    left, top = (round((side - crop) / 2) for side in sides)
    moved = resize_boxes(boxes, image_wh, (sides[1], sides[0])) - [left, top, left, top]
    inside = (moved[:, 2] >= 0) & (moved[:, 3] >= 0) & (moved[:, 0] < crop) & (moved[:, 1] < crop)
    return (moved[inside] if inside.any() else moved).clip(0, crop - 1)
