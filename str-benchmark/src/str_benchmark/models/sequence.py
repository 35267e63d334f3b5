"""Sequence stage: a bidirectional LSTM and a projection (section 3.3)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn


class BiLSTM(nn.Module):
    """(B, T, inputs) to (B, T, outputs), or (B, T, 2 * hidden) where outputs is None."""

    def __init__(self, inputs: int, hidden: int, outputs: int | None):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Identity() if outputs is None else nn.Linear(2 * hidden, outputs)

    def forward(self, columns: Tensor) -> Tensor:
        # some releases of PyTorch run cuDNN's LSTM in float16 under bfloat16 autocast
        with torch.autocast("cuda", enabled=False) if columns.is_cuda else nullcontext():
            states = self.rnn(columns.to(next(self.rnn.parameters()).dtype))[0]
        return self.linear(states)
