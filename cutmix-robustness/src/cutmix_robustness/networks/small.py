"""Networks that two cores train in minutes: 18 thousand parameters for small textures, 280 thousand for CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cutmix_robustness.networks.blocks import branch_regularizers


def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class SmallNet(nn.Module):
    """Five 3 x 3 convolutions with batch norm; the two that keep their shape can be residual branches that are dropped.

    Args:
        num_classes: K.
        branch: none, stochdepth, shakedrop or dropblock, on the third and the fifth layer, with a shortcut around them
            for stochdepth and shakedrop.
        branch_rate: see `branch_regularizers`.
        width: channels of the first layer; the last has four times as many.
        stem_stride: stride of the first convolution.
    """

    points = ("conv1", "layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int = 15,
        branch: str = "none",
        branch_rate: float = 0.5,
        width: int = 8,
        stem_stride: int = 1,
    ):
        super().__init__()
        self.conv1 = _layer(3, width, stem_stride)
        self.layer1 = _layer(width, 2 * width, 2)
        self.layer2 = _layer(2 * width, 2 * width, 1)
        self.layer3 = _layer(2 * width, 4 * width, 2)
        self.layer4 = _layer(4 * width, 4 * width, 1)
        self.branches = nn.ModuleList(branch_regularizers(branch, 2, branch_rate, block_size=2))
        self.residual = branch in ("stochdepth", "shakedrop")
        self.fc = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, 4 * width, H / 4, W / 4), half of that after a stem of stride 2."""
        x = self.layer1(self.conv1(x))
        x = self._branch(x, self.layer2, self.branches[0])
        return self._branch(self.layer3(x), self.layer4, self.branches[1])

    def _branch(self, x: Tensor, layer: nn.Module, regularizer: nn.Module) -> Tensor:
        out = regularizer(layer(x))
        return x + out if self.residual else out

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
