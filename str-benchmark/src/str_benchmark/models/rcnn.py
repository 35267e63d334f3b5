"""RCNN feature extractor (GRCNN; table 6): gated recurrent convolutions, (B, C, 32, 100) to (B, 512, 1, 26)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from str_benchmark.models.vgg import conv_bn_relu, conv_relu


class GRCL(nn.Module):
    """Gated recurrent convolution: weights shared over the iterations, batch norms not.

    x_0 = relu(BN(w_f u)); G_t = sigmoid(BN(w_gf u) + BN(w_gr x_{t-1}));
    x_t = relu(BN(w_f u) + BN(BN(w_r x_{t-1}) * G_t)).
    """

    def __init__(self, inputs: int, outputs: int, iterations: int = 5):
        super().__init__()
        self.wgf_u = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.wgr_x = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.wf_u = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.wr_x = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.BN_x_init = nn.BatchNorm2d(outputs)
        self.GRCL = nn.ModuleList(GRCLUnit(outputs) for _ in range(iterations))

    def forward(self, u: Tensor) -> Tensor:
        wgf_u, wf_u = self.wgf_u(u), self.wf_u(u)
        x = torch.relu(self.BN_x_init(wf_u))
        for unit in self.GRCL:
            x = unit(wgf_u, self.wgr_x(x), wf_u, self.wr_x(x))
        return x


class GRCLUnit(nn.Module):
    """One iteration: its five batch norms."""

    def __init__(self, channels: int):
        super().__init__()
        self.BN_gfu = nn.BatchNorm2d(channels)
        self.BN_grx = nn.BatchNorm2d(channels)
        self.BN_fu = nn.BatchNorm2d(channels)
        self.BN_rx = nn.BatchNorm2d(channels)
        self.BN_Gx = nn.BatchNorm2d(channels)

    def forward(self, wgf_u: Tensor, wgr_x: Tensor, wf_u: Tensor, wr_x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.BN_gfu(wgf_u) + self.BN_grx(wgr_x))
        return torch.relu(self.BN_fu(wf_u) + self.BN_Gx(self.BN_rx(wr_x) * gate))


class RCNN(nn.Module):
    """Three gated recurrent convolution layers between a first and a last convolution."""

    def __init__(self, in_channels: int, output_channel: int):
        super().__init__()
        c = output_channel
        self.ConvNet = nn.Sequential(
            *conv_relu(in_channels, c // 8),
            nn.MaxPool2d(2, 2),
            GRCL(c // 8, c // 8),
            nn.MaxPool2d(2, 2),
            GRCL(c // 8, c // 4),
            nn.MaxPool2d(2, (2, 1), (0, 1)),
            GRCL(c // 4, c // 2),
            nn.MaxPool2d(2, (2, 1), (0, 1)),
            *conv_bn_relu(c // 2, c, kernel=2, padding=0),  # table 6 prints 3x3; 2x27 to 1x26 needs 2x2
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.ConvNet(images)
