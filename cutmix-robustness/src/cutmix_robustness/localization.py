"""Localization by class activation maps (section 4.2 and appendix B of 1905.04899)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SIGMA = 0.15
CONNECTIVITY = {4: ndimage.generate_binary_structure(2, 1), 8: ndimage.generate_binary_structure(2, 2)}


def class_activation_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Weighted sum of the last feature maps, clipped at 0.

    Args:
        features: (N, C, h, w).
        weight: (K, C), of the linear layer after the global average.
        classes: (N,) int64.

    Returns:
        (N, h, w) float32.
    """
    return torch.einsum("nchw,nc->nhw", features.float(), weight[classes].float()).clamp(min=0)


def cam_box(cam: np.ndarray, sigma: float = SIGMA, connectivity: int = 8) -> tuple[int, int, int, int]:
    """Tight box around the largest connected component of cam > sigma * max(cam).

    Args:
        cam: (H, W), values of 0 or above.
        sigma: threshold as a share of the maximum.
        connectivity: 4 or 8 neighbours. Among equal components the first in raster order is taken.

    Returns:
        (x0, y0, x1, y1), end exclusive; all zeros if nothing is above the threshold.
    """
    components, count = ndimage.label(cam > sigma * cam.max(), CONNECTIVITY[connectivity])
    if count == 0:
        return 0, 0, 0, 0
    largest = int(np.argmax(np.bincount(components.ravel())[1:])) + 1
    rows, columns = ndimage.find_objects(components)[largest - 1]
    return columns.start, rows.start, columns.stop, rows.stop


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of (..., 4) boxes as (x0, y0, x1, y1), end exclusive."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    common = np.clip(width, 0, None) * np.clip(height, 0, None)
    area_a, area_b = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    return common / (area_a + area_b - common)


def localization_accuracy(
    cams: np.ndarray, correct: np.ndarray, boxes: list[np.ndarray], sigma: float = SIGMA
) -> dict[str, float]:
    """`box_accuracy` of the boxes around maps (N, H, W) at the resolution of the true boxes; sigma: see `cam_box`."""
    return box_accuracy(np.array([cam_box(cam, sigma) for cam in cams]), correct, boxes)


def box_accuracy(found: np.ndarray, correct: np.ndarray, boxes: list[np.ndarray]) -> dict[str, float]:
    """Share of images, in %, whose class is right and whose box has an IoU above one half with a true one.

    Args:
        found: (N, 4) a box per image, as (x0, y0, x1, y1).
        correct: (N,) whether the predicted class is right.
        boxes: N arrays (n_i, 4) of true boxes; several boxes: the best counts.

    Returns:
        `localization_accuracy` as above and `gt_known_localization`, which counts the box alone.

    Raises:
        ValueError: different numbers of boxes, classes and true boxes.
    """
    if not len(found) == len(correct) == len(boxes):
        raise ValueError(f"expected as many boxes as classes, got {len(found)}, {len(correct)} and {len(boxes)}")
    overlap = np.array([box_iou(box, true).max() for box, true in zip(found, boxes, strict=True)])
    hit = overlap > 0.5
    return {
        "localization_accuracy": 100 * float((hit & np.asarray(correct, bool)).mean()),
        "gt_known_localization": 100 * float(hit.mean()),
    }
