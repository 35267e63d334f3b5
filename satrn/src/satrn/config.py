"""The configuration of a network: the paper's equations by default, the two public codes as variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CHARSET_94 = "".join(chr(code) for code in range(33, 127))
CHOICES = {
    "pos": ("a2dpe", "none", "1d", "2d_concat"),
    "laff": ("separable", "conv", "fc"),
    "variant": ("paper", "official", "mmocr"),
    "pos_mlp": ("separate", "shared"),
    "pos_layout": ("interleaved", "halves"),
    "encoder": ("satrn", "resnet", "fan"),
    "decoder": ("satrn", "lstm", "fan"),
}


@dataclass(frozen=True)
class SATRNConfig:
    """A recognizer; the defaults are the paper's model ("big").

    `variant` determines what is not set explicitly:

    - paper: the printed equations; q and k of width d/4 with scale 1/sqrt(d_k), biased projections, pre-norm,
      separate bias-free A2DPE perceptrons, interleaved sinusoids, output tied to the embedding.
    - official (clovaai/SATRN): the same widths with scale 1/sqrt(d/heads), A2DPE perceptrons that share a biased
      hidden layer, sinusoids in halves, the encoder's second LayerNorm discarded, ReLU after the decoder's second
      dense layer, a zero vector as start, batch norm with TensorFlow's epsilon and momentum.
    - mmocr (open-mmlab/mmocr): full-width q and k without biases, biased A2DPE perceptrons of hidden width d, GELU
      in the decoder, a separate classifier, colour planes in the order blue, green, red.
    """

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
    """share of units dropped on residual branches and embeddings"""
    pos: str = "a2dpe"
    """encoder's positional encoding: a2dpe, none, 1d (flattened) or 2d_concat"""
    laff: str = "separable"
    """encoder's feed-forward: separable, conv or fc"""
    squash_height: bool = False
    """1-D control: average the CNN's map over its height before the encoder"""
    downsample: tuple[int, int] = (4, 4)
    """reduction of height and width by the CNN; powers of two from 2 on"""
    variant: str = "paper"
    """paper, official or mmocr"""
    qk_width: int | None = None
    """width of queries and keys over all heads; None: the variant's"""
    pos_mlp: str | None = None
    """A2DPE's perceptrons: separate or shared; None: the variant's"""
    pos_layout: str | None = None
    """sinusoids: interleaved or halves; None: the variant's"""
    encoder: str = "satrn"
    """satrn, resnet (SAR's ResNet-31) or fan (FAN's ResNet and LSTM over columns)"""
    decoder: str = "satrn"
    """satrn, lstm (SAR's, with attention on the map) or fan (FAN's LSTM)"""
    img_size: tuple[int, int] = (32, 100)
    """height and width of the input in pixels"""
    in_channels: int = 1
    """1 (gray) or 3 (RGB)"""
    charset: str = CHARSET_94
    """characters that can be read"""
    max_length: int = 25
    """maximal number of decoding steps, including the end token"""
    ctc: bool = False
    """an auxiliary CTC head on the columns of the encoder's map (training only)"""

    def __post_init__(self) -> None:
        for name in ("downsample", "img_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in ("pos_mlp", "pos_layout")):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if min(self.heads, self.enc_layers, self.dec_layers) < 1:
            counts = f"{self.heads}, {self.enc_layers} and {self.dec_layers}"
            raise ValueError(f"heads, enc_layers and dec_layers must be at least 1, got {counts}")
        if self.d_model % self.heads or self.qk % self.heads:
            raise ValueError(f"heads must divide d_model and qk_width, got {self.heads}, {self.d_model} and {self.qk}")
        if self.d_model % 4:
            raise ValueError(f"d_model must be divisible by 4, got {self.d_model}")
        for name, size, factor in zip(("height", "width"), self.img_size, self.downsample, strict=True):
            if factor < 2 or factor & (factor - 1):
                raise ValueError(f"downsample must hold powers of two from 2 on, got {self.downsample}")
            if size < factor or size % factor:
                raise ValueError(f"image {name} must be divisible by the downsampling {factor}, got {size}")
        if self.encoder == "fan" and self.d_model % 16:
            raise ValueError(f"encoder='fan' needs d_model divisible by 16, got {self.d_model}")
        if self.encoder == "fan" and self.img_size[0] < 32:
            raise ValueError(f"encoder='fan' needs images at least 32 pixels high, got {self.img_size[0]}")
        repeated = sorted({c for c in self.charset if self.charset.count(c) > 1})
        if repeated or not self.charset:
            raise ValueError(f"charset must hold different characters, got {''.join(repeated)!r} twice or none")
        if self.max_length < 1 or self.in_channels not in (1, 3) or not 0 <= self.dropout < 1:
            raise ValueError("max_length must be at least 1, in_channels 1 or 3, dropout in [0, 1)")

    @property
    def qk(self) -> int:
        """Width of queries and keys over all heads."""
        return self.qk_width or (self.d_model if self.variant == "mmocr" else self.d_model // 4)

    @property
    def attention_scale(self) -> float:
        """Factor on q k^T: 1/sqrt(d_k), except the official code's 1/sqrt(d/heads)."""
        width = self.d_model if self.variant == "official" else self.qk
        return (width / self.heads) ** -0.5

    @property
    def layout(self) -> str:
        """Layout of the sinusoids."""
        return self.pos_layout or ("halves" if self.variant == "official" else "interleaved")

    @property
    def mlp(self) -> str:
        """Of A2DPE."""
        return self.pos_mlp or ("shared" if self.variant == "official" else "separate")

    @property
    def classes(self) -> int:
        """Output classes: end token, unknown, the characters."""
        return len(self.charset) + 2


SIZES: dict[str, dict[str, Any]] = {
    "small": dict(d_model=256, ffn=1024, enc_layers=6, dec_layers=3),
    "small-9": dict(d_model=256, ffn=1024, enc_layers=9, dec_layers=3),
    "middle": dict(d_model=256, ffn=1024, enc_layers=12, dec_layers=6),
    "big": dict(d_model=512, ffn=2048, enc_layers=12, dec_layers=6),
}


def preset(size: str, **changes: Any) -> SATRNConfig:
    """The paper's sizes: small (its figures and tables), small-9 (its text), middle, big.

    Raises:
        ValueError: another size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return SATRNConfig(**SIZES[size] | changes)
