"""MaxBoxAcc and MaxBoxAccV2 (the paper's section 4), and the localization accuracies made from the same counts.

Aggregation: per image and threshold the best IoU, per threshold the share of images that reach delta, then the maximum
over thresholds. Never a maximum over thresholds per image, never one threshold for all deltas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wsol_eval.boxes import check_boxes
from wsol_eval.scoremaps import Maps, as_maps
from wsol_eval.streaming import Streaming
from wsol_eval.sweep import Contours, Convention, at_thresholds, check_maps, level_iou, thresholds

COUNTS = ("correct", "correct_top1", "correct_top5")  # (D, T) images with IoU >= delta (and the right class)


@dataclass(frozen=True)
class BoxResult:
    """Localization over a split; everything in percent. D IoU thresholds (deltas), T score thresholds (taus)."""

    iou_thresholds: tuple[float, ...]
    taus: np.ndarray
    """(T,)"""
    curve: np.ndarray
    """(D, T) GT-known localization accuracy: images with a box of IoU >= delta at tau."""
    top1_curve: np.ndarray | None
    """(D, T) the same, counted only where the predicted class is right; None if `update` was not given it."""
    top5_curve: np.ndarray | None
    n: int
    """Images."""
    contours: Contours
    box_convention: Convention
    images: np.ndarray | None = field(default=None, repr=False)
    """(n, D, T / 8) bits: each image's correctness, for `intervals`; with keep_images only."""
    image_ids: tuple[str, ...] = field(default=(), repr=False)

    @property
    def max_box_acc(self) -> dict[float, float]:
        """Maximum over tau for each delta, on this very split."""
        return dict(zip(self.iou_thresholds, self.curve.max(1).tolist(), strict=True))

    @property
    def max_box_acc_v2(self) -> float:
        """Mean over delta of the maxima, each at its own tau. It is the paper's V2 with contours="all"."""
        return float(self.curve.max(1).mean())

    @property
    def tau_star(self) -> dict[float, float]:
        """The first tau that attains the maximum, for each delta."""
        return dict(zip(self.iou_thresholds, self.taus[self.curve.argmax(1)].tolist(), strict=True))

    @property
    def top1_loc(self) -> dict[float, float] | None:
        """Maximum over tau of the share with IoU >= delta and the right class first."""
        return self._maxima(self.top1_curve)

    @property
    def top5_loc(self) -> dict[float, float] | None:
        """The same with the right class among the first five."""
        return self._maxima(self.top5_curve)

    def at(self, tau: float | dict[float, float]) -> dict[float, float]:
        """GT-known accuracy at a fixed tau, or at one per delta such as another split's `tau_star`.

        The nearest tau of the curve is taken; ValueError outside [0, 1).
        """
        found = {}
        for row, delta in enumerate(self.iou_thresholds):
            wanted = tau[delta] if isinstance(tau, dict) else tau
            if not 0 <= wanted < 1:
                raise ValueError(f"tau: expected a number in [0, 1), got {wanted}")
            found[delta] = float(self.curve[row, np.abs(self.taus - wanted).argmin()])
        return found

    def _maxima(self, curve: np.ndarray | None) -> dict[float, float] | None:
        return None if curve is None else dict(zip(self.iou_thresholds, curve.max(1).tolist(), strict=True))


class BoxLocalization(Streaming):
    """Streaming box localization: `update` with maps and boxes, `merge` with another one, `compute` a `BoxResult`.

    Args:
        iou_thresholds: deltas in (0, 1].
        cam_curve_interval: step between thresholds; the cost does not depend on it.
        contours: "all" is MaxBoxAccV2, "largest" is MaxBoxAcc.
        box_convention: "reference" is bit-compatible with clovaai/wsolevaluation, whose boxes end one pixel too far;
            "exact" ends them at their last pixel.
        resolution: side or (height, width) that maps must have, their boxes being in its pixels; "native" has every
            map at the size of its image, and the boxes in the image's pixels (a map of 14 x 14 is not native: the
            same map scores differently at every size, so that it must be resized first).
        keep_images: keep each image's bits (`BoxResult.images`) for bootstrap intervals: 375 bytes at step .001.
        workers: threads that score in the background, so that `update` returns at once (the sweep runs without the
            GIL: GPU inference goes on); 0 scores inside `update`.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7),
        cam_curve_interval: float = 0.001,
        contours: Contours = "all",
        box_convention: Convention = "reference",
        resolution: int | tuple[int, int] | str = 224,
        keep_images: bool = False,
        workers: int = 0,
    ):
        if not iou_thresholds or not all(0 < delta <= 1 for delta in iou_thresholds):
            raise ValueError(f"iou_thresholds: expected numbers in (0, 1], got {iou_thresholds}")
        if isinstance(resolution, str) and resolution != "native":
            raise ValueError(f"resolution: expected a side, (height, width) or 'native', got {resolution!r}")
        self.iou_thresholds = tuple(float(delta) for delta in iou_thresholds)
        self.taus = thresholds(cam_curve_interval)
        self.contours, self.box_convention = contours, box_convention
        level_iou(np.zeros((0, 1, 1), np.uint8), [], contours, box_convention)  # refuses unknown names now
        self.resolution: Literal["native"] | tuple[int, int]
        if isinstance(resolution, str):
            self.resolution = "native"
        else:
            self.resolution = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.keep_images = keep_images
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._waiting: deque[Future] = deque()
        self._most_waiting = 4 * workers
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._collect()
        self._counts = {name: np.zeros((len(self.iou_thresholds), len(self.taus)), np.int64) for name in COUNTS}
        self._n, self._with_class, self._with_top5 = 0, 0, 0
        self._ids: dict[str, None] = {}
        self._bits: list[np.ndarray] = []

    def update(
        self,
        score_maps: Maps,
        boxes: Sequence[np.ndarray],
        class_correct: Sequence[bool] | np.ndarray | Tensor | None = None,
        class_correct_top5: Sequence[bool] | np.ndarray | Tensor | None = None,
        image_ids: Sequence[str] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Add images.

        Args:
            score_maps: (N, H, W) floating in [0, 1] or uint8 levels, on any device, or as `as_maps` takes them.
            boxes: N arrays (k, 4) of ground truth x0, y0, x1, y1 in pixels of the map (see `resize_boxes`).
            class_correct: N booleans, the predicted class is right.
            class_correct_top5: N booleans, the right class is among the first five.
            image_ids: N names; one that comes twice is an error. They also let two results be paired.
            image_sizes: with resolution "native" N times width and height of the image, which the map must have.

        Raises:
            TypeError: maps or boxes of another kind.
            ValueError: NaN or values outside [0, 1], another shape, malformed boxes (naming the image), an id that
                was there before, class_correct given for some images and not for others.
        """
        ids = None if image_ids is None else [str(name) for name in image_ids]
        maps = self._levels(score_maps)
        count = sum(map(len, maps))
        if len(boxes) != count or (ids is not None and len(ids) != count):
            found = f"{count} score maps, {len(boxes)} entries of boxes and {len(ids or boxes)} ids"
            raise ValueError(f"expected as many of each, got {found}")
        names = ids or [f"image {self._n + i}" for i in range(count)]
        if self.resolution == "native":
            _check_native([each.shape[1:] for each in maps for _ in each], image_sizes, names)
        known = [check_boxes(each, name) for each, name in zip(boxes, names, strict=True)]
        flags = [_flags(each, count, name) for each, name in ((class_correct, "class_correct"),
                                                              (class_correct_top5, "class_correct_top5"))]  # fmt: skip
        self._remember(ids, count, flags)
        begin = 0
        for grey in maps:
            part = slice(begin, begin + len(grey))
            begin += len(grey)
            task = (grey, known[part], [None if each is None else each[part] for each in flags])
            if self._pool is None:
                self._add(self._score(*task))
            else:
                self._waiting.append(self._pool.submit(self._score, *task))
                self._collect(self._most_waiting)

    def compute(self) -> BoxResult:
        """The result over all images so far. RuntimeError when there are none."""
        self._collect()
        if not self._n:
            raise RuntimeError("no image was added: call update first")
        curves = [100 * self._counts[name] / self._n for name in COUNTS]
        return BoxResult(
            self.iou_thresholds,
            self.taus,
            curves[0],
            curves[1] if self._with_class else None,
            curves[2] if self._with_top5 else None,
            self._n,
            self.contours,
            self.box_convention,
            np.concatenate(self._bits) if self.keep_images else None,
            tuple(self._ids),
        )

    def state_dict(self) -> dict[str, Any]:
        """Options and counts, as tensors and plain values that torch.load(weights_only=True) accepts."""
        self._collect()
        state: dict[str, Any] = {"options": self._options(), "n": self._n, "image_ids": list(self._ids)}
        state |= {"with_class": self._with_class, "with_top5": self._with_top5}
        state |= {name: torch.from_numpy(each.copy()) for name, each in self._counts.items()}
        return state | {"images": [torch.from_numpy(each) for each in self._bits]}

    def load_state_dict(self, state: dict[str, Any], add: bool = False) -> None:
        """Take over a state, or add it to this one. ValueError for a state of other options or with known ids."""
        if state["options"] != self._options():
            raise ValueError(f"expected a state with options {self._options()}, got {state['options']}")
        if not add:
            self.reset()
        self._collect()
        self.check_new(state["image_ids"])
        for mine, its in ((self._with_class, state["with_class"]), (self._with_top5, state["with_top5"])):
            if self._n and state["n"] and bool(mine) != bool(its):
                raise ValueError("class_correct was given for one part of the images and not for the other")
        if self._n and state["n"] and bool(self._ids) != bool(state["image_ids"]):
            raise ValueError("image_ids were given for one part of the images and not for the other")
        self._n += state["n"]
        self._with_class += state["with_class"]
        self._with_top5 += state["with_top5"]
        self._ids |= dict.fromkeys(state["image_ids"])
        for name in COUNTS:
            self._counts[name] += state[name].numpy()
        self._bits += [each.numpy() for each in state["images"]]

    def _options(self) -> dict[str, Any]:
        options = {"iou_thresholds": list(self.iou_thresholds), "thresholds": len(self.taus), "contours": self.contours}
        return options | {"box_convention": self.box_convention, "keep_images": self.keep_images}

    def _levels(self, maps: Maps) -> list[np.ndarray]:
        """Stacks (n, H, W) of uint8 maps; ValueError for a wrong shape."""
        given = as_maps(maps)
        grey = [check_maps(given)] if isinstance(given, Tensor) else [check_maps(each[None]) for each in given]
        for each in grey:
            if self.resolution != "native" and self.resolution != each.shape[1:]:
                height, width = self.resolution
                raise ValueError(
                    f"score_maps: expected maps of {height} x {width}, got {each.shape[1]} x {each.shape[2]}; "
                    "resize them (wsol_eval.resize_normalize)"
                )
        return grey

    def _remember(self, ids: list[str] | None, count: int, flags: list[np.ndarray | None]) -> None:
        """Count the images, after checking that ids and flags go on as they began."""
        if self._n and count:
            begun = (bool(self._ids), bool(self._with_class), bool(self._with_top5))
            for was, now, name in zip(begun, (ids, *flags), ("image_ids", "class_correct", "class_correct_top5"),
                                      strict=True):  # fmt: skip
                if was != (now is not None):
                    raise ValueError(f"{name}: give it in every update or in none")
        if ids is not None:
            self.check_new(ids)
            self._ids |= dict.fromkeys(ids)
        self._n += count
        self._with_class += count if flags[0] is not None else 0
        self._with_top5 += count if flags[1] is not None else 0

    def _score(self, grey: np.ndarray, boxes: list[np.ndarray], flags: list) -> tuple[np.ndarray, list]:
        best = level_iou(grey, boxes, self.contours, self.box_convention)  # (n, 256)
        reached = best[:, None] >= np.array(self.iou_thresholds)[:, None]  # (n, D, 256)
        correct = at_thresholds(reached, grey, self.taus)  # (n, D, T)
        counts = [correct.sum(0), *(None if each is None else correct[each].sum(0) for each in flags)]
        return np.packbits(correct, -1) if self.keep_images else np.zeros(0, np.uint8), counts

    def _add(self, scored: tuple[np.ndarray, list]) -> None:
        bits, counts = scored
        if self.keep_images:
            self._bits.append(bits)
        for name, each in zip(COUNTS, counts, strict=True):
            if each is not None:
                self._counts[name] += each

    def _collect(self, leave: int = 0) -> None:
        while len(self._waiting) > leave:
            self._add(self._waiting.popleft().result())


def _check_native(
    shapes: list[tuple[int, int]], image_sizes: Sequence[tuple[int, int]] | None, names: Sequence[str]
) -> None:
    """ValueError unless every map has its image's size."""
    if image_sizes is None or len(image_sizes) != len(shapes):
        raise ValueError(f"image_sizes: resolution='native' needs width and height of all {len(shapes)} images")
    for name, (height, width), wanted in zip(names, shapes, image_sizes, strict=True):
        if (width, height) != tuple(wanted):
            raise ValueError(
                f"{name}: a native map has its image's size, {wanted[0]} x {wanted[1]} pixels, got {width} x {height}; "
                "resize it (wsol_eval.resize_normalize, or `score --resize`)"
            )


def _flags(flags: Sequence[bool] | np.ndarray | Tensor | None, count: int, name: str) -> np.ndarray | None:
    if flags is None:
        return None
    array = flags.cpu().numpy() if isinstance(flags, Tensor) else np.asarray(flags)
    if array.dtype != bool or array.shape != (count,):
        raise ValueError(f"{name}: expected {count} booleans, got {array.dtype} of shape {array.shape}")
    return array
