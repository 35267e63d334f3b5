"""LEAF's network for FEMNIST: two convolutions and two linear layers; at width 2048 it has LEAF's size."""

from __future__ import annotations

from torch import Tensor, nn


class CNN(nn.Module):
    """Two 5 x 5 convolutions (width / 64 and / 32 channels), each with ReLU and 2 x 2 pooling; FC-width, ReLU; logits.

    Args:
        side: pixels of a grey image, a multiple of 4.
        width: units of the first linear layer; LEAF uses 2048.
        classes: logits.
    """

    def __init__(self, side: int = 28, width: int = 2048, classes: int = 62):
        super().__init__()
        if width < 64 or side % 4:
            raise ValueError(f"cnn: hidden must be 64 or more and side a multiple of 4, got {width} and {side}")
        channels = width // 64
        self.conv1 = nn.Conv2d(1, channels, 5, padding=2)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 5, padding=2)
        self.fc1 = nn.Linear(2 * channels * (side // 4) ** 2, width)
        self.fc2 = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, side, side) to logits (n, classes)."""
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())
