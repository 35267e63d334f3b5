"""3-D ResNet-18 of the action experiment (Table A1): f has temporal kernels of 3, the per-frame g of 1."""

from __future__ import annotations

from torch import Tensor, nn

from rebias.models.network import Network


class Block(nn.Module):
    """A (t, 3, 3) and a (1, 3, 3) convolution with a shortcut; the stride is spatial."""

    def __init__(self, inputs: int, outputs: int, stride: int, temporal_kernel: int):
        super().__init__()
        t = temporal_kernel
        self.main = nn.Sequential(
            nn.Conv3d(inputs, outputs, (t, 3, 3), (1, stride, stride), (t // 2, 1, 1), bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(),
            nn.Conv3d(outputs, outputs, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, (1, stride, stride), bias=False), nn.BatchNorm3d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))


class ResNet3D(Network):
    """Depth 18 (the reference's "18.1"): 5,170,154 parameters with temporal kernels of 3, 2,801,450 with 1.

    Args:
        num_classes: C.
        temporal_kernels: of the stem and of the first convolution in the blocks of the four stages.
        width: channels of the stem.
    """

    def __init__(self, num_classes: int = 10, temporal_kernels: str = "33333", width: int = 32):
        super().__init__()
        stem, *stages = (int(kernel) for kernel in temporal_kernels)
        if len(stages) != 4 or any(kernel % 2 == 0 for kernel in (stem, *stages)):
            raise ValueError(f"temporal_kernels must be five odd digits, got {temporal_kernels!r}")
        layers: list[nn.Module] = [
            nn.Conv3d(3, width, (stem, 7, 7), (1, 2, 2), (stem // 2, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ]
        inputs = width
        for number, kernel in enumerate(stages):
            outputs = width * 2**number
            layers += [Block(inputs, outputs, 1 if number == 0 else 2, kernel), Block(outputs, outputs, 1, kernel)]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> logits (B, C) and features (B, 8 * width).

        In eval mode the classifier runs at every position that a 7x7 window has on the last feature map (one at 224
        pixels, four at 256), and the logits are the logarithm of the mean probability over them.
        """
        maps = self.layers(clips)  # (B, 8 * width, T, H / 32, W / 32)
        features = maps.mean((2, 3, 4))
        if self.training:
            return self.fc(features), features
        frames, height, width = maps.shape[2:]
        windows = nn.functional.avg_pool3d(maps, (frames, min(7, height), min(7, width)), stride=1)
        probabilities = self.fc(windows.flatten(2).mT).softmax(2).mean(1)  # (B, positions, C) -> (B, C)
        return probabilities.log(), features
