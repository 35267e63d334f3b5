"""VGG16 (Simonyan and Zisserman) without its fully connected layers, convolutions numbered as torchvision's."""

from __future__ import annotations

from torch import nn

from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, FslHead, Head, LinearHead, SpgHead, conv
from wsol_eval.models.network import WSOLNetwork

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their numbers in torchvision's `features`


def vgg16(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """14x14 drops the last pool, 28x28 the last two. See `build_model`."""
    blocks, channels = [], 3
    for widths in BLOCKS:
        layers = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        blocks.append(layers)
    wide = method == "acol"  # overlapping pools, and two of stride 1 in place of the dropped ones

    def pool(stride: int = 2) -> list[nn.Module]:
        return [nn.MaxPool2d(3, stride, 1) if wide else nn.MaxPool2d(2, 2)]

    fourth = pool() if size == 14 else (pool(1) if wide else [])
    if method == "spg":
        fourth = [nn.MaxPool2d(3, 2, 1)] if size == 14 else []
    adl = [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []
    low = [*blocks[0], *pool(), *blocks[1], *pool(), *blocks[2], *pool(), *adl, *blocks[3], *adl, *fourth]
    middle = [*blocks[4], *adl, *(pool(1) if wide else [])]
    top: list[nn.Module] = [conv(512, 1024)]
    head: Head
    if method == "acol":
        top, head = [], AcolHead(512, num_classes, hp["acol_threshold"], (1024, 1024), pool=True)
    elif method == "spg":
        top, head = [conv(512, 512), conv(512, 512)], SpgHead((512, 512, 512), num_classes, hp["spg"], 512, 512)
    else:
        head = FslHead(1024) if method == "fsl" else LinearHead(1024, num_classes)
    # slow: what the reference calls `features`; SPG has moved conv4 and conv5 out of it
    slow = tuple(f"low.{i}." for i in range(17)) if method == "spg" else ("low.", "middle.")
    first, second, third = (nn.Sequential(*layers) for layers in (low, middle, top))
    return WSOLNetwork(first, second, third, head, lambda name: not name.startswith(slow))


def rename(state: dict, network: WSOLNetwork) -> dict:
    """A state dict of torchvision's vgg16 with the names of `network`."""
    convolutions = [
        f"{part}.{index}"
        for part in ("low", "middle")
        for index, layer in enumerate(getattr(network, part))
        if isinstance(layer, nn.Conv2d)
    ]
    return {
        f"{ours}.{kind}": state[f"features.{theirs}.{kind}"]
        for ours, theirs in zip(convolutions, CONVOLUTIONS, strict=True)
        for kind in ("weight", "bias")
    }
