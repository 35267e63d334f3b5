"""TPS transformation stage: a localization network places fiducial points, the image is resampled (table 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from str_benchmark.models.vgg import conv_bn_relu
from str_benchmark.tps import ThinPlateSpline, skewed_start


class LocalizationNetwork(nn.Module):
    """Images (B, C, H, W) to fiducial points C' (B, F, 2), x and y in [-1, 1] where they lie inside the image."""

    def __init__(self, num_fiducial: int, in_channels: int, channels: int = 512):
        super().__init__()
        c = channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, c // 8),
            nn.MaxPool2d(2, 2),
            *conv_bn_relu(c // 8, c // 4),
            nn.MaxPool2d(2, 2),
            *conv_bn_relu(c // 4, c // 2),
            nn.MaxPool2d(2, 2),
            *conv_bn_relu(c // 2, c),
            nn.AdaptiveAvgPool2d(1),
        )
        self.localization_fc1 = nn.Sequential(nn.Linear(c, c // 2), nn.ReLU(inplace=True))
        self.localization_fc2 = nn.Linear(c // 2, 2 * num_fiducial)
        self.reset_last()

    def reset_last(self) -> None:
        """Weight 0 and the skewed start as bias, so that training starts from known points."""
        with torch.no_grad():
            self.localization_fc2.weight.zero_()
            points = skewed_start(self.localization_fc2.out_features // 2)
            self.localization_fc2.bias.copy_(points.flatten().float())

    def forward(self, images: Tensor) -> Tensor:
        features = self.localization_fc1(self.conv(images).flatten(1))
        return self.localization_fc2(features).unflatten(1, (-1, 2))


class TPSTransformation(nn.Module):
    """Spatial transformer with a thin plate spline; the rectified image has the size of the input."""

    def __init__(self, num_fiducial: int, size: tuple[int, int], in_channels: int, channels: int = 512):
        super().__init__()
        self.LocalizationNetwork = LocalizationNetwork(num_fiducial, in_channels, channels)
        self.GridGenerator = ThinPlateSpline(num_fiducial, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.GridGenerator.rectify(images, self.LocalizationNetwork(images))
