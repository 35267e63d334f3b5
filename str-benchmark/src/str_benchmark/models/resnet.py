"""ResNet feature extractor (FAN's; table 7): (B, C, 32, 100) to (B, 512, 1, 26)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where channels change; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(x)) + shortcut)


def _blocks(inputs: int, outputs: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(inputs if i == 0 else outputs, outputs) for i in range(number)))


class ResNet(nn.Module):
    """The extractor under the name that the public checkpoints give it."""

    def __init__(self, in_channels: int, output_channel: int):
        super().__init__()
        self.ConvNet = ResNetLayers(in_channels, output_channel)

    def forward(self, images: Tensor) -> Tensor:
        return self.ConvNet(images)


class ResNetLayers(nn.Module):
    """29 trainable layers: 1, 2, 5 and 3 blocks, a convolution after each."""

    def __init__(self, in_channels: int, output_channel: int):
        super().__init__()
        c = output_channel

        def conv(inputs: int, outputs: int, kernel: int = 3, stride=1, padding=1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)

        self.conv0_1, self.bn0_1 = conv(in_channels, c // 16), nn.BatchNorm2d(c // 16)
        self.conv0_2, self.bn0_2 = conv(c // 16, c // 8), nn.BatchNorm2d(c // 8)
        self.maxpool1 = nn.MaxPool2d(2, 2)
        self.layer1 = _blocks(c // 8, c // 4, 1)
        self.conv1, self.bn1 = conv(c // 4, c // 4), nn.BatchNorm2d(c // 4)
        self.maxpool2 = nn.MaxPool2d(2, 2)
        self.layer2 = _blocks(c // 4, c // 2, 2)
        self.conv2, self.bn2 = conv(c // 2, c // 2), nn.BatchNorm2d(c // 2)
        self.maxpool3 = nn.MaxPool2d(2, (2, 1), (0, 1))
        self.layer3 = _blocks(c // 2, c, 5)
        self.conv3, self.bn3 = conv(c, c), nn.BatchNorm2d(c)  # table 7 prints 256; the parameter count has 512
        self.layer4 = _blocks(c, c, 3)
        self.conv4_1, self.bn4_1 = conv(c, c, 2, (2, 1), (0, 1)), nn.BatchNorm2d(c)
        self.conv4_2, self.bn4_2 = conv(c, c, 2, 1, 0), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn0_1(self.conv0_1(x)))
        x = torch.relu_(self.bn0_2(self.conv0_2(x)))
        x = self.layer1(self.maxpool1(x))  # (B, 128, 16, 50)
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = self.layer2(self.maxpool2(x))  # (B, 256, 8, 25)
        x = torch.relu_(self.bn2(self.conv2(x)))
        x = self.layer3(self.maxpool3(x))  # (B, 512, 4, 26)
        x = torch.relu_(self.bn3(self.conv3(x)))
        x = self.layer4(x)
        x = torch.relu_(self.bn4_1(self.conv4_1(x)))  # (B, 512, 2, 27)
        return torch.relu_(self.bn4_2(self.conv4_2(x)))
