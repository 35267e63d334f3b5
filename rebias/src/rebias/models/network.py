"""What the methods need from a network."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """Its `forward(x)` returns (logits, features); `fc` computes the logits from the features."""

    fc: nn.Linear
