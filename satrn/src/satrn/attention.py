"""Multi-head attention (equations 1 and 2) with narrow queries and keys; keys and values can be cached."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """softmax(scale * q k^T) v over heads, on CUDA through PyTorch's fused kernel.

    Args:
        d: channels of input, values and output.
        heads: number of heads.
        qk_width: channels of q and of k over all heads.
        scale: factor on q k^T.
        bias: whether the four projections have biases.
    """

    def __init__(self, d: int, heads: int, qk_width: int, scale: float, bias: bool = True):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.linear_q = nn.Linear(d, qk_width, bias)
        self.linear_k = nn.Linear(d, qk_width, bias)
        self.linear_v = nn.Linear(d, d, bias)
        self.fc = nn.Linear(d, d, bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, heads, T, d_k] and values [B, heads, T, d_v] of memory [B, T, d]."""
        return self._split(self.linear_k(memory)), self._split(self.linear_v(memory))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
        """Attention of x [B, Q, d] on kept keys and values; causal only where Q and T are the same positions."""
        q = self._split(self.linear_q(x))
        if q.is_cuda or causal:
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=causal, scale=self.scale)
        else:  # a CPU has no fused kernel for d_k other than d_v, and the plain form is the faster one
            q, k, v = (each.flatten(0, 1) for each in (q, keys, values))  # (B * heads, T, width)
            scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=self.scale)
            out = (scores.softmax(dim=-1) @ v).unflatten(0, (-1, self.heads))
        return self.fc(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of x [B, Q, d] on memory [B, T, d] (None: on itself) to [B, Q, d]."""
        return self.attend(x, *self.keys_values(x if memory is None else memory), causal)

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """Attention weights [B, Q, T] of x on kept keys, mean over heads; they sum to 1 over T."""
        scores = self.scale * self._split(self.linear_q(x)) @ keys.transpose(2, 3)
        return torch.softmax(scores.float(), dim=-1).mean(dim=1)
