"""Locality-aware feed-forward (section 3.2.3, figure 4): the encoder's feed-forward sees a 3x3 neighbourhood."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalization, ReLU; the map keeps its size."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class LocalityAwareFeedForward(nn.Module):
    """Figure 4: (a) fc: 1x1, 1x1; (b) conv: 3x3, 3x3; (c) separable, the model's: 1x1, depthwise 3x3, 1x1.

    Args:
        d: channels in and out.
        f: hidden channels.
        kind: separable, conv or fc.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, d: int, f: int, kind: str = "separable"):
        super().__init__()
        if kind not in ("separable", "conv", "fc"):
            raise ValueError(f"kind must be separable, conv or fc, got {kind!r}")
        kernel = 3 if kind == "conv" else 1
        self.conv1 = ConvNormReLU(d, f, kernel)
        self.depthwise_conv = ConvNormReLU(f, f, 3, groups=f) if kind == "separable" else nn.Identity()
        self.conv2 = ConvNormReLU(f, d, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, d, H, W] to [B, d, H, W]; fastest in channels_last."""
        return self.conv2(self.depthwise_conv(self.conv1(x)))
