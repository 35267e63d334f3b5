"""torchvision's ResNet50 with fewer strides: layer4 keeps the size, and so does layer3 for 28x28 maps."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import resnet50 as torchvision_resnet50
from torchvision.models.resnet import Bottleneck

from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, FslHead, Head, LinearHead, SpgHead
from wsol_eval.models.network import WSOLNetwork

PARTS = {  # where the layers of torchvision's network went
    "low.0.": "conv1.",
    "low.1.": "bn1.",
    "low.4.": "layer1.",
    "low.5.": "layer2.",
    "low.6.": "layer3.0.",
}


def resnet50(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """See `build_model`."""
    base = torchvision_resnet50(weights=None)
    for layer in [base.layer4, base.layer3] if size == 28 else [base.layer4]:
        _keep_size(layer[0])

    def adl() -> list[nn.Module]:
        return [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []

    low = nn.Sequential(
        base.conv1, base.bn1, base.relu, base.maxpool, base.layer1, base.layer2, base.layer3[0], *adl()
    )  # fmt: skip
    middle = nn.Sequential(*base.layer3[1:])
    top = nn.Sequential(base.layer4[0], *adl(), base.layer4[1], base.layer4[2], *adl())
    head: Head
    if method == "acol":
        head = AcolHead(2048, num_classes, hp["acol_threshold"], (1024, 1024))
    elif method == "spg":
        head = SpgHead((1024, 1024, 2048), num_classes, hp["spg"], 1024, 512)
    else:
        head = FslHead(2048) if method == "fsl" else LinearHead(2048, num_classes)
    # the reference counts layer4 and fc as new, and forgets the heads of ACoL and SPG
    return WSOLNetwork(low, middle, top, head, lambda name: name.startswith(("top.", "head.fc.", "head.pixel.")))


def _keep_size(block: Bottleneck) -> None:
    block.stride = 1
    block.conv2.stride = block.downsample[0].stride = (1, 1)


def rename(state: dict, network: WSOLNetwork) -> dict:
    """A state dict of torchvision's resnet50 with the names of `network`."""
    blocks = {f"middle.{i}.": f"layer3.{i + 1}." for i in range(5)}
    places = [index for index, layer in enumerate(network.top.children()) if isinstance(layer, Bottleneck)]
    blocks |= {f"top.{place}.": f"layer4.{i}." for i, place in enumerate(places)}
    renamed: dict[str, Any] = {}
    for ours, theirs in (PARTS | blocks).items():
        renamed |= {ours + name[len(theirs) :]: each for name, each in state.items() if name.startswith(theirs)}
    return renamed
