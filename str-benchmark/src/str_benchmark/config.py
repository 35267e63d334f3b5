"""What a recognizer is made of: one choice per stage, and the names the field gives to seven of the 24 combinations."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from str_benchmark.charset import resolve_charset

STAGES = {
    "trans": ("None", "TPS"),
    "feat": ("VGG", "RCNN", "ResNet"),
    "seq": ("None", "BiLSTM"),
    "pred": ("CTC", "Attn"),
}
COMBINATIONS = tuple("-".join(stages) for stages in product(*STAGES.values()))
KNOWN_AS = {
    "CRNN": "None-VGG-BiLSTM-CTC",
    "RARE": "TPS-VGG-BiLSTM-Attn",
    "R2AM": "None-RCNN-None-Attn",
    "STAR-Net": "TPS-ResNet-BiLSTM-CTC",
    "GRCNN": "None-RCNN-BiLSTM-CTC",
    "Rosetta": "None-ResNet-None-CTC",
    "TRBA": "TPS-ResNet-BiLSTM-Attn",
}
CTC_HEADS = ("released", "paper")
MIN_SIZE = (32, 16)  # (height, width): below it the backbones have no column left


@dataclass(frozen=True)
class STRConfig:
    """A recognizer; the defaults are the paper's TRBA."""

    trans: str = "TPS"
    feat: str = "ResNet"
    seq: str = "BiLSTM"
    pred: str = "Attn"
    charset: str = "36"
    """"36", "62", "94", or the characters themselves"""
    max_length: int = 25
    """characters of the longest word"""
    img_size: tuple[int, int] = (32, 100)
    """height and width of the input image"""
    variable_width: bool = False
    """accept any width, and let `predict` keep each image's aspect ratio; not with TPS"""
    in_channels: int = 1
    """1 (gray) or 3 (RGB)"""
    output_channel: int = 512
    """channels of the feature map; all convolutions scale with it"""
    hidden_size: int = 256
    """size of the LSTMs"""
    num_fiducial: int = 20
    """number of TPS's fiducial points, F"""
    localization_channel: int = 512
    """channels of TPS's localization network"""
    ctc_head: str = "released"
    """after a BiLSTM: "released" (Linear 512-256, 256-K, as the public checkpoints) or "paper" (Linear 512-K)"""

    def __post_init__(self) -> None:
        for stage, choices in STAGES.items():
            if getattr(self, stage) not in choices:
                raise ValueError(f"{stage}: expected one of {', '.join(choices)}, got {getattr(self, stage)!r}")
        if self.ctc_head not in CTC_HEADS:
            raise ValueError(f"ctc_head: expected one of {', '.join(CTC_HEADS)}, got {self.ctc_head!r}")
        object.__setattr__(self, "charset", resolve_charset(self.charset))
        object.__setattr__(self, "img_size", tuple(self.img_size))
        if len(self.img_size) != 2 or any(a < b for a, b in zip(self.img_size, MIN_SIZE, strict=True)):
            raise ValueError(f"img_size: expected (height, width) of at least {MIN_SIZE}, got {self.img_size}")
        if self.variable_width and self.trans == "TPS":
            raise ValueError("variable_width: TPS rectifies images of one size only; use a network without it")
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels: expected 1 or 3, got {self.in_channels}")
        for name, divisor in (("output_channel", 16), ("localization_channel", 8)):
            if getattr(self, name) < divisor or getattr(self, name) % divisor:
                raise ValueError(f"{name}: expected a multiple of {divisor}, got {getattr(self, name)}")
        if self.num_fiducial < 4 or self.num_fiducial % 2:
            raise ValueError(f"num_fiducial: expected an even number of at least 4, got {self.num_fiducial}")
        if self.max_length < 1 or self.hidden_size < 1:
            raise ValueError(f"max_length, hidden_size: expected 1 or more, got {self.max_length}, {self.hidden_size}")

    @property
    def name(self) -> str:
        """Such as "TPS-ResNet-BiLSTM-Attn"."""
        return f"{self.trans}-{self.feat}-{self.seq}-{self.pred}"

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> STRConfig:
        """A combination ("TPS-ResNet-BiLSTM-Attn") or a known name ("TRBA").

        Raises:
            ValueError: another name; the message lists the valid ones.
        """
        combination = KNOWN_AS.get(name, name)
        if combination not in COMBINATIONS:
            near = difflib.get_close_matches(name, [*KNOWN_AS, *COMBINATIONS], 1, 0.0)
            valid = ", ".join([*KNOWN_AS, *COMBINATIONS])
            raise ValueError(f"model: unknown name {name!r}; did you mean {near[0]!r}? Valid names: {valid}")
        trans, feat, seq, pred = combination.split("-")
        return replace(cls(trans, feat, seq, pred), **changes)
