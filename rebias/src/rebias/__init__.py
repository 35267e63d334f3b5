"""ReBias: de-biased representations by independence from biased ones (arXiv 1910.02806)."""

from rebias.data.biased import (
    BiasedDigits,
    assign_bias,
    biased_mnist,
    biased_sklearn_digits,
    colourise,
)
from rebias.evaluate import group_accuracy, unbiased_accuracy_clusters
from rebias.hsic import conditional_hsic, gram_hsic, hsic, median_sigma, rbf_gram
from rebias.models import BagNet18, ResNet3D, ResNet18, SimpleConvNet
from rebias.objectives import LearnedMixinLoss, ReBiasLoss, RUBiLoss, hex_project

__all__ = [
    "BagNet18",
    "BiasedDigits",
    "LearnedMixinLoss",
    "RUBiLoss",
    "ReBiasLoss",
    "ResNet18",
    "ResNet3D",
    "SimpleConvNet",
    "assign_bias",
    "biased_mnist",
    "biased_sklearn_digits",
    "colourise",
    "conditional_hsic",
    "group_accuracy",
    "gram_hsic",
    "hex_project",
    "hsic",
    "median_sigma",
    "rbf_gram",
    "unbiased_accuracy_clusters",
]
