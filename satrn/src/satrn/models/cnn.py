"""CNNs before the encoder: the paper's shallow one (section 3.2.1), and SAR's ResNet-31 for table 2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from satrn.laff import ConvNormReLU


class ShallowCNN(nn.Module):
    """Two 3x3 convolutions, each with batch norm, ReLU and max pooling: [B, C, H, W] to [B, d, H/4, W/4].

    Any further downsampling happens in the first pooling (the interpretation that fits table 3b's FLOPs).

    Args:
        channels_in: 1 or 3.
        d: channels out; d/2 in between.
        downsample: reduction of height and width, powers of two from 2 on.
    """

    def __init__(self, channels_in: int, d: int, downsample: tuple[int, int] = (4, 4)):
        super().__init__()
        self.conv1 = ConvNormReLU(channels_in, d // 2, 3)
        self.conv2 = ConvNormReLU(d // 2, d, 3)
        self.first_pool = tuple(factor // 2 for factor in downsample)

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(images), self.first_pool)), 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, in a stage's first block through a 1x1 convolution, batch norm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, first: bool):
        super().__init__()
        self.conv1 = ConvNormReLU(channels_in, channels_out, 3)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = ConvNormReLU(channels_in, channels_out, 1) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(self.conv1(x))), inplace=True)


def residual_stage(channels_in: int, channels_out: int, blocks: int) -> list[nn.Module]:
    """Blocks of the official repository's ResNets; height and width stay the same."""
    widths = [channels_in] + [channels_out] * blocks
    return [ResidualBlock(width, channels_out, first=n == 0) for n, width in enumerate(widths[:-1])]


class ResNet31(nn.Module):
    """SAR's CNN: [B, C, H, W] to [B, d, H/4, W/4]; channels are the official ones at d = 512.

    Li et al. pool the height once more, before the third stage; the official repository does not.

    Args:
        channels_in: 1 or 3.
        d: channels out.
    """

    def __init__(self, channels_in: int, d: int):
        super().__init__()
        layers: list[nn.Module] = [ConvNormReLU(channels_in, d // 8, 3), ConvNormReLU(d // 8, d // 4, 3)]
        width = d // 4
        for pooled, channels, blocks in ((True, d // 2, 1), (True, d // 2, 2), (False, d, 5), (False, d, 3)):
            layers += [nn.MaxPool2d(2)] if pooled else []
            layers += [*residual_stage(width, channels, blocks), ConvNormReLU(channels, channels, 3)]
            width = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
