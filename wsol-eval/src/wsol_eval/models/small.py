"""The network of the embedded experiment: five convolutions on 32 x 32 images, 8 x 8 or 4 x 4 maps."""

from __future__ import annotations

from torch import nn

from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, ConvHead, FslHead, Head, SpgHead, conv
from wsol_eval.models.network import WSOLNetwork


def small(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """See `build_model`; `size` is 8 or 4."""

    def adl() -> list[nn.Module]:
        return [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []

    first = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
    low = nn.Sequential(first, conv(16, 32), nn.MaxPool2d(2))
    middle = nn.Sequential(conv(32, 48), *adl(), *([nn.MaxPool2d(2)] if size == 4 else []))
    top = nn.Sequential(conv(48, 48), *adl())
    head: Head
    if method == "acol":
        head = AcolHead(48, num_classes, hp["acol_threshold"], (48,))
    elif method == "spg":
        head = SpgHead((32, 48, 48), num_classes, hp["spg"], 24, 24)
    else:
        head = FslHead(48) if method == "fsl" else ConvHead(48, num_classes)
    return WSOLNetwork(low, middle, top, head, lambda name: False)
