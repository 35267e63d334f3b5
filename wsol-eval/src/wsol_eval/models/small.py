"""The network of the embedded experiment: five convolutions on 32 x 32 images, 8 x 8 or 4 x 4 maps.

On 224 x 224 images two more poolings give the maps of the paper's networks, 28 x 28 or 14 x 14 (the rehearsal's).
"""

from __future__ import annotations

from torch import nn

from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, ConvHead, FslHead, Head, SpgHead
from wsol_eval.models.network import WSOLNetwork


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def small(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """See `build_model`; `size` is 8 or 4, or 28 or 14."""

    def adl() -> list[nn.Module]:
        return [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []

    large = size in (14, 28)
    low = nn.Sequential(block(3, 16, stride=2), block(16, 32), nn.MaxPool2d(4 if large else 2))
    middle = nn.Sequential(block(32, 48), *adl(), *([nn.MaxPool2d(2)] if size in (4, 14) else []))
    top = nn.Sequential(block(48, 48), *adl())
    head: Head
    if method == "acol":
        head = AcolHead(48, num_classes, hp["acol_threshold"], (48,))
    elif method == "spg":
        head = SpgHead((32, 48, 48), num_classes, hp["spg"], 24, 24)
    else:
        head = FslHead(48) if method == "fsl" else ConvHead(48, num_classes)
    return WSOLNetwork(low, middle, top, head, lambda name: False)
