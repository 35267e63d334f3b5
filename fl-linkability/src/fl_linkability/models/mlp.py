"""The digits' network: 256-32-10, 8,554 weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """One hidden layer. Weights are uniform in +-1/sqrt(fan_in), biases zero."""

    def __init__(self, inputs: int = 256, hidden: int = 32, classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, classes)
        for layer in (self.fc1, self.fc2):
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) to logits (n, classes)."""
        return self.fc2(self.fc1(x.flatten(1)).relu())

    @staticmethod
    def stacked(params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Many clients at once: stacked parameters (K, ...) and inputs (K, B, ...) to logits (K, B, classes).

        What vmap over `forward` gives, without its cost per step.
        """
        hidden = torch.baddbmm(params["fc1.bias"].unsqueeze(1), x.flatten(2), params["fc1.weight"].transpose(1, 2))
        return torch.baddbmm(params["fc2.bias"].unsqueeze(1), hidden.relu(), params["fc2.weight"].transpose(1, 2))


class Head(nn.Module):
    """One linear layer on features that a frozen network has computed."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) to logits (n, classes)."""
        return self.fc(x.flatten(1))

    @staticmethod
    def stacked(params: dict[str, Tensor], x: Tensor) -> Tensor:
        """As `MLP.stacked`."""
        return torch.baddbmm(params["fc.bias"].unsqueeze(1), x.flatten(2), params["fc.weight"].transpose(1, 2))
