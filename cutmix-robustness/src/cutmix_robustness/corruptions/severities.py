"""The constants of the 19 corruptions: five severities, for CIFAR-C and for ImageNet-C.

Each entry is a tuple over severities 1 to 5; the comment names what one severity holds. Lengths are in pixels and
intensities in [0, 1] unless stated otherwise. The source is the published generation scripts of Hendrycks and
Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019); that of
elastic_transform for ImageNet-C is the package `imagecorruptions`, see `corrupt`.
"""

from __future__ import annotations

import numpy as np


def _factors(stop: float, step: float) -> tuple[float, ...]:
    """1, 1 + step, ... as np.arange rounds them: it keeps the stops 1.06 and 1.11, which the benchmark relies on."""
    return tuple(np.arange(1, stop, step).tolist())


CIFAR: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # sigma
    "shot_noise": (500, 250, 100, 75, 50),  # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values replaced
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # sigma relative to the value
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # disk radius, its smoothing sigma
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # sigma
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # sigma, largest move, passes
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, sigma
    "zoom_blur": tuple(_factors(stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),  # zoom factors
    "snow": (  # mean and sigma of the flakes, zoom, threshold, motion radius and sigma, share of the image kept
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weight of the image, of the texture
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # strength, decay of the roughness per level
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to V of HSV
    "spatter": (  # mean and sigma of the liquid, its smoothing, threshold, strength (mud: smoothing), mud?
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor about the mean of the channel
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # S of HSV: factor, offset
    "elastic_transform": (  # displacement, its smoothing sigma, jitter of the affine map; False: all in pixels
        (0.0, 0.0, 32 * 0.08, False),
        (32 * 0.05, 32 * 0.2, 32 * 0.07, False),
        (32 * 0.08, 32 * 0.06, 32 * 0.06, False),
        (32 * 0.1, 32 * 0.04, 32 * 0.05, False),
        (32 * 0.1, 32 * 0.03, 32 * 0.03, False),
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # size of the small image relative to the image
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
}

IMAGENET: dict[str, tuple] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": (
        _factors(1.11, 0.01),
        _factors(1.16, 0.01),
        _factors(1.21, 0.02),
        _factors(1.25, 0.02),
        _factors(1.31, 0.03),
    ),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    ),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "elastic_transform": (  # True: displacement and sigma relative to the size of the image; no affine map
        (0.005 * 250 * 0.05, 0.01, 0.0, True),
        (0.005 * 250 * 0.065, 0.01, 0.0, True),
        (0.005 * 250 * 0.085, 0.01, 0.0, True),
        (0.005 * 250 * 0.1, 0.01, 0.0, True),
        (0.005 * 250 * 0.12, 0.01, 0.0, True),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}

SEVERITIES = {"cifar": CIFAR, "imagenet": IMAGENET}
