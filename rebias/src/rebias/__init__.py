"""ReBias: de-biased representations by independence from biased ones (arXiv 1910.02806).

Names are imported on first use, so the command line's --help does not load torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BagNet18": "models",
    "BiasedDigits": "data.biased",
    "ColoredMNIST": "data.grouped",
    "LearnedMixinLoss": "objectives",
    "RUBiLoss": "objectives",
    "ReBiasLoss": "objectives",
    "ResNet18": "models",
    "ResNet3D": "models",
    "SimpleConvNet": "models",
    "assign_bias": "data.biased",
    "bffhq": "data.grouped",
    "biased_mnist": "data.biased",
    "biased_sklearn_digits": "data.biased",
    "celeba": "data.grouped",
    "colourise": "data.biased",
    "conditional_hsic": "independence",
    "csv_set": "data.grouped",
    "group_accuracy": "evaluate",
    "group_report": "evaluate",
    "gram_hsic": "independence",
    "hex_project": "objectives",
    "hsic": "independence",
    "median_sigma": "independence",
    "rbf_gram": "independence",
    "unbiased_accuracy_clusters": "evaluate",
    "waterbirds": "data.grouped",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public API, by name."""
    if name not in _HOME:
        raise AttributeError(f"module 'rebias' has no attribute {name!r}")
    return getattr(import_module(f"rebias.{_HOME[name]}"), name)
