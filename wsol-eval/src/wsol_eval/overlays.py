"""Score maps over their images, with boxes, as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wsol_eval.sweep import boxes_at_threshold

STOPS = np.array([[0, 0, 0.5], [0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [0.5, 0, 0]])  # blue over green to red


def heat(score_map: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8 colours."""
    place = np.clip(score_map, 0, 1) * (len(STOPS) - 1)
    channels = [np.interp(place, range(len(STOPS)), STOPS[:, c]) for c in range(3)]
    return (np.stack(channels, -1) * 255).round().astype(np.uint8)


def overlay(
    image: Image.Image, score_map: np.ndarray, boxes: np.ndarray, tau: float, alpha: float = 0.5
) -> Image.Image:
    """The image at the map's size under the map: ground truth red, the largest contour at tau green.

    Args:
        image: of any size.
        score_map: (H, W) in [0, 1].
        boxes: (k, 4) in pixels of the map; (0, 4) for none.
        tau: threshold of the drawn box.
        alpha: weight of the map.
    """
    height, width = score_map.shape
    base = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    drawn = Image.blend(base, Image.fromarray(heat(score_map)), alpha)
    pen = ImageDraw.Draw(drawn)
    for box in boxes:
        pen.rectangle([int(value) for value in box], outline=(255, 0, 0), width=2)
    pen.rectangle(
        [int(value) for value in boxes_at_threshold(score_map, tau, "largest")[0]], outline=(0, 255, 0), width=2
    )
    return drawn


def save_overlay(path: Path, drawn: Image.Image) -> None:
    """Write a PNG, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(path)
