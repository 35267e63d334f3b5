"""The multi-layer perceptrons of the two-dimensional toy (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rebias.models.network import Network


class MLP(Network):
    """Two hidden ReLU layers on some of the inputs.

    Args:
        num_classes: C.
        columns: which coordinates it sees; f sees (0, 1), g only the bias (0,).
        width: width of both hidden layers.
    """

    columns: Tensor

    def __init__(self, num_classes: int = 3, columns: Sequence[int] = (0, 1), width: int = 64):
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns), persistent=False)  # a CUDA graph cannot copy a list
        self.hidden = nn.Sequential(nn.Linear(len(columns), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2) -> logits (B, C) and features (B, width)."""
        features = self.hidden(points[:, self.columns])
        return self.fc(features), features
