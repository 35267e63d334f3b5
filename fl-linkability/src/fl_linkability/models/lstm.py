"""The paper's networks for texts: an embedding, one LSTM, one linear layer (sections 5.1 and 5.2; Table 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_linkability.data.bundle import NOTHING


class LSTM(nn.Module):
    """One layer in plain operations that vmap supports; one bias; gate order and initialisation as in torch."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.empty(4 * hidden))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """(n, length, inputs) to states (n, length, hidden); unchanged where `real`, bool (n, length), is false."""
        arriving = nn.functional.linear(x, self.weight_ih, self.bias)
        h = c = arriving.new_zeros(len(x), self.weight_hh.shape[1])
        states = []
        for step in range(x.shape[1]):
            i, f, g, o = (arriving[:, step] + h @ self.weight_hh.T).chunk(4, 1)
            next_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            here = real[:, step, None]
            h, c = torch.where(here, o.sigmoid() * next_c.tanh(), h), torch.where(here, next_c, c)
            states.append(h)
        return torch.stack(states, 1)


class TextLSTM(nn.Module):
    """The next word at each position (Blog), or one number for the whole text, such as stars (Yelp).

    Args:
        vocabulary: all tokens are smaller than this; NOTHING pads the end.
        embedding: numbers per word.
        hidden: units of the LSTM.
        next_word: logits of the next word, or a number.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int, next_word: bool):
        super().__init__()
        self.next_word = next_word
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = LSTM(embedding, hidden)
        self.fc = nn.Linear(hidden, vocabulary if next_word else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens int64 (n, length) to logits (n, length, vocabulary) or numbers (n,); float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            states = self.lstm(self.embedding(x), x != NOTHING)
            return self.fc(states) if self.next_word else self.fc(states[:, -1]).squeeze(1)
