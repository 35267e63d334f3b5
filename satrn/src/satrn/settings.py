"""Everything that a run may set; the presets are the paper's training and our small one without downloads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from satrn.config import CHARSET_94, CHOICES, SIZES, SATRNConfig

SETTING_CHOICES = {
    "dataset": ("lmdb", "rendered", "none"),
    "rotation": ("none", "normal", "uniform"),
    "schedule": ("triangle", "onecycle"),
    "warp": ("straight", "rotate", "curve", "multi_line", "upright_or_vertical", "scene"),
}


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the paper's SATRN (big) on MJSynth and SynthText."""

    dataset: str = "lmdb"
    """lmdb (real words), rendered (made here) or none (only parameters and FLOPs are counted)"""
    train_sets: tuple[str, ...] = ("MJ", "ST")
    """names of sets below the data root, each one LMDB or a folder of several"""
    mix: tuple[float, ...] = (0.5, 0.5)
    """share of each training set in every batch"""
    test_sets: tuple[str, ...] = ("IIIT5K", "SVT", "IC03", "IC13", "IC15", "SVTP", "CT80")
    """names of sets below the data root"""
    test_angles: tuple[float, ...] = ()
    """also test on the test sets rotated by these degrees"""
    rotation: str = "normal"
    """rotation of training words: none, normal (sd 34 degrees, as in the paper) or uniform (0 to 360)"""
    warp: str = "rotate"
    """rendered: straight, rotate, curve, multi_line, upright_or_vertical or scene"""
    word_lengths: tuple[int, int] = (2, 2)
    """rendered: shortest and longest word"""
    font_pixels: float = 14.0
    """rendered: font size; words that do not fit are drawn smaller"""
    train_images: int = 20000
    """rendered: number of training words"""
    test_images: int = 1000
    """rendered: number of test words"""
    d_model: int = 512
    """channels d"""
    heads: int = 8
    """attention heads"""
    ffn: int = 2048
    """hidden width f of the feed-forwards"""
    enc_layers: int = 12
    """encoder layers"""
    dec_layers: int = 6
    """decoder layers"""
    dropout: float = 0.1
    """share of units dropped"""
    pos: str = "a2dpe"
    """positional encoding: a2dpe, none, 1d or 2d_concat"""
    laff: str = "separable"
    """encoder's feed-forward: separable, conv or fc"""
    squash_height: bool = False
    """1-D control: average the CNN's map over its height"""
    downsample: tuple[int, int] = (4, 4)
    """reduction of height and width by the CNN"""
    variant: str = "paper"
    """paper, official or mmocr"""
    qk_width: int | None = None
    """width of q and k over all heads; None: the variant's"""
    encoder: str = "satrn"
    """satrn, resnet (SAR's) or fan"""
    decoder: str = "satrn"
    """satrn, lstm (SAR's) or fan"""
    img_size: tuple[int, int] = (32, 100)
    """height and width of the input in pixels"""
    in_channels: int = 1
    """1 (gray) or 3 (RGB)"""
    charset: str = CHARSET_94
    """characters that can be read"""
    max_length: int = 25
    """maximal number of decoding steps, including the end token"""
    steps: int = 250000
    """training steps (4 epochs of 16 M words)"""
    batch_size: int = 256
    """words per step over all ranks and accumulated parts"""
    accumulate: int = 1
    """number of parts in which a rank computes its share of a batch"""
    lr: float = 3e-4
    """peak learning rate of Adam"""
    schedule: str = "triangle"
    """triangle (as the paper) or onecycle (cosine, 10 % warm-up)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of Adam"""
    clip: float = 2.0
    """limit of the gradient's norm"""
    ctc_weight: float = 0.0
    """weight of an auxiliary CTC loss on the map's columns; 0: no such head"""
    recompute: bool = False
    """do not store LAFF's activations; recompute them in the backward pass"""
    control: bool = False
    """rendered: also train the 1-D control (squash_height) on the same words in the same order"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name, choices in (SETTING_CHOICES | {n: c for n, c in CHOICES.items() if hasattr(self, n)}).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.steps < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"steps and accumulate must be at least 1 and accumulate must divide batch_size, got "
                f"{self.steps}, {self.accumulate} and {self.batch_size}"
            )
        if len(self.train_sets) != len(self.mix) or min(self.mix) <= 0:
            raise ValueError(f"mix must hold one positive share per training set, got {self.mix}")
        if not self.test_sets:
            raise ValueError("test_sets must name at least one test set")
        if self.ctc_weight < 0 or self.lr <= 0 or self.clip <= 0:
            raise ValueError("lr and clip must be positive, ctc_weight must not be negative")
        self.network()

    def network(self) -> SATRNConfig:
        """The network's configuration. ValueError if it is impossible."""
        shared = SATRNConfig.__dataclass_fields__.keys() & vars(self).keys()
        return SATRNConfig(**{name: getattr(self, name) for name in shared}, ctc=self.ctc_weight > 0)


RENDERED = Settings(
    dataset="rendered", d_model=48, heads=4, ffn=96, enc_layers=2, dec_layers=1, dropout=0.0, qk_width=48,
    img_size=(24, 24), charset="247AKR", max_length=6, steps=800, batch_size=32, lr=3e-3, schedule="onecycle",
    betas=(0.9, 0.98), train_images=25600,
)  # fmt: skip
PRESETS = {size: replace(Settings(), **widths) for size, widths in SIZES.items()} | {"rendered": RENDERED}
