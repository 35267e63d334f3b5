"""SimpleConvNet of Biased MNIST: its kernel size decides whether it can see shapes (f, 7) or colour only (g, 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rebias.models.network import Network


class SimpleConvNet(Network):
    """Blocks of convolution, batch norm and ReLU, then global average pooling and a linear classifier.

    With the defaults it is the paper's f (531,210 parameters, receptive field 25); with kernel_size=1 its g (12,810).

    Args:
        num_classes: C.
        kernel_size: size of every kernel, odd; padding keeps the image size.
        widths: channels of the blocks.
        strides: strides of the blocks; default: 1 everywhere.
    """

    def __init__(
        self,
        num_classes: int = 10,
        kernel_size: int = 7,
        widths: Sequence[int] = (16, 32, 64, 128),
        strides: Sequence[int] | None = None,
    ):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        strides = strides or [1] * len(widths)
        if len(strides) != len(widths):
            raise ValueError(f"{len(widths)} widths need {len(widths)} strides, got {len(strides)}")
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((3, *widths), widths, strides, strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, C) and pooled features (B, widths[-1])."""
        features = self.layers(images).mean((2, 3))
        return self.fc(features), features
