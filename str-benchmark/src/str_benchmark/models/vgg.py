"""VGG feature extractor (CRNN; table 5): (B, C, 32, 100) to (B, 512, 1, 24)."""

from __future__ import annotations

from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride=1, padding=1) -> list[nn.Module]:
    """A convolution without bias, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def conv_relu(inputs: int, outputs: int, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    """A convolution with bias, ReLU."""
    return [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.ReLU(inplace=True)]


class VGG(nn.Module):
    """Seven convolutions; the two before the last pooling with batch norm."""

    def __init__(self, in_channels: int, output_channel: int):
        super().__init__()
        c = output_channel
        self.ConvNet = nn.Sequential(
            *conv_relu(in_channels, c // 8),
            nn.MaxPool2d(2, 2),
            *conv_relu(c // 8, c // 4),
            nn.MaxPool2d(2, 2),
            *conv_relu(c // 4, c // 2),
            *conv_relu(c // 2, c // 2),
            nn.MaxPool2d((2, 1), (2, 1)),
            *conv_bn_relu(c // 2, c),
            *conv_bn_relu(c, c),
            nn.MaxPool2d((2, 1), (2, 1)),
            *conv_relu(c, c, kernel=2, padding=0),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.ConvNet(images)
