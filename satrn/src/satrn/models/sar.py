"""SAR's decoder (Li et al., AAAI 2019), the other half of table 2, as in the official repository.

A bidirectional LSTM over the columns gives a holistic vector, from which one LSTM starts; what its attention saw on the
2-D map is fed back into its next input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """LSTM [B, width]"""
    cell: Tensor
    """LSTM [B, width]"""
    glimpse: Tensor
    """what the attention saw last [B, d]"""
    attention: Tensor
    """its weights on the map [B, T]"""

    def select(self, index: Tensor) -> LSTMState:
        """The state of chosen rows of the batch, in that order."""
        return LSTMState(*(value[index] for value in vars(self).values()))


class AttendingLSTM(nn.Module, ABC):
    """An LSTM that reads, fed with the last character and with what its additive attention saw last.

    Args:
        cfg: the network's configuration.
        width: of the LSTM.
        query_bias: whether the attention's query has one.
    """

    def __init__(self, cfg: SATRNConfig, width: int, query_bias: bool):
        super().__init__()
        d, inputs = cfg.d_model, cfg.classes + 1  # one-hot characters: the classes and start
        self.cfg = cfg
        self.input_fc = nn.Linear(inputs + d, inputs)
        self.reader = nn.LSTMCell(inputs, width)
        self.query = nn.Linear(2 * width, d, bias=query_bias)
        self.energy = nn.Linear(d, 1, bias=False)
        self.output_fc = nn.Linear(width + d, width)
        self.classifier = nn.Linear(width, cfg.classes)

    @abstractmethod
    def start(self, memory: Tensor, hw: tuple[int, int]) -> LSTMState:
        """The state before the first character."""

    def output(self, x: Tensor) -> Tensor:
        """LSTM and glimpse [B, width + d] to what is classified [B, width]."""
        return self.output_fc(x)

    def attend(self, memory: Tensor, keys: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
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

    def step(self, previous: Tensor, state: LSTMState, attention: bool = False) -> tuple[Tensor, LSTMState]:
        """Logits [B, K] of the next character after `previous` [B] (cfg.classes stands for start)."""
        character = F.one_hot(previous, self.cfg.classes + 1).to(state.memory.dtype)
        inputs = self.input_fc(torch.cat([character, state.glimpse], dim=1))
        hidden, cell = self.reader(inputs, (state.hidden, state.cell))
        glimpse, weights = self.attend(state.memory, state.keys, hidden, cell)
        logits = self.classifier(self.output(torch.cat([hidden, glimpse], dim=1)))
        return logits, LSTMState(state.memory, state.keys, hidden, cell, glimpse, weights)


class LSTMDecoder(AttendingLSTM):
    """SAR's: starts from the holistic vector; the keys of its attention are a 3x3 convolution of the map."""

    def __init__(self, cfg: SATRNConfig):
        d = cfg.d_model
        super().__init__(cfg, width=d, query_bias=False)
        self.holistic = nn.LSTM(d, d // 2, batch_first=True, bidirectional=True)
        self.holistic_fc = nn.Linear(d, d)
        self.key = nn.Conv2d(d, d, 3, padding=1, bias=False)

    def start(self, memory: Tensor, hw: tuple[int, int]) -> LSTMState:
        """Keys of the map; hidden and cell are the holistic vector, read after the last column."""
        image = memory.unflatten(1, hw).permute(0, 3, 1, 2)  # (B, d, H', W')
        columns = image.amax(dim=2).transpose(1, 2)  # (B, W', d)
        holistic = self.holistic_fc(in_float32(self.holistic, columns)[:, -1])
        keys = self.key(image).permute(0, 2, 3, 1).flatten(1, 2)
        return LSTMState(memory, keys, holistic, holistic, *self.attend(memory, keys, holistic, holistic))

    def output(self, x: Tensor) -> Tensor:
        return F.relu(self.output_fc(x))


def in_float32(rnn: nn.LSTM, x: Tensor) -> Tensor:
    """An LSTM's outputs [B, T, ...] in its weights' precision.

    cuDNN's LSTM may take float16 under bfloat16 autocast, and some CPUs have no LSTM in bfloat16.
    """
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return rnn(x.to(rnn.all_weights[0][0].dtype))[0]
