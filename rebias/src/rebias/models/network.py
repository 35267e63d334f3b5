"""What the methods need of a network."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """Its `forward(x)` gives (logits, features); `fc` makes the one from the other."""

    fc: nn.Linear
