"""The same answers as tree.py from OpenCV, one contour search per grey level: the fallback where numba is missing."""

from __future__ import annotations

import numpy as np

from wsol_eval.boxes import box_iou_inclusive


def contour_boxes(grey: np.ndarray, level: int, largest: bool, past_end: bool) -> np.ndarray:
    """Boxes of the contours of `grey > level`, (k, 4) int64; none gives (0, 4). See `tree.boxes_of_level`."""
    import cv2

    foreground = (grey > level).astype(np.uint8)
    contours = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
    if not contours:
        return np.zeros((0, 4), np.int64)
    if largest:
        contours = [max(contours, key=cv2.contourArea)]  # the first of equal ones
    boxes = np.array([cv2.boundingRect(contour) for contour in contours], np.int64)  # x, y, width, height
    boxes[:, 2:] += boxes[:, :2] - (not past_end)
    height, width = grey.shape
    boxes[:, 2:] = np.minimum(boxes[:, 2:], [width - 1, height - 1])
    return boxes


def level_iou_opencv(grey: np.ndarray, boxes: np.ndarray, largest: bool, past_end: bool) -> np.ndarray:
    """Best IoU for each L of `grey > L`, (256,) float64, of one map (H, W) uint8."""
    present = np.unique(grey)
    top = int(present[-1])
    best = np.full(256, box_iou_inclusive(np.zeros((1, 4)), boxes).max())
    starts = [0, *(int(level) for level in present if 0 < level < top)]  # the foreground is constant in between
    for low, high in zip(starts, [*starts[1:], top], strict=True):
        if low < high:
            best[low:high] = box_iou_inclusive(contour_boxes(grey, low, largest, past_end), boxes).max()
    return best
