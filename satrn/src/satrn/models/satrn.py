"""The whole recognizer: CNN, encoder, decoder, and reading."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from satrn.charset import IGNORED, Tokenizer
from satrn.config import SATRNConfig
from satrn.decoding import Recognition, beam_search, greedy
from satrn.models.cnn import ResNet31, ShallowCNN
from satrn.models.decoder import Decoder
from satrn.models.encoder import Encoder, EncoderOutput
from satrn.models.fan import ColumnDecoder, ColumnEncoder
from satrn.models.sar import LSTMDecoder

DECODERS: dict[str, type[Decoder | LSTMDecoder | ColumnDecoder]] = {
    "satrn": Decoder,
    "lstm": LSTMDecoder,
    "fan": ColumnDecoder,
}


class SATRN(nn.Module):
    """Text recognizer with two-dimensional self-attention.

    Args:
        cfg: its configuration; `satrn.preset` has the paper's sizes.
    """

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = Tokenizer(cfg.charset)
        if cfg.encoder == "satrn":
            self.backbone: ShallowCNN | ResNet31 | ColumnEncoder = ShallowCNN(
                cfg.in_channels, cfg.d_model, cfg.downsample
            )
            self.encoder: Encoder | None = Encoder(cfg)
        else:
            cnn = ResNet31 if cfg.encoder == "resnet" else ColumnEncoder
            self.backbone, self.encoder = cnn(cfg.in_channels, cfg.d_model), None
        self.decoder = DECODERS[cfg.decoder](cfg)
        self.ctc = nn.Linear(cfg.d_model, cfg.classes) if cfg.ctc else None  # class 0 is its blank
        self.apply(_initialise)
        if cfg.variant == "official":
            self.apply(_as_tensorflow)

    def encode(self, images: Tensor) -> EncoderOutput:
        """Images [B, C, H, W] in -0.5 .. 0.5 to tokens [B, H'W', d] with the map's size and A2DPE's gates.

        Raises:
            ValueError: wrong number of channels, a size that the downsampling does not divide, or an empty batch.
            TypeError: images that are not floating point.
        """
        self._check(images)
        image = self.backbone(images)
        if self.cfg.squash_height:
            image = image.mean(dim=2, keepdim=True)
        if self.encoder is None:
            return EncoderOutput(image.permute(0, 2, 3, 1).flatten(1, 2), tuple(image.shape[2:]))
        return self.encoder(image)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor, got {kind}")
        if images.ndim != 4 or images.shape[1] != self.cfg.in_channels or images.shape[0] < 1:
            raise ValueError(f"images must be (B, {self.cfg.in_channels}, H, W) with B > 0, got {tuple(images.shape)}")
        if any(size < f or size % f for size, f in zip(images.shape[2:], self.cfg.downsample, strict=True)):
            raise ValueError(
                f"image height and width must be divisible by {self.cfg.downsample}, got {tuple(images.shape[2:])}"
            )

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            images: [B, C, H, W].
            targets: int64 [B, L] from `Tokenizer.encode`; padding is ignored.

        Returns:
            Logits [B, L, K]; position t predicts targets[:, t].
        """
        return self.decode(self.encode(images), targets)

    def decode(self, encoded: EncoderOutput, targets: Tensor) -> Tensor:
        """Logits [B, L, K] of targets [B, L] given the encoder's output."""
        start = targets.new_full((len(targets), 1), self.cfg.classes)
        previous = torch.cat([start, targets[:, :-1]], dim=1)
        previous = previous.masked_fill(previous == IGNORED, 0)  # after the end; the causal mask hides it
        return self.decoder(previous, encoded.tokens, encoded.hw)

    def ctc_logits(self, encoded: EncoderOutput) -> Tensor:
        """Logits [B, W', K] of the auxiliary head, on the map's columns (mean over rows).

        Raises:
            ValueError: a network without that head.
        """
        if self.ctc is None:
            raise ValueError("ctc_logits needs a network with ctc=True")
        return self.ctc(encoded.tokens.unflatten(1, encoded.hw).mean(dim=1))

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        max_length: int | None = None,
        beam: int = 1,
        cache: bool = True,
        early_stop: bool = True,
        attention: bool = False,
    ) -> Recognition:
        """Read images. Put the network into eval mode first: in train mode batch norm changes with every call.

        Args:
            images: [B, C, H, W] in -0.5 .. 0.5.
            max_length: maximal number of steps, including the end token; None: the configuration's.
            beam: width of the beam; 1 is greedy.
            cache: cache keys and values; False recomputes all earlier positions at every step (for comparison).
            early_stop: end as soon as every word has ended; the result is the same.
            attention: also return the last decoder layer's weights on the map (greedy with cache only).

        Returns:
            Texts with confidences.

        Raises:
            ValueError: beam or max_length below 1, or attention without greedy cached decoding.
        """
        steps = self.cfg.max_length if max_length is None else max_length
        if beam < 1 or steps < 1:
            raise ValueError(f"beam and max_length must be at least 1, got {beam} and {steps}")
        if (attention or beam > 1) and not cache or (attention and beam > 1):
            raise ValueError("attention needs beam=1 and cache=True; beam > 1 needs cache=True")
        encoded = self.encode(images)
        if beam > 1:
            ids, probabilities, maps = *beam_search(self.decoder, encoded, steps, beam, early_stop), None
        else:
            ids, probabilities, maps = greedy(self.decoder, encoded, steps, cache, early_stop, attention)
        return Recognition.from_ids(self.tokenizer, ids, probabilities, maps)


def _initialise(module: nn.Module) -> None:
    """Xavier-uniform kernels, zero biases, embedding N(0, 1/d), as in the official code."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def _as_tensorflow(module: nn.Module) -> None:
    """Batch norm with TensorFlow's defaults: epsilon 1e-3, and statistics that keep 0.99 of their past."""
    if isinstance(module, nn.BatchNorm2d):
        module.eps, module.momentum = 1e-3, 0.01
