"""SAR's decoder (Li et al., AAAI 2019), the other half of table 2: LSTMs with additive attention on the 2-D map.

A reconstruction from SAR's description and its public re-implementations; the SATRN paper prints its size only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satrn.config import SATRNConfig


@dataclass
class LSTMState:
    """What reading has kept of each image."""

    memory: Tensor
    """map as tokens [B, T, d]"""
    keys: Tensor
    """attention keys [B, T, d]"""
    holistic: Tensor
    """summary of the image [B, d]"""
    hidden: Tensor
    """LSTM [layers, B, d]"""
    cell: Tensor
    """LSTM [layers, B, d]"""
    attention: Tensor | None = None
    """weights on the map at the last step [B, T]"""

    def select(self, index: Tensor) -> LSTMState:
        """The state of chosen rows of the batch, in that order."""
        first = [value[index] for value in (self.memory, self.keys, self.holistic)]
        weights = None if self.attention is None else self.attention[index]
        return LSTMState(*first, self.hidden[:, index], self.cell[:, index], weights)


class LSTMDecoder(nn.Module):
    """Two LSTM layers over the columns give a holistic vector; two more read, attending to the map."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__()
        d = cfg.d_model
        self.cfg = cfg
        self.holistic = nn.LSTM(d, d, 2, batch_first=True)
        self.holistic_fc = nn.Linear(d, d)
        self.trg_word_emb = nn.Embedding(cfg.classes + 1, d)
        self.reader = nn.LSTM(d, d, 2, batch_first=True)
        self.query = nn.Linear(d, d)
        self.key = nn.Conv2d(d, d, 3, padding=1)
        self.energy = nn.Linear(d, 1)
        self.classifier = nn.Linear(3 * d, cfg.classes)

    def _glimpse(self, hidden: Tensor, state: LSTMState) -> tuple[Tensor, Tensor]:
        energy = self.energy(torch.tanh(self.query(hidden)[:, :, None] + state.keys[:, None])).squeeze(-1)
        weights = energy.float().softmax(dim=-1).to(energy.dtype)  # (B, L, T)
        return weights @ state.memory, weights

    def _classify(self, hidden: Tensor, state: LSTMState) -> tuple[Tensor, Tensor]:
        glimpse, weights = self._glimpse(hidden, state)
        holistic = state.holistic[:, None].expand_as(hidden)
        return self.classifier(torch.cat([hidden, glimpse, holistic], dim=-1)), weights

    def forward(self, previous: Tensor, memory: Tensor, hw: tuple[int, int]) -> Tensor:
        """Logits [B, L, K] of the characters that follow `previous` [B, L]."""
        state = self.start(memory, hw)
        hidden, _ = self.reader(self.trg_word_emb(previous), (state.hidden, state.cell))
        return self._classify(hidden, state)[0]

    def start(self, memory: Tensor, hw: tuple[int, int]) -> LSTMState:
        """Keys, holistic vector and the reader's first state (which has seen the holistic vector)."""
        image = memory.unflatten(1, hw).permute(0, 3, 1, 2)  # (B, d, H', W')
        columns = image.amax(dim=2).transpose(1, 2)  # (B, W', d)
        holistic = self.holistic_fc(self.holistic(columns)[0][:, -1])
        keys = self.key(image).permute(0, 2, 3, 1).flatten(1, 2)
        _, (hidden, cell) = self.reader(holistic[:, None])
        return LSTMState(memory, keys, holistic, hidden, cell)

    def step(self, previous: Tensor, state: LSTMState, attention: bool = False) -> tuple[Tensor, LSTMState]:
        """Logits [B, K] of the next character after `previous` [B]."""
        out, (hidden, cell) = self.reader(self.trg_word_emb(previous[:, None]), (state.hidden, state.cell))
        logits, weights = self._classify(out, state)
        kept = LSTMState(state.memory, state.keys, state.holistic, hidden, cell, weights[:, 0] if attention else None)
        return logits[:, 0], kept
