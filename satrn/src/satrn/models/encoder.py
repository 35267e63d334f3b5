"""The 2-D Transformer encoder (section 3.2): positions, then self-attention over all positions of the map, and LAFF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from satrn.attention import MultiHeadAttention
from satrn.config import SATRNConfig
from satrn.laff import LocalityAwareFeedForward
from satrn.positional import AdaptivePositionalEncoding2D, fixed_encoding


@dataclass
class EncoderOutput:
    """Tokens [B, H'W', d] row by row, the map's (H', W'), and A2DPE's gates [B, d] (None without A2DPE)."""

    tokens: Tensor
    hw: tuple[int, int]
    alpha: Tensor | None = None
    beta: Tensor | None = None


class EncoderLayer(nn.Module):
    """x = x + drop(MHSA(LN(x))); x = x + LAFF(LN(x)) on the map. official: LAFF receives x itself."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        d = cfg.d_model
        eps = 1e-5 if cfg.variant == "mmocr" else 1e-6
        self.norm1 = nn.LayerNorm(d, eps)
        self.attn = MultiHeadAttention(d, cfg.heads, cfg.qk, cfg.attention_scale, cfg.variant != "mmocr")
        self.norm2 = nn.LayerNorm(d, eps)
        self.feed_forward = LocalityAwareFeedForward(d, cfg.ffn, cfg.laff)
        self.dropout = cfg.dropout
        self.skips_norm2 = cfg.variant == "official"
        self.norm2.requires_grad_(not self.skips_norm2)

    def forward(self, x: Tensor, hw: tuple[int, int], recompute: bool = False) -> Tensor:
        """Tokens [B, H'W', d] to the same.

        Args:
            x: tokens, row by row.
            hw: rows and columns of the map.
            recompute: do not store LAFF's wide activations; recompute them in the backward pass.
        """
        x = x + F.dropout(self.attn(self.norm1(x)), self.dropout, self.training)
        tokens = x if self.skips_norm2 else self.norm2(x)
        image = tokens.unflatten(1, hw).permute(0, 3, 1, 2)  # (B, d, H', W'), channels_last without a copy
        if recompute:
            image = checkpoint(self.feed_forward, image, use_reentrant=False, context_fn=self._recompute_context)
        else:
            image = self.feed_forward(image)
        return x + image.permute(0, 2, 3, 1).flatten(1, 2)

    def _recompute_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(self.feed_forward)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """The second forward pass of a checkpoint must not update batch norm's running statistics again."""
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class Encoder(nn.Module):
    """Positional encoding, layers, final LayerNorm: maps [B, d, H', W'] to an EncoderOutput."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        self.cfg = cfg
        self.recompute = False
        if cfg.pos == "a2dpe":
            self.position_enc = AdaptivePositionalEncoding2D(
                cfg.d_model,
                hidden=cfg.d_model if cfg.variant == "mmocr" else None,
                mlp=cfg.mlp,
                bias=cfg.variant != "paper",
                layout=cfg.layout,
                dropout=cfg.dropout if cfg.variant == "official" else 0.0,
            )
        self.layer_stack = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.enc_layers))
        self.layer_norm = nn.LayerNorm(cfg.d_model, 1e-5 if cfg.variant == "mmocr" else 1e-6)

    def forward(self, image: Tensor) -> EncoderOutput:
        cfg, alpha, beta = self.cfg, None, None
        hw = image.shape[2], image.shape[3]
        if cfg.pos == "a2dpe":
            image, alpha, beta = self.position_enc(image)
        else:
            image = image + fixed_encoding(cfg.pos, cfg.d_model, *hw, cfg.layout, image.device).to(image.dtype)
        x = F.dropout(image.permute(0, 2, 3, 1).flatten(1, 2), cfg.dropout, self.training)  # (B, H'W', d)
        for layer in self.layer_stack:
            x = layer(x, hw, self.recompute and torch.is_grad_enabled())
        return EncoderOutput(self.layer_norm(x), hw, alpha, beta)
