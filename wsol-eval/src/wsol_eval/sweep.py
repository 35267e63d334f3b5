"""The best IoU of one image's boxes at every threshold (the paper's section 4; steps 1 to 7 of the reference).

`grey = uint8(255 * score)`; at threshold tau the foreground is `grey > int(tau * max(grey))`. Whatever the number of
thresholds, a map has at most 256 different answers: they are found once per grey level (`level_iou`), then looked up.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wsol_eval.boxes import check_boxes

try:
    from wsol_eval import tree
except ImportError:  # no numba: contours.py gives the same from OpenCV
    tree = None  # type: ignore[assignment]

Contours = Literal["all", "largest"]
Convention = Literal["reference", "exact"]
Backend = Literal["numba", "opencv"]
LEVELS = 256


def thresholds(interval: float) -> np.ndarray:
    """np.arange(0, 1, interval): the products of arange are part of the definition. ValueError outside (0, 1]."""
    if not 0 < interval <= 1:
        raise ValueError(f"cam_curve_interval: expected a number in (0, 1], got {interval}")
    return np.arange(0, 1, interval)


def check_maps(maps: np.ndarray | Tensor, name: str = "score_maps") -> np.ndarray:
    """Score maps as uint8 grey levels: trunc(255 * score), computed in float64 and on the maps' own device.

    Args:
        maps: (..., H, W) floating in [0, 1], or uint8 that is quantised already.
        name: used in messages.

    Raises:
        TypeError: no array or tensor of such a kind.
        ValueError: NaN, or a value outside [0, 1].
    """
    maps = as_tensor(maps, name)
    if maps.dtype == torch.uint8:
        return maps.cpu().numpy()
    check_range(maps, name)
    return (maps.double() * 255).to(torch.uint8).cpu().numpy()


def as_tensor(maps: np.ndarray | Tensor, name: str) -> Tensor:
    """Floating or uint8 maps as a tensor, without a copy where possible. TypeError for anything else."""
    if isinstance(maps, np.ndarray) and maps.dtype.kind in "fu":
        maps = torch.from_numpy(np.require(maps, requirements=["C", "W"]))
    if not isinstance(maps, Tensor) or not (maps.is_floating_point() or maps.dtype == torch.uint8):
        kind = getattr(maps, "dtype", type(maps).__name__)
        raise TypeError(f"{name}: expected a floating array or tensor in [0, 1], or uint8 levels, got {kind}")
    return maps.detach()


def check_range(maps: Tensor, name: str) -> None:
    """ValueError unless all values lie in [0, 1]; NaN does not."""
    if maps.numel():
        low, high = (value.item() for value in maps.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name}: expected values in [0, 1] and no NaN, got values in [{low:g}, {high:g}]")


def level_iou(
    grey: np.ndarray,
    boxes: list[np.ndarray],
    contours: Contours = "all",
    convention: Convention = "reference",
    backend: Backend | None = None,
) -> np.ndarray:
    """Best IoU with any ground-truth box, for each image and each L of `grey > L`.

    Args:
        grey: (N, H, W) uint8.
        boxes: N arrays (k, 4), in pixels of the map.
        contours: "all" compares every contour, holes included (MaxBoxAccV2); "largest" only the one of the largest
            polygon area, of equal ones the lowest in the image (MaxBoxAcc).
        convention: "reference" has boxes end one pixel after their last, clipped into the map, and then counts that
            end as inside; "exact" ends them at their last pixel.
        backend: default numba, else OpenCV; both give the same.

    Returns:
        (N, 256) float64; where there is no foreground, the IoU of the box 0, 0, 0, 0.
    """
    _check_choices(contours, convention)
    if max(grey.shape[1:]) >= 1 << 15:
        raise ValueError(f"score_maps: expected sides below 32,768 pixels, got {grey.shape[1:]}")
    if not len(grey):
        return np.zeros((0, LEVELS))
    largest, past_end = contours == "largest", convention == "reference"
    if (backend or ("numba" if tree else "opencv")) == "numba":
        joined, ends = np.concatenate(boxes).astype(np.int64), np.cumsum([0, *map(len, boxes)])
        return tree.sweep(np.ascontiguousarray(grey), joined, ends, largest, past_end)
    from wsol_eval.contours import level_iou_opencv

    return np.stack([level_iou_opencv(*each, largest, past_end) for each in zip(grey, boxes, strict=True)])


def _check_choices(contours: str, convention: str) -> None:
    if contours not in ("all", "largest"):
        raise ValueError(f"contours: expected 'all' or 'largest', got {contours!r}")
    if convention not in ("reference", "exact"):
        raise ValueError(f"box_convention: expected 'reference' or 'exact', got {convention!r}")


def _check_taus(taus: np.ndarray) -> None:
    if not ((taus >= 0) & (taus < 1)).all():
        raise ValueError(f"tau: expected values in [0, 1), got {taus.tolist()}")


def at_thresholds(by_level: np.ndarray, grey: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """(N, ..., 256) values by level -> (N, ..., T) values by threshold: L = int(tau * max(grey))."""
    levels = (taus * grey.max((1, 2)).astype(np.float64)[:, None]).astype(np.int64)  # (N, T)
    shape = (len(grey), *(1,) * (by_level.ndim - 2), len(taus))
    return np.take_along_axis(by_level, levels.reshape(shape), -1)


def best_iou_per_threshold(
    score_map: np.ndarray,
    boxes: np.ndarray,
    taus: np.ndarray,
    contours: Contours = "all",
    box_convention: Convention = "reference",
    backend: Backend | None = None,
) -> np.ndarray:
    """Best IoU over the boxes of each threshold and all ground-truth boxes.

    Args:
        score_map: (H, W), see `check_maps`.
        boxes: (k, 4) ground truth in pixels of the map.
        taus: (T,) thresholds in [0, 1).
        contours: see `level_iou`.
        box_convention: see `level_iou`.
        backend: see `level_iou`.

    Returns:
        (T,) float64.

    Raises:
        TypeError, ValueError: see `check_maps` and `check_boxes`; a map that is not two-dimensional, a tau outside
            [0, 1).
    """
    taus = np.asarray(taus, np.float64)
    _check_taus(taus)
    grey = check_maps(score_map, "score_map")
    if grey.ndim != 2:
        raise ValueError(f"score_map: expected shape (H, W), got {grey.shape}")
    by_level = level_iou(grey[None], [check_boxes(boxes)], contours, box_convention, backend)
    return at_thresholds(by_level, grey[None], taus)[0]


def boxes_at_threshold(
    score_map: np.ndarray, tau: float, contours: Contours = "all", box_convention: Convention = "reference"
) -> np.ndarray:
    """Boxes of the contours at one threshold: (k, 4) int64, [[0, 0, 0, 0]] where there is none.

    Raises:
        TypeError, ValueError: see `best_iou_per_threshold`.
    """
    _check_choices(contours, box_convention)
    _check_taus(np.asarray(tau, np.float64))
    grey = check_maps(score_map, "score_map")
    if grey.ndim != 2:
        raise ValueError(f"score_map: expected shape (H, W), got {grey.shape}")
    return boxes_at_level(grey, int(tau * float(grey.max())), contours, box_convention)


def boxes_at_level(
    grey: np.ndarray, level: int, contours: Contours = "all", box_convention: Convention = "reference"
) -> np.ndarray:
    """Boxes of the contours of `grey > level`, (H, W) uint8: (k, 4) int64, [[0, 0, 0, 0]] where there is none."""
    from wsol_eval import contours as opencv

    find = tree.boxes_of_level if tree else opencv.contour_boxes
    boxes = find(grey, level, contours == "largest", box_convention == "reference")
    return boxes if len(boxes) else np.zeros((1, 4), np.int64)
