"""`build_model`, and pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_utils.files import whole_file
from wsol_eval.models import efficientnet, inception, resnet, small, vgg
from wsol_eval.models.network import WSOLNetwork

ARCHITECTURES = ("vgg16", "inception_v3", "resnet50", "efficientnet_lite0", "small")
METHODS = ("cam", "has", "acol", "spg", "adl", "cutmix", "fsl")  # has and cutmix train the network of cam
MAP_SIZES = {"small": (4, 8, 14, 28), "efficientnet_lite0": (7, 14, 28)}
DEFAULTS = {
    "acol_threshold": 0.7,
    "adl_drop_rate": 0.75,
    "adl_threshold": 0.9,
    "spg": ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1)),
}
PRETRAINED = {"vgg16": "VGG16_Weights", "inception_v3": "Inception_V3_Weights", "resnet50": "ResNet50_Weights"}


def build_model(
    arch: str, method: str, num_classes: int, feature_map: int = 14, pretrained: str | Path | None = None, **hp: Any
) -> WSOLNetwork:
    """A classifier with score maps.

    Args:
        arch: vgg16, inception_v3, resnet50, efficientnet_lite0 (224 x 224 images), or small (32 x 32, or 224 x 224).
        method: cam, has, acol, spg, adl, cutmix or fsl.
        num_classes: of the logits; fsl has none.
        feature_map: side of the score map: 14 or 28 (the reference's large_feature_map); also 4 or 8 for small, 7 for
            efficientnet_lite0.
        pretrained: None; "imagenet" for torchvision's ImageNet weights (downloaded, checked by hash), or those of an
            installed package (efficientnet_lite0); or a file with such a state dict.
        hp: acol_threshold, adl_drop_rate, adl_threshold, spg ((high, low) of B2, B1 and C).

    Raises:
        ValueError: an unknown name, or weights of another network.
        FileNotFoundError: no such file of weights.
    """
    for what, value, valid in (
        ("arch", arch, ARCHITECTURES),
        ("method", method, METHODS),
        ("feature_map", feature_map, MAP_SIZES.get(arch, (14, 28))),
        *(("hyperparameter", name, tuple(DEFAULTS)) for name in hp),
    ):
        if value not in valid:
            raise ValueError(f"{what}: expected one of {', '.join(map(str, valid))}, got {value!r}")
    builder = {"vgg16": vgg.vgg16, "inception_v3": inception.inception_v3, "resnet50": resnet.resnet50}
    builder |= {"efficientnet_lite0": efficientnet.efficientnet_lite0, "small": small.small}
    network = builder[arch](method, num_classes, feature_map, DEFAULTS | hp)
    he = arch == "small" or (arch == "vgg16" and method != "acol" and method != "spg")
    for module in network.modules():
        _initialize(module, he)
    if pretrained is not None:
        _load(network, arch, pretrained)
    return network


def _initialize(module: nn.Module, he: bool) -> None:
    """He or Xavier for convolutions, N(0, .01) for linear layers, zero biases."""
    if isinstance(module, nn.Conv2d):
        if he:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _load(network: WSOLNetwork, arch: str, pretrained: str | Path) -> None:
    renames = {"vgg16": vgg.rename, "inception_v3": inception.rename, "resnet50": resnet.rename}
    renames |= {"efficientnet_lite0": efficientnet.rename}
    if arch not in renames:
        raise ValueError(f"pretrained: {arch} has no pretrained weights")
    if pretrained == "imagenet" and arch in PRETRAINED:
        state = _downloaded(arch)
    else:
        file = efficientnet.weights_file() if pretrained == "imagenet" else Path(pretrained)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a state dict of {arch} with ImageNet weights is expected")
        state = torch.load(file, map_location="cpu", weights_only=True)
    try:
        renamed = renames[arch](state, network)
        unexpected = network.load_state_dict(renamed, strict=False).unexpected_keys
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{pretrained}: these are not weights of {arch} ({error})") from error
    if unexpected or not renamed:
        reason = f"unexpected {unexpected[0]}" if unexpected else "none of its names"
        raise ValueError(f"{pretrained}: these are not weights of {arch} ({reason})")


def _downloaded(arch: str) -> dict:
    import torchvision.models

    return getattr(torchvision.models, PRETRAINED[arch]).IMAGENET1K_V1.get_state_dict(check_hash=True)


def save_weights(arch: str, path: Path) -> Path:
    """Torchvision's ImageNet weights as a file, written whole or not at all; one that is there is kept."""
    if arch not in PRETRAINED:
        raise ValueError(f"arch: expected one of {', '.join(PRETRAINED)}, got {arch!r}")
    if not path.is_file():
        weights = _downloaded(arch)
        with whole_file(path) as temporary:
            torch.save(weights, temporary)
    return path
