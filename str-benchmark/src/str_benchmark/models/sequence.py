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
        # cuDNN's LSTM may take float16 under bfloat16 autocast, and some CPUs have no LSTM in bfloat16
        with nullcontext() if columns.is_meta else torch.autocast(columns.device.type, enabled=False):
            states = self.rnn(columns.to(next(self.rnn.parameters()).dtype))[0]
        return self.linear(states)
