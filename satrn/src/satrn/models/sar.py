"""SAR's decoder (Li et al., AAAI 2019), the other half of table 2, as in the official repository.

A bidirectional LSTM over the columns gives a holistic vector, from which one LSTM starts; what its attention saw on the
2-D map is fed back into its next input.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from satrn.config import SATRNConfig


@dataclass
class LSTMState:
    """The state of a reading, for each image."""

    memory: Tensor
    """map as tokens [B, T, d]"""
    keys: Tensor
    """attention keys [B, T, d]"""
    hidden: Tensor
    """LSTM [B, d]"""
    cell: Tensor
    """LSTM [B, d]"""
    glimpse: Tensor
    """what the attention saw last [B, d]"""
    attention: Tensor
    """its weights on the map [B, T]"""

    def select(self, index: Tensor) -> LSTMState:
        """The state of chosen rows of the batch, in that order."""
        return LSTMState(*(value[index] for value in vars(self).values()))


class LSTMDecoder(nn.Module):
    """One LSTM that reads, with additive attention to the map whose keys are a 3x3 convolution."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        d, inputs = cfg.d_model, cfg.classes + 1  # one-hot characters: the classes and start
        self.cfg = cfg
        self.holistic = nn.LSTM(d, d // 2, batch_first=True, bidirectional=True)
        self.holistic_fc = nn.Linear(d, d)
        self.input_fc = nn.Linear(inputs + d, inputs)
        self.reader = nn.LSTMCell(inputs, d)
        self.key = nn.Conv2d(d, d, 3, padding=1, bias=False)
        self.query = nn.Linear(2 * d, d, bias=False)
        self.energy = nn.Linear(d, 1, bias=False)
        self.output_fc = nn.Linear(2 * d, d)
        self.classifier = nn.Linear(d, cfg.classes)

    def _attend(self, memory: Tensor, keys: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Glimpse [B, d] and weights [B, T] of the LSTM's state."""
        query = self.query(torch.cat([cell, hidden], dim=1))
        energy = self.energy(torch.tanh(keys + query[:, None])).squeeze(-1)  # (B, T)
        weights = energy.float().softmax(dim=1).to(memory.dtype)
        return (weights[:, None] @ memory)[:, 0], weights

    def forward(self, previous: Tensor, memory: Tensor, hw: tuple[int, int]) -> Tensor:
        """Logits [B, L, K] of the characters that follow `previous` [B, L]; step by step, because of the glimpses."""
        state, logits = self.start(memory, hw), []
        for characters in previous.unbind(dim=1):
            step, state = self.step(characters, state)
            logits.append(step)
        return torch.stack(logits, dim=1)

    def start(self, memory: Tensor, hw: tuple[int, int]) -> LSTMState:
        """Keys of the map; hidden and cell are the holistic vector, read after the last column."""
        image = memory.unflatten(1, hw).permute(0, 3, 1, 2)  # (B, d, H', W')
        columns = image.amax(dim=2).transpose(1, 2)  # (B, W', d)
        # cuDNN's LSTM may take float16 under bfloat16 autocast, and some CPUs have no LSTM in bfloat16
        with nullcontext() if columns.is_meta else torch.autocast(columns.device.type, enabled=False):
            states = self.holistic(columns.to(self.holistic.weight_ih_l0.dtype))[0]
        holistic = self.holistic_fc(states[:, -1])
        keys = self.key(image).permute(0, 2, 3, 1).flatten(1, 2)
        return LSTMState(memory, keys, holistic, holistic, *self._attend(memory, keys, holistic, holistic))

    def step(self, previous: Tensor, state: LSTMState, attention: bool = False) -> tuple[Tensor, LSTMState]:
        """Logits [B, K] of the next character after `previous` [B] (cfg.classes stands for start)."""
        character = F.one_hot(previous, self.cfg.classes + 1).to(state.memory.dtype)
        inputs = self.input_fc(torch.cat([character, state.glimpse], dim=1))
        hidden, cell = self.reader(inputs, (state.hidden, state.cell))
        glimpse, weights = self._attend(state.memory, state.keys, hidden, cell)
        logits = self.classifier(F.relu(self.output_fc(torch.cat([hidden, glimpse], dim=1))))
        return logits, LSTMState(state.memory, state.keys, hidden, cell, glimpse, weights)
