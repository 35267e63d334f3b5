"""FAN (Cheng et al., ICCV 2017), table 4's 1-D rival, as in the official repository: without its focusing network.

A ResNet lowers the map to one row, a bidirectional LSTM reads its columns, and an LSTM with attention decodes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from satrn.config import SATRNConfig
from satrn.laff import ConvNormReLU
from satrn.models.cnn import residual_stage
from satrn.models.sar import AttendingLSTM, LSTMState, in_float32


class ColumnEncoder(nn.Module):
    """[B, C, H, W] to a map of one row [B, d, 1, W/4 + 1]; channels are the official ones at d = 512.

    The official code takes images 32 pixels high only; at table 4's 64, three rows are left, and their mean is taken.

    Args:
        channels_in: 1 or 3.
        d: channels out.
    """

    def __init__(self, channels_in: int, d: int):
        super().__init__()
        lower_only = nn.MaxPool2d(2, stride=(2, 1), padding=(0, 1))
        self.layers = nn.Sequential(
            *(ConvNormReLU(channels_in, d // 16, 3), ConvNormReLU(d // 16, d // 8, 3)),
            *(nn.MaxPool2d(2), *residual_stage(d // 8, d // 4, 1), ConvNormReLU(d // 4, d // 4, 3)),
            *(nn.MaxPool2d(2), *residual_stage(d // 4, d // 2, 2), ConvNormReLU(d // 2, d // 2, 3)),
            *(lower_only, *residual_stage(d // 2, d, 5), ConvNormReLU(d, d, 3)),
            *residual_stage(d, d, 3),
            *(nn.Conv2d(d, d, 2, stride=(2, 1), padding=(0, 1), bias=False), nn.BatchNorm2d(d), nn.ReLU()),
            *(nn.Conv2d(d, d, 2, bias=False), nn.BatchNorm2d(d), nn.ReLU()),
        )
        self.rnn = nn.LSTM(d, d // 2, batch_first=True, bidirectional=True)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.layers(images).mean(dim=2).transpose(1, 2)  # (B, W', d)
        return in_float32(self.rnn, columns).transpose(1, 2).unsqueeze(2)


class ColumnDecoder(AttendingLSTM):
    """An LSTM of width d/2 that starts from zeros; the keys of its attention are a projection of the columns."""

    def __init__(self, cfg: SATRNConfig):
        super().__init__(cfg, width=cfg.d_model // 2, query_bias=True)
        self.key = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def start(self, memory: Tensor, hw: tuple[int, int]) -> LSTMState:
        """Keys of the columns [B, T, d]; nothing has been seen yet."""
        zeros = memory.new_zeros(len(memory), self.cfg.d_model // 2)
        weights = memory.new_zeros(memory.shape[:2])
        return LSTMState(memory, self.key(memory), zeros, zeros, torch.zeros_like(memory[:, 0]), weights)
