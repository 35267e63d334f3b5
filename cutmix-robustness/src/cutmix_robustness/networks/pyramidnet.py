"""PyramidNet for 32 x 32 images: every block is a little wider than the last (the paper's main network on CIFAR)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_robustness.networks.blocks import branch_regularizers, initialise


class PyramidBlock(nn.Module):
    """BN-conv-BN-ReLU-conv-BN, no ReLU after the addition; as a bottleneck 1x1, 3x3 and 1x1 to four times the width.

    The shortcut is the identity, or a 2 x 2 average, padded with zero channels.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool, branch: nn.Module):
        super().__init__()
        self.out_channels = width * (4 if bottleneck else 1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False)
            self.bn4 = nn.BatchNorm2d(self.out_channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(width)
        self.bottleneck, self.stride, self.branch = bottleneck, stride, branch

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.conv1(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(out)))
        if self.bottleneck:
            out = self.bn4(self.conv3(F.relu(self.bn3(out))))
        else:
            out = self.bn3(out)
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.out_channels - shortcut.shape[1]))
        return self.branch(out) + shortcut


class PyramidNet(nn.Module):
    """Three stages of (depth - 2) / 9 bottleneck or (depth - 2) / 6 basic blocks; see `pyramidnet`."""

    points = ("bn1", "layer1", "layer2", "layer3")
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, alpha: float, num_classes: int, bottleneck: bool, branch: str, branch_rate: float):
        super().__init__()
        per_stage, rest = divmod(depth - 2, 9 if bottleneck else 6)
        if rest or per_stage < 1:
            raise ValueError(f"depth must be {'9 n + 2' if bottleneck else '6 n + 2'}, got {depth}")
        branches = branch_regularizers(branch, 3 * per_stage, branch_rate)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels, exact_width = 16, 16.0
        for stage in range(3):
            blocks = []
            for number in range(per_stage):
                exact_width += alpha / (3 * per_stage)
                stride = 2 if stage and number == 0 else 1
                block = PyramidBlock(channels, round(exact_width), stride, bottleneck, branches.pop(0))
                channels = block.out_channels
                blocks.append(block)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn_final = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, C, H / 4, W / 4); `fc` reads their mean."""
        x = self.bn1(self.conv1(x))
        return F.relu(self.bn_final(self.layer3(self.layer2(self.layer1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        return self.fc(self.features(x).mean((2, 3)))


def pyramidnet(
    depth: int = 200,
    alpha: float = 240,
    num_classes: int = 100,
    bottleneck: bool = True,
    branch: str = "none",
    branch_rate: float = 0.5,
) -> PyramidNet:
    """PyramidNet; 26,844,952 parameters at the defaults.

    Args:
        depth: 9 n + 2 with bottlenecks, 6 n + 2 without.
        alpha: channels added from the first block to the last.
        num_classes: K.
        bottleneck: bottleneck or basic blocks.
        branch: none, stochdepth, shakedrop or dropblock.
        branch_rate: see `branch_regularizers`.

    Raises:
        ValueError: a depth that does not give whole blocks, or an unknown branch.
    """
    return PyramidNet(depth, alpha, num_classes, bottleneck, branch, branch_rate)
