"""HEX's network (Wang et al. 2019, after the released HaohanWang/HEX): a convolutional branch and a textural one.

Two things differ from the released code: pixels are quantised here and not in advance, and at test time the norm of a
feature over the batch is the running mean of training's, so that a prediction does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rebias.models.network import Network

LUMA = (0.2989, 0.587, 0.114)


class NGLCM(nn.Module):
    """Neural grey-level co-occurrence matrix: how often a grey level meets a difference to its left neighbour.

    Args:
        levels: grey levels (16 in the released MNIST experiments).
        feat_dim: dimension of the output.
    """

    def __init__(self, levels: int = 16, feat_dim: int = 32):
        super().__init__()
        self.levels = levels
        self.lambda_ = nn.Parameter(levels * torch.rand(levels, 1))  # thresholds of the differences
        self.theta = nn.Parameter(levels * torch.rand(levels, 1))  # thresholds of the levels
        self.fc = nn.Linear(levels * levels, feat_dim)
        _small(self.fc)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to [-1, 1] -> (B, feat_dim)."""
        grey = ((images + 1) / 2 * images.new_tensor(LUMA)[:, None, None]).sum(1)  # (B, H, W)
        level = (grey / grey.amax((1, 2), keepdim=True) * (self.levels - 1) + 1e-4).floor()
        difference = F.pad(level, (1, 0))[:, :, :-1] - level
        above = (level.flatten(1)[:, None] - self.theta).clamp(1e-5, 1)  # (B, levels, H * W)
        steps = (difference.flatten(1)[:, None] - self.lambda_).clamp(1e-5, 1)
        return self.fc((steps @ above.mT).flatten(1)).relu()


class BatchUnitNorm(nn.Module):
    """Scale every feature to unit length over the batch; in eval mode, by the running mean of the training lengths.

    Args:
        feat_dim: d of (B, d) features.
        momentum: weight of the present batch in the running mean.
    """

    norm: Tensor

    def __init__(self, feat_dim: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("norm", torch.ones(feat_dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        if not self.training:
            return features / self.norm.clamp_min(1e-6)
        norm = features.norm(dim=0)
        self.norm.lerp_(norm.detach(), self.momentum)
        return features / norm.clamp_min(1e-6)


class HexNet(nn.Module):
    """One classifier on the features of a network f and of NGLCM; zeros replace the branch that is left out.

    Args:
        backbone: a network of this package with `forward(x) -> (logits, features)`; its own classifier is unused.
        feat_dim: dimension of its features.
        num_classes: C.
        superficial_dim: features of NGLCM.
    """

    def __init__(self, backbone: Network, feat_dim: int, num_classes: int, superficial_dim: int = 32):
        super().__init__()
        self.backbone, self.superficial = backbone, NGLCM(feat_dim=superficial_dim)
        self.f_norm, self.g_norm = BatchUnitNorm(feat_dim), BatchUnitNorm(superficial_dim)
        self.superficial_dim = superficial_dim
        self.head = nn.Linear(feat_dim + superficial_dim, num_classes)
        _small(self.head)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> F_P = head([h_f, 0]) (B, C), the logits at test time, and h_f (B, feat_dim)."""
        h_f = self.f_norm(self.backbone(images)[1])
        return self.head(torch.cat([h_f, h_f.new_zeros(len(h_f), self.superficial_dim)], 1)), h_f

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> F_A = head([h_f, h_g]) and F_G = head([0, h_g]), both (B, C)."""
        h_f = self.f_norm(self.backbone(images)[1])
        h_g = self.g_norm(self.superficial(images))
        f_a = self.head(torch.cat([h_f, h_g], 1))
        return f_a, self.head(torch.cat([torch.zeros_like(h_f), h_g], 1))


def _small(linear: nn.Linear) -> None:
    """The released initialisation: a normal distribution of deviation 0.1, truncated at two deviations, and no bias."""
    nn.init.trunc_normal_(linear.weight, std=0.1, a=-0.2, b=0.2)
    nn.init.zeros_(linear.bias)
