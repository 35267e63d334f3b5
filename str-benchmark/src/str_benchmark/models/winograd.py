"""3x3 convolutions by Winograd's F(2x2, 3x3): 16 products for four outputs instead of 36, for wide layers on a CPU."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
GROUP = 2  # images at once: their tiles stay in the cache
MIN_CHANNELS = 256  # below this, the transforms cost more than the products save


class WinogradConv2d(nn.Module):
    """Inference form of a 3x3 convolution of stride 1 and padding 1; equal up to rounding (about 1e-6 relative).

    Input and output (B, C, H, W), best in channels_last.
    """

    weight: Tensor  # (16, C, O)

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        weight = torch.einsum(
            "ai,ocij,bj->abco", WEIGHT_TRANSFORM, convolution.weight.detach().double(), WEIGHT_TRANSFORM
        )
        self.register_buffer("weight", weight.flatten(0, 1).to(convolution.weight.dtype).contiguous())
        self.bias = convolution.bias

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a convolution of this form, wide enough to gain."""
        return (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups) == ((1, 1), 1)
            and module.in_channels >= MIN_CHANNELS
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self._convolve(group) for group in images.split(GROUP)])

    def _convolve(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2  # tiles of 2x2 outputs
        padding = (0, 0, 1, 1 + 2 * columns - width, 1, 1 + 2 * rows - height)
        padded = F.pad(images.permute(0, 2, 3, 1), padding)  # (B, 2 rows + 2, 2 columns + 2, C)
        tiles = images.new_empty(4, 4, batch, rows, columns, channels)
        for i, row in enumerate(_along([padded[:, k : k + 2 * rows : 2] for k in range(4)])):
            for j, tile in enumerate(_along([row[:, :, k : k + 2 * columns : 2] for k in range(4)])):
                tiles[i, j] = tile
        products = torch.bmm(tiles.view(16, -1, channels), self.weight)
        products = products.view(4, 4, batch, rows, columns, -1)
        output = images.new_empty(batch, rows, 2, columns, 2, products.shape[-1])
        pairs = products[0] + products[1] + products[2], products[1] - products[2] - products[3]
        for i, row in enumerate(pairs):  # (4, B, rows, columns, O)
            output[:, :, i, :, 0] = row[0] + row[1] + row[2]
            output[:, :, i, :, 1] = row[1] - row[2] - row[3]
        output = output.view(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]
        if self.bias is not None:
            output = output + self.bias
        return output.permute(0, 3, 1, 2)


def _along(d: list[Tensor]) -> tuple[Tensor, ...]:
    """Input transform along one axis, of four samples that overlap by two."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]
