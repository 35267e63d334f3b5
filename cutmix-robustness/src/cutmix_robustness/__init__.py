"""CutMix and competing methods, judged by clean error, robustness and uncertainty (arXiv 1905.04899 and 2003.03879).

The public names are loaded on first use, so `from cutmix_robustness import CutMix` loads little more than torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "attacks": ("fgsm", "pgd"),
    "corruption_error": ("mean_corruption_error",),
    "corruptions": ("CORRUPTIONS", "EXTRA_CORRUPTIONS", "corrupt"),
    "cutmix": ("CutMix", "MixedBatch", "cutmix_box", "mixed_cross_entropy", "sample_boxes"),
    "dropout": ("Cutout", "DropBlock2d", "ShakeDrop", "StochasticDepth"),
    "data.benchmark": ("benchmark_of", "folder_benchmark"),
    "evaluation": ("evaluate",),
    "foreign": ("load_model",),
    "localization": ("cam_box", "class_activation_map", "localization_accuracy"),
    "mixup": ("ManifoldMix", "Mixup", "MixupCutMix"),
    "networks": ("Classifier", "WideResNet", "pyramidnet", "resnet_cifar", "resnet_imagenet"),
    "occlusion": ("in_between", "occlude"),
    "uncertainty": (
        "adaptive_calibration_error", "calibration_error", "confidence", "mahalanobis_scores", "odin_scores",
        "ood_metrics", "ood_scores", "temperature",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public API, by name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
