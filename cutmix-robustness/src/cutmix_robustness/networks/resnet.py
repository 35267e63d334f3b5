"""Residual networks: for 32 x 32 images (He et al., section 4.2), wide ones, and torchvision's for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from cutmix_robustness.networks.blocks import branch_regularizers, initialise

LAYERS = {
    "resnet14": (1, 1, 1, 1),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnext101_32x4d": (3, 4, 23, 3),
}


class BasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's block with a regularizer on the branch."""

    branch: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.branch(out) + shortcut)


class Bottleneck(torchvision_resnet.Bottleneck):
    """torchvision's block (stride in the 3 x 3 convolution) with a regularizer on the branch."""

    branch: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 4 * planes, H / stride, W / stride)."""
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.branch(out) + shortcut)


def _set_branches(network: nn.Module, branch: str, rate: float, block_size: int) -> None:
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock | Bottleneck)]
    for block, regularizer in zip(blocks, branch_regularizers(branch, len(blocks), rate, block_size), strict=True):
        block.branch = regularizer


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 planes; see `resnet_cifar`."""

    points = ("bn1", "layer1", "layer2", "layer3")
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, num_classes: int, bottleneck: bool):
        super().__init__()
        per_stage, rest = divmod(depth - 2, 9 if bottleneck else 6)
        if rest or per_stage < 1:
            raise ValueError(f"depth must be {'9 n + 2' if bottleneck else '6 n + 2'}, got {depth}")
        kind = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, planes in enumerate((16, 32, 64)):
            out, blocks = planes * kind.expansion, []
            for number in range(per_stage):
                stride = 2 if stage and number == 0 else 1
                downsample = None
                if stride == 2 or channels != out:
                    downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(kind(channels, planes, stride, downsample))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, C, H / 4, W / 4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        return self.fc(self.features(x).mean((2, 3)))


def resnet_cifar(
    depth: int = 110, num_classes: int = 100, bottleneck: bool = True, branch: str = "none", branch_rate: float = 0.5
) -> CifarResNet:
    """ResNet for 32 x 32 images; the paper's ResNet-110 has bottlenecks (1,170,868 parameters at the defaults).

    Args:
        depth: 9 n + 2 with bottlenecks, 6 n + 2 without.
        num_classes: K.
        bottleneck: bottleneck or basic blocks.
        branch: none, stochdepth, shakedrop or dropblock.
        branch_rate: see `branch_regularizers`.

    Raises:
        ValueError: a depth that does not give whole blocks, or an unknown branch.
    """
    network = CifarResNet(depth, num_classes, bottleneck)
    _set_branches(network, branch, branch_rate, block_size=4)
    initialise(network)
    return network


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv; if the shape changes, the shortcut is a convolution of the first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, branch: nn.Module):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return self.branch(out) + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Wide residual network; WRN-28-10 has depth 28 and widening 10 (36.5 M parameters with 100 classes)."""

    points = ("conv1", "layer1", "layer2", "layer3")
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, depth: int = 28, widen: int = 10, num_classes: int = 100, branch: str = "none", branch_rate: float = 0.5
    ):
        super().__init__()
        per_stage, rest = divmod(depth - 4, 6)
        if rest or per_stage < 1:
            raise ValueError(f"depth must be 6 n + 4, got {depth}")
        branches = branch_regularizers(branch, 3 * per_stage, branch_rate)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels = 16
        for stage, planes in enumerate((16, 32, 64)):
            blocks = []
            for number in range(per_stage):
                stride = 2 if stage and number == 0 else 1
                blocks.append(WideBlock(channels, planes * widen, stride, branches.pop(0)))
                channels = planes * widen
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, C, H / 4, W / 4)."""
        return F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        return self.fc(self.features(x).mean((2, 3)))


class ImageNetResNet(torchvision_resnet.ResNet):
    """torchvision's ResNet, with its parameter names, a regularizer per branch and access to its feature maps."""

    points = ("bn1", "layer1", "layer2", "layer3")

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, C, H / 32, W / 32), or H / 16 with dense features."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def resnet_imagenet(
    name: str = "resnet50",
    num_classes: int = 1000,
    branch: str = "none",
    branch_rate: float = 0.5,
    dense_features: bool = False,
) -> ImageNetResNet:
    """ResNet-14, ResNet-50, ResNet-101 or ResNeXt-101 (32x4d).

    Args:
        name: resnet14 (one block per layer, for trials), resnet50, resnet101 or resnext101_32x4d.
        num_classes: K.
        branch: none, stochdepth, shakedrop or dropblock (blocks of 7 here).
        branch_rate: see `branch_regularizers`.
        dense_features: layer4 with stride 1, 14 x 14 maps at 224 x 224, for localization.

    Raises:
        ValueError: an unknown name or branch.
    """
    if name not in LAYERS:
        raise ValueError(f"network must be one of {', '.join(LAYERS)}, got {name!r}")
    width = {"groups": 32, "width_per_group": 4} if name == "resnext101_32x4d" else {}
    network = ImageNetResNet(Bottleneck, list(LAYERS[name]), num_classes=num_classes, **width)
    _set_branches(network, branch, branch_rate, block_size=7)
    if dense_features:
        network.layer4[0].conv2.stride = network.layer4[0].downsample[0].stride = (1, 1)
    initialise(network)
    return network
