"""Attention head (section 3.4): one LSTM cell that reads one column mixture per character.

The arithmetic is the reference's, with two exact rearrangements: W_h h_i does not depend on the step and is computed
once, and the product of W_ih with a one-hot character is a column of W_ih.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from str_benchmark.tokenizers import END, GO


class AttentionCell(nn.Module):
    """Parameters of one step, under the names of the public checkpoints."""

    def __init__(self, inputs: int, hidden: int, num_classes: int):
        super().__init__()
        self.i2h = nn.Linear(inputs, hidden, bias=False)
        self.h2h = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.rnn = nn.LSTMCell(inputs + num_classes, hidden)


class Attention(nn.Module):
    """Encoder columns (B, T, inputs) to logits (B, steps, K)."""

    def __init__(self, inputs: int, hidden: int, num_classes: int, max_length: int):
        super().__init__()
        self.attention_cell = AttentionCell(inputs, hidden, num_classes)
        self.generator = nn.Linear(hidden, num_classes)
        self.inputs, self.hidden, self.steps = inputs, hidden, max_length + 1

    def forward(self, columns: Tensor, targets: Tensor | None = None, early_stop: bool = False) -> Tensor:
        """Teacher-forced if targets are given, else greedy.

        Args:
            columns: (B, T, inputs).
            targets: (B, S) int64, [GO] and the characters before each step; S steps are computed.
            early_stop: greedy: end as soon as every word of the batch has its [s]; the texts are the same, the logits
                shorter.
        """
        weights = self._rearranged()
        batch = columns.shape[0]  # not len(): it would fix the batch at export
        state = columns.new_zeros(batch, self.hidden), columns.new_zeros(batch, self.hidden)
        projected = self.attention_cell.i2h(columns)  # (B, T, hidden)
        if targets is not None:
            outputs = []
            for step in range(targets.shape[1]):
                state = self._step(columns, projected, targets[:, step], state, weights)
                outputs.append(state[0])
            return self.generator(torch.stack(outputs, 1))

        characters = torch.full((batch,), GO, dtype=torch.int64, device=columns.device)
        ended, logits = characters.bool(), []
        for _ in range(self.steps):
            state = self._step(columns, projected, characters, state, weights)
            logits.append(self.generator(state[0]))
            characters = logits[-1].argmax(-1)
            if early_stop:
                ended = ended | (characters == END)
                if ended.all():
                    break
        return torch.stack(logits, 1)

    def _rearranged(self) -> tuple[Tensor, ...]:
        """The matrices of a step in the form used: transposed, and grouped by operand."""
        cell = self.attention_cell
        by_context, by_character = cell.rnn.weight_ih.split([self.inputs, self.generator.out_features], dim=1)
        by_state = torch.cat([cell.h2h.weight, cell.rnn.weight_hh]).T  # (hidden, 5 hidden): scores, then gates
        bias = torch.cat([cell.h2h.bias, cell.rnn.bias_hh])
        table = by_character.T + cell.rnn.bias_ih  # (K, 4 hidden)
        return by_state, bias, by_context.T, table, cell.score.weight.T

    def _step(
        self, columns: Tensor, projected: Tensor, characters: Tensor, state: tuple[Tensor, Tensor], weights: tuple
    ) -> tuple[Tensor, Tensor]:
        hidden, memory = state
        by_state, bias, by_context, table, score = weights
        query, gates = torch.addmm(bias, hidden, by_state).split([self.hidden, 4 * self.hidden], dim=1)
        energies = torch.tanh(projected + query.unsqueeze(1)) @ score  # e_ti, (B, T, 1)
        context = torch.bmm(energies.softmax(1).transpose(1, 2), columns).squeeze(1)  # c_t, (B, inputs)
        gates = gates + torch.addmm(table[characters], context, by_context)
        i, f, g, o = gates.chunk(4, 1)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory
