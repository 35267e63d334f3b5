"""torchvision's InceptionV3 up to Mixed_6e for 224 x 224 images, with padding where the reference pads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC

from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, ConvHead, FslHead, Head, SpgHead, conv
from wsol_eval.models.network import WSOLNetwork

STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "")
LOW = (*STEM, "Mixed_5b", "Mixed_5c", "Mixed_5d")
MIDDLE = ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d")


class KeepSize(InceptionB):
    """Mixed_6a with stride 1 and padding 1."""

    def __init__(self, channels: int):
        super().__init__(channels)
        for part in (self.branch3x3, self.branch3x3dbl_3):
            part.conv.stride, part.conv.padding = (1, 1), (1, 1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, max_pool2d(x, 3, stride=1, padding=1)]


def inception_v3(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """Mixed_5d is pooled for 14x14. See `build_model`."""

    def adl() -> list[nn.Module]:
        return [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)

    low = nn.Sequential(
        BasicConv2d(3, 32, kernel_size=3, stride=2, padding=1),
        BasicConv2d(32, 32, kernel_size=3),
        BasicConv2d(32, 64, kernel_size=3, padding=1),
        pool(),
        BasicConv2d(64, 80, kernel_size=1),
        BasicConv2d(80, 192, kernel_size=3),
        pool(),
        InceptionA(192, pool_features=32),
        InceptionA(256, pool_features=64),
        InceptionA(288, pool_features=64),
        *adl(),
        *([nn.MaxPool2d(3, 2, ceil_mode=True)] if size == 14 else []),
    )
    middle = nn.Sequential(KeepSize(288), *(InceptionC(768, channels_7x7=width) for width in (128, 160, 160)))
    last, dropout = InceptionC(768, channels_7x7=192), 0.0 if method == "adl" else 0.5
    head: Head
    if method == "acol":
        top, head = [last], AcolHead(768, num_classes, hp["acol_threshold"], (1024, 1024))
    else:
        drops = [] if method == "adl" else [nn.Dropout(0.5)]
        top = [last, *adl(), *drops, conv(768, 1024), *drops, conv(1024, 1024), *adl()]
        if method == "spg":
            head = SpgHead((288, 768, 1024), num_classes, hp["spg"], 512, 512, dropout)
        else:
            head = FslHead(1024) if method == "fsl" else ConvHead(1024, num_classes, dropout)
    # new: everything that is no Conv2d_* or Mixed_*
    return WSOLNetwork(
        low, middle, nn.Sequential(*top), head, lambda name: not name.startswith(("low.", "middle.", "top.0."))
    )


def rename(state: dict, network: WSOLNetwork) -> dict:
    """A state dict of torchvision's inception_v3 with the names of `network`."""
    places = {f"low.{i}.": f"{name}." for i, name in enumerate(LOW) if name}
    places |= {f"middle.{i}.": f"{name}." for i, name in enumerate(MIDDLE)} | {"top.0.": "Mixed_6e."}
    renamed: dict[str, Any] = {}
    for ours, theirs in places.items():
        renamed |= {ours + name[len(theirs) :]: each for name, each in state.items() if name.startswith(theirs)}
    return renamed
