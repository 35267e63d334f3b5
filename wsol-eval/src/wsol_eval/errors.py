"""What is wrong with a box that misses, in the classes of TS-CAM (Gao et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from wsol_eval.boxes import box_iou_inclusive
from wsol_eval.sweep import Convention, boxes_at_threshold

KINDS = ("right", "multi_instance", "part", "more", "background")
HIT, SEVERAL, INSIDE, COVERED = 0.5, 0.3, 0.5, 0.7


def kind_of(box: np.ndarray, truth: np.ndarray) -> str:
    """The class of one predicted box.

    right: IoU above 0.5 with an object. Else multi_instance: more than 0.3 of two objects or more is inside the box;
    part: more than half of the box is inside the nearest object; more: it covers over 0.7 of that object; background:
    none of these.

    Args:
        box: (4,) x0, y0, x1, y1.
        truth: (k, 4).
    """
    iou = box_iou_inclusive(box[None], truth)[0]
    nearest = int(iou.argmax())
    if iou[nearest] > HIT:
        return "right"
    sides = np.minimum(box[2:], truth[:, 2:]) - np.maximum(box[:2], truth[:, :2]) + 1  # (k, 2)
    shared = sides.clip(0).prod(1)
    of_truth = shared / (truth[:, 2:] - truth[:, :2] + 1).prod(1)
    of_box = shared / (box[2:] - box[:2] + 1).prod()
    if (of_truth > SEVERAL).sum() > 1:
        return "multi_instance"
    if of_box[nearest] > INSIDE:
        return "part"
    return "more" if of_truth[nearest] > COVERED else "background"


def breakdown(
    maps_and_boxes: Iterable[tuple[np.ndarray, np.ndarray]], tau: float, convention: Convention = "reference"
) -> dict[str, float]:
    """Percent of images of each kind, from the largest contour at `tau`.

    Args:
        maps_and_boxes: of each image the score map (H, W) in [0, 1] and its true boxes (k, 4) in pixels of the map.
        tau: threshold in [0, 1).
        convention: see `BoxLocalization`.
    """
    found = [
        kind_of(boxes_at_threshold(score_map, tau, "largest", convention)[0], np.asarray(boxes))
        for score_map, boxes in maps_and_boxes
    ]
    return {kind: 100 * found.count(kind) / len(found) for kind in KINDS}
