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

        Gives what vmap over `forward` gives, without its cost per step.
        """
        hidden = torch.baddbmm(params["fc1.bias"].unsqueeze(1), x.flatten(2), params["fc1.weight"].transpose(1, 2))
        return torch.baddbmm(params["fc2.bias"].unsqueeze(1), hidden.relu(), params["fc2.weight"].transpose(1, 2))

    @staticmethod
    def stacked_gradients(
        params: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Weighted cross-entropy of many clients and its gradient, written out: half of autograd's time at this size.

        Args:
            params: stacked, as in `stacked`.
            x: (K, B, ...).
            y: int64 (K, B).
            weights: (K, B), the weight of each sample's loss.

        Returns:
            losses (K,) and gradients in the order of fc1.weight, fc1.bias, fc2.weight, fc2.bias.
        """
        x, w2 = x.flatten(2), params["fc2.weight"]
        hidden = torch.baddbmm(params["fc1.bias"].unsqueeze(1), x, params["fc1.weight"].transpose(1, 2)).relu_()
        log_p = torch.baddbmm(params["fc2.bias"].unsqueeze(1), hidden, w2.transpose(1, 2)).log_softmax(2)
        target = y.unsqueeze(2)
        loss = -(log_p.gather(2, target).squeeze(2) * weights).sum(1)
        error = log_p.exp().scatter_add_(2, target, torch.full_like(target, -1, dtype=log_p.dtype))  # (K, B, classes)
        error *= weights.unsqueeze(2)
        inner = torch.bmm(error, w2).mul_(hidden > 0)  # (K, B, hidden)
        grads = [
            torch.bmm(inner.transpose(1, 2), x),
            inner.sum(1),
            torch.bmm(error.transpose(1, 2), hidden),
            error.sum(1),
        ]
        return loss, grads


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
