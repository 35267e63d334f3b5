"""TwoWave: 16 x 16 textures of two plane waves with noise, generated on the fly; the data of the embedded experiment.

A class is an unordered pair of the first six of twelve waves; pairs of the last six are classes that a classifier has
never seen. An image sums its two waves with random amplitude and phase, adds fine and coarse noise, and passes through
a sigmoid.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

from cutmix_robustness.data.sources import ResidentImages

SIDE, WAVES, CLASSES = 16, 12, 15
MEAN, STD = (0.5,) * 3, (0.25,) * 3
DICTIONARY_SEED = 1905


def _dictionary() -> tuple[np.ndarray, np.ndarray]:
    """Phase of each wave over the image (12, 16, 16), and unit colours (12, 3)."""
    rng = np.random.default_rng(DICTIONARY_SEED)
    frequency = rng.uniform(0.08, 0.38, (WAVES, 2)) * rng.choice([-1, 1], (WAVES, 2))
    colour = rng.normal(size=(WAVES, 3))
    y, x = np.mgrid[:SIDE, :SIDE]
    phase = 2 * np.pi * (frequency[:, :1, None] * x + frequency[:, 1:, None] * y)
    return phase, colour / np.linalg.norm(colour, axis=1, keepdims=True)


def twowave(n: int, seed: int, waves: str = "known") -> ResidentImages:
    """Draw images.

    Args:
        n: number of images.
        seed: seed of all draws; another seed gives other images of the same classes.
        waves: "known" (classes 0 .. 14), "unseen" (pairs of the other six waves) or "none" (background alone); the
            latter two carry label 0.

    Raises:
        ValueError: an unknown kind.
    """
    if waves not in ("known", "unseen", "none"):
        raise ValueError(f"waves must be known, unseen or none, got {waves!r}")
    rng = np.random.default_rng([seed, ("known", "unseen", "none").index(waves)])
    phase, colour = _dictionary()
    pairs = np.array(list(combinations(range(6), 2)))
    labels = rng.integers(CLASSES, size=n)
    pair = pairs[labels] + (6 if waves == "unseen" else 0)  # (n, 2)
    amplitude, shift = rng.uniform(0.5, 1.5, (n, 2)), rng.uniform(0, 2 * np.pi, (n, 2))
    wave = amplitude[..., None, None] * 1.7 * np.sin(phase[pair] + shift[..., None, None])  # (n, 2, 16, 16)
    signal = np.einsum("nphw,npc->nchw", wave, colour[pair])
    small = torch.from_numpy(rng.normal(size=(n, 3, 3, 3)))
    coarse = F.interpolate(small, SIDE, mode="bilinear", align_corners=False).numpy()
    noise = 2.0 * (rng.normal(size=(n, 3, SIDE, SIDE)) + 0.8 * coarse)
    pixels = 1 / (1 + np.exp(-0.6 * (noise + (0 if waves == "none" else signal))))
    images = torch.from_numpy((255 * pixels).round().astype(np.uint8))
    known = torch.from_numpy(labels) if waves == "known" else torch.zeros(n, dtype=torch.int64)
    return ResidentImages(images, known, f"TwoWave, {waves} waves, seed {seed}")
