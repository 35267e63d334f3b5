"""BagNet-18 (g of 9-class ImageNet): a ResNet-18 of mostly 1x1 convolutions, which sees small patches of texture only.

The paper prints a receptive field of 43 pixels; the layers of the released code, used here, see 5.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from rebias.models.network import Network


class Block(nn.Module):
    """Two convolutions without padding, the second 1x1; the shortcut is cropped to the size of the main path."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        height, width = main.shape[2:]
        return self.relu(main + self.shortcut(x)[:, :, :height, :width])


class BagNet18(Network):
    """BagNet-18; 1,480,905 parameters with 9 classes.

    Only the stem and the first block of stage 1 have a 3x3 convolution. No convolution is padded.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int = 9):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 1, bias=False),
            nn.Conv2d(64, 64, 3, bias=False),
            nn.BatchNorm2d(64, momentum=0.001),
            nn.ReLU(),
        )
        blocks, inputs = [], 64
        for stage, (width, stride) in enumerate(zip((64, 128, 256, 512), (2, 2, 2, 1), strict=True)):
            blocks.append(Block(inputs, width, stride, kernel_size=3 if stage == 0 else 1))
            blocks.append(Block(width, width, 1, kernel_size=1))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) with H, W >= 5 -> logits (B, C) and pooled features (B, 512)."""
        features = self.blocks(self.stem(images)).mean((2, 3))
        return self.fc(features), features
