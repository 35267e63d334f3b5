"""Mean corruption error over 15 corruptions x 5 severities (2003.03879, section 3; ImageNet-C's definition)."""

from __future__ import annotations

import numpy as np

from cutmix_robustness.corruptions import GROUPS

ALEXNET_ERROR = {  # AlexNet's mean over severities on ImageNet-C, from AugMix's evaluation
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.92264,
    "defocus_blur": 0.81988, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.79836,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.71784, "jpeg_compression": 0.6065,
}  # fmt: skip
ALEXNET_CLEAN_ERROR = 0.43454


def mean_corruption_error(
    errors: np.ndarray, normalize: str | None = None, dataset: str = "imagenet", clean_error: float | None = None
) -> dict[str, float]:
    """Mean over the 15 corruptions of each one's mean error over severities, and the means of the four groups.

    Args:
        errors: (15, 5) error rates in the order of `CORRUPTIONS`; in any unit if not normalised.
        normalize: None, or "alexnet": each corruption's error divided by AlexNet's on ImageNet-C. Then `errors` are
            fractions, and so is the result.
        dataset: "imagenet", or "cifar", for which no AlexNet errors exist.
        clean_error: error on the same images without corruption, in the unit of `errors`; each error (and AlexNet's:
            relative mCE) is then replaced by its rise over it, so that clean accuracy alone does not count.

    Returns:
        `mean`, `noise`, `blur`, `weather`, `digital`.

    Raises:
        ValueError: another shape, NaN, an unknown normalisation, or AlexNet's for CIFAR.
    """
    errors = np.asarray(errors, float)
    if errors.shape != (15, 5) or np.isnan(errors).any():
        raise ValueError(f"errors must be (15, 5) without NaN (without the four extra corruptions), got {errors.shape}")
    if normalize not in (None, "alexnet"):
        raise ValueError(f"normalize must be None or 'alexnet', got {normalize!r}")
    if normalize and dataset != "imagenet":
        raise ValueError(f"normalize='alexnet' exists only for ImageNet-C, not for {dataset}: use None")
    own, alexnet = (0.0, 0.0) if clean_error is None else (clean_error, ALEXNET_CLEAN_ERROR)
    each = dict(zip(ALEXNET_ERROR, errors.mean(1) - own, strict=True))
    if normalize:
        each = {name: error / (ALEXNET_ERROR[name] - alexnet) for name, error in each.items()}
    groups = {group: float(np.mean([each[name] for name in names])) for group, names in GROUPS.items()}
    return {"mean": float(np.mean(list(each.values()))), **groups}
