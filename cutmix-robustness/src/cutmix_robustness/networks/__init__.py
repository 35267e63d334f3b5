"""The networks of both papers, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from cutmix_robustness.networks.blocks import BRANCHES, Classifier
from cutmix_robustness.networks.pyramidnet import PyramidNet, pyramidnet
from cutmix_robustness.networks.resnet import WideResNet, resnet_cifar, resnet_imagenet
from cutmix_robustness.networks.small import SmallNet
from cutmix_robustness.networks.vgg_gap import VggGap

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallNet,
    "small-wide": partial(SmallNet, width=32, stem_stride=2),
    "resnet20": partial(resnet_cifar, 20, bottleneck=False),
    "resnet110": partial(resnet_cifar, 110),
    "wrn16-2": partial(WideResNet, 16, 2),
    "wrn28-10": partial(WideResNet, 28, 10),
    "pyramidnet110-64": partial(pyramidnet, 110, 64),
    "pyramidnet200-240": partial(pyramidnet, 200, 240),
    "resnet14": partial(resnet_imagenet, "resnet14"),
    "resnet50": partial(resnet_imagenet, "resnet50"),
    "resnet101": partial(resnet_imagenet, "resnet101"),
    "resnext101": partial(resnet_imagenet, "resnext101_32x4d"),
    "resnet50-dense": partial(resnet_imagenet, "resnet50", dense_features=True),
    "vgg-gap": VggGap,
}

__all__ = [
    "BRANCHES", "NETWORKS", "Classifier", "PyramidNet", "SmallNet", "VggGap", "WideResNet", "pyramidnet",
    "resnet_cifar", "resnet_imagenet",
]  # fmt: skip
