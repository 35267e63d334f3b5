"""Positional encodings of the encoder (section 3.2.2): adaptive 2-D (A2DPE), 1-D flattened, 2-D concatenated.

Tables are computed on the fly, so maps of any height and width work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoid(n: int, d: int, layout: str = "interleaved", *, device: torch.device | None = None) -> Tensor:
    """Sinusoids of positions 0 .. n-1 (equations 4 and 5), computed in float64.

    Args:
        n: positions.
        d: channels, even.
        layout: interleaved (sin and cos in turn, as printed) or halves (sin first, then cos, as in the official code).
        device: device of the table.

    Returns:
        Table [n, d], float32.

    Raises:
        ValueError: another layout, or d odd.
    """
    if layout not in ("interleaved", "halves") or d % 2:
        raise ValueError(f"sinusoid needs layout interleaved or halves and an even d, got {layout!r} and {d}")
    exponent = torch.arange(d // 2, dtype=torch.float64, device=device) / (
        d / 2 if layout == "interleaved" else max(d // 2 - 1, 1)
    )
    position = torch.arange(n, dtype=torch.float64, device=device)
    angle = position[:, None] * 10000.0**-exponent  # (n, d/2)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1 if layout == "interleaved" else 1)
    return table.reshape(n, d).float()


class AdaptivePositionalEncoding2D(nn.Module):
    """A2DPE: rows and columns weighted per image and channel by gates that see the whole map (equations 3 to 8).

    p_hw = alpha(E) * s_h + beta(E) * s_w with alpha(E) = sigmoid(relu(g(E) W1) W2), g the average over positions.

    Args:
        d: channels.
        hidden: width of the gates' hidden layers; None: d/2.
        mlp: separate (one perceptron each, as printed) or shared (one hidden layer for both, as the official code).
        bias: whether the perceptrons have biases; the paper prints none.
        layout: layout of the sinusoids.
        dropout: rate on the hidden vector (official code).
    """

    def __init__(
        self,
        d: int,
        hidden: int | None = None,
        mlp: str = "separate",
        bias: bool = False,
        layout: str = "interleaved",
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = hidden or d // 2
        self.layout, self.shared = layout, mlp == "shared"
        perceptron = [nn.Linear(d, hidden, bias), nn.ReLU(), nn.Dropout(dropout)]
        if self.shared:
            self.scales = nn.Sequential(*perceptron, nn.Linear(hidden, 2 * d, bias))  # first d: alpha
        else:
            self.h_scale = nn.Sequential(*perceptron, nn.Linear(hidden, d, bias))
            self.w_scale = nn.Sequential(nn.Linear(d, hidden, bias), *perceptron[1:], nn.Linear(hidden, d, bias))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and beta [B, d] in (0, 1) of maps [B, d, H, W]."""
        pooled = x.mean(dim=(2, 3))  # (B, d)
        if self.shared:
            alpha, beta = self.scales(pooled).chunk(2, dim=1)
        else:
            alpha, beta = self.h_scale(pooled), self.w_scale(pooled)
        return alpha.sigmoid(), beta.sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B, d, H, W] to (x + p, alpha [B, d], beta [B, d])."""
        d, height, width = x.shape[1:]
        alpha, beta = self.gates(x)
        rows = sinusoid(height, d, self.layout, device=x.device).T[:, :, None].to(x.dtype)  # (d, H, 1)
        columns = sinusoid(width, d, self.layout, device=x.device).T[:, None, :].to(x.dtype)  # (d, 1, W)
        return x + alpha[:, :, None, None] * rows + beta[:, :, None, None] * columns, alpha, beta


def fixed_encoding(kind: str, d: int, height: int, width: int, layout: str, device: torch.device) -> Tensor:
    """The controls of table 3a: a table [d, H, W], zero for none.

    Args:
        kind: none, 1d (positions of the flattened map) or 2d_concat (rows in the first d/2 channels, columns in the
            rest).
        d: channels.
        height: rows of the map.
        width: columns of the map.
        layout: layout of the sinusoids.
        device: of the table.
    """
    if kind == "none":
        return torch.zeros(d, height, width, device=device)
    if kind == "1d":
        return sinusoid(height * width, d, layout, device=device).T.reshape(d, height, width)
    rows = sinusoid(height, d // 2, layout, device=device).T[:, :, None].expand(-1, height, width)
    columns = sinusoid(width, d // 2, layout, device=device).T[:, None, :].expand(-1, height, width)
    return torch.cat([rows, columns])
