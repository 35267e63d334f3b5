"""The Transformer decoder (section 3.3): all steps at once for training, single cached steps for reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from satrn.attention import MultiHeadAttention
from satrn.config import SATRNConfig
from satrn.positional import sinusoid

Pair = tuple[Tensor, Tensor]


@dataclass
class DecoderState:
    """The cache of a reading: keys and values per layer, [B, heads, T, width] each."""

    position: int
    self_kv: list[Pair]
    cross_kv: list[Pair]
    attention: Tensor | None = None
    """last layer's weights on the map at the last step [B, H'W'], if requested"""

    def select(self, index: Tensor) -> DecoderState:
        """The state of chosen rows of the batch, in that order."""
        self_kv, cross_kv = ([(k[index], v[index]) for k, v in kv] for kv in (self.self_kv, self.cross_kv))
        weights = None if self.attention is None else self.attention[index]
        return DecoderState(self.position, self_kv, cross_kv, weights)


class FeedForward(nn.Module):
    """Point-wise d -> f -> d. official: ReLU also after the second layer; mmocr: GELU."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(cfg.d_model, cfg.ffn), nn.Linear(cfg.ffn, cfg.d_model)
        self.activation = F.gelu if cfg.variant == "mmocr" else F.relu
        self.relu_out = cfg.variant == "official"

    def forward(self, x: Tensor) -> Tensor:
        x = self.w_2(self.activation(self.w_1(x)))
        return F.relu(x) if self.relu_out else x


class DecoderLayer(nn.Module):
    """Masked self-attention, attention on the encoder's tokens, feed-forward; pre-norm, residual."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        d = cfg.d_model
        eps = 1e-5 if cfg.variant == "mmocr" else 1e-6
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d, eps) for _ in range(3))
        attention = (d, cfg.heads, cfg.qk, cfg.attention_scale, cfg.variant != "mmocr")
        self.self_attn = MultiHeadAttention(*attention)
        self.enc_attn = MultiHeadAttention(*attention)
        self.mlp = FeedForward(cfg)
        self.dropout = cfg.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Characters [B, L, d] and encoder's tokens [B, T, d] to [B, L, d]."""
        x = x + self._drop(self.self_attn(self.norm1(x), causal=True))
        x = x + self._drop(self.enc_attn(self.norm2(x), memory))
        return x + self._drop(self.mlp(self.norm3(x)))

    def step(
        self, x: Tensor, past: Pair | None, cross: Pair, attention: bool = False
    ) -> tuple[Tensor, Pair, Tensor | None]:
        """Only the newest position [B, 1, d]: every cached position is visible, so there is no mask.

        Returns:
            Its output, the keys and values to cache, and (if requested) its weights on the map [B, T].
        """
        y = self.norm1(x)
        now = self.self_attn.keys_values(y)
        if past is not None:
            now = torch.cat([past[0], now[0]], dim=2), torch.cat([past[1], now[1]], dim=2)
        x = x + self.self_attn.attend(y, *now)
        y = self.norm2(x)
        weights = self.enc_attn.weights(y, cross[0])[:, 0] if attention else None
        x = x + self.enc_attn.attend(y, *cross)
        return x + self.mlp(self.norm3(x)), now, weights


class Decoder(nn.Module):
    """Embedding, positions, layers, classifier. Rows of the embedding: end, unknown, characters, start."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.d_model
        self.trg_word_emb = nn.Embedding(cfg.classes + 1, d)
        self.layer_stack: Any = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.dec_layers))
        self.layer_norm = nn.LayerNorm(d, 1e-6)
        self.classifier = nn.Linear(d, cfg.classes) if cfg.variant == "mmocr" else None

    def positions(self, n: int, device: torch.device | None = None) -> Tensor:
        """Sinusoids [n, d] of the first n positions."""
        return sinusoid(n, self.cfg.d_model, self.cfg.layout, device=device)

    def embed(self, previous: Tensor, table: Tensor) -> Tensor:
        """Previous characters [B, L] (cfg.classes stands for start) with their positions' sinusoids [L, d]."""
        x = self.trg_word_emb(previous)
        if self.cfg.variant != "mmocr":
            x = x * self.cfg.d_model**0.5
        if self.cfg.variant == "official":
            x = x * (previous != self.cfg.classes).unsqueeze(-1)  # its start is a zero vector
        return F.dropout(x + table.to(x.dtype), self.cfg.dropout, self.training)

    def classify(self, x: Tensor) -> Tensor:
        """Hidden vectors [..., d] to logits [..., K]; tied to the embedding except for mmocr."""
        x = self.layer_norm(x)
        if self.classifier is not None:
            return self.classifier(x)
        return F.linear(x, self.trg_word_emb.weight[: self.cfg.classes])

    def forward(self, previous: Tensor, memory: Tensor, hw: tuple[int, int]) -> Tensor:
        """Logits [B, L, K] of the characters that follow `previous` [B, L], under the causal mask."""
        x = self.embed(previous, self.positions(previous.shape[1], previous.device))
        for layer in self.layer_stack:
            x = layer(x, memory)
        return self.classify(x)

    def start(self, memory: Tensor, hw: tuple[int, int]) -> DecoderState:
        """Keys and values of the encoder's tokens [B, T, d], computed once per image, as every step reads them."""
        pairs = [layer.enc_attn.keys_values(memory) for layer in self.layer_stack]
        return DecoderState(0, [], [(keys.contiguous(), values.contiguous()) for keys, values in pairs])

    def step(self, previous: Tensor, state: DecoderState, attention: bool = False) -> tuple[Tensor, DecoderState]:
        """Logits [B, K] of the next character after `previous` [B]."""
        x = self.embed(previous[:, None], self.positions(state.position + 1, previous.device)[-1:])
        kept, last = [], len(self.layer_stack) - 1
        for number, layer in enumerate(self.layer_stack):
            past = state.self_kv[number] if state.position else None
            x, now, weights = layer.step(x, past, state.cross_kv[number], attention and number == last)
            kept.append(now)
        return self.classify(x[:, 0]), DecoderState(state.position + 1, kept, state.cross_kv, weights)
