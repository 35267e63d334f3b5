"""HEX's network (Wang et al. 2019): a convolutional branch, and a grey-level co-occurrence branch that sees texture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rebias.models.network import Network


class NGLCM(nn.Module):
    """Neural grey-level co-occurrence: soft histograms of neighbouring grey values, and a perceptron on them.

    Args:
        levels: grey levels, with learned centres and one learned width.
        feat_dim: of the output.
    """

    def __init__(self, levels: int = 8, feat_dim: int = 64):
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, levels))
        self.log_width = nn.Parameter(torch.tensor(2.0 / levels).log())
        self.head = nn.Sequential(nn.Linear(2 * levels * levels, feat_dim), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, feat_dim); pairs of horizontal and of vertical neighbours."""
        grey = images.mean(1)  # (B, H, W)
        levels = (-((grey[..., None] - self.centres) / self.log_width.exp()).square() / 2).softmax(-1)
        right = torch.einsum("bhwi,bhwj->bij", levels[:, :, :-1], levels[:, :, 1:]) / levels[0, :, 1:, 0].numel()
        down = torch.einsum("bhwi,bhwj->bij", levels[:, :-1], levels[:, 1:]) / levels[0, 1:, :, 0].numel()
        return self.head(torch.stack([right, down], 1).flatten(1))


class HexNet(nn.Module):
    """One classifier on the features of a network f and of NGLCM; zeros stand for the branch that is left out.

    Args:
        backbone: a network of this package with `forward(x) -> (logits, features)`; its own classifier is unused.
        feat_dim: of its features.
        num_classes: C.
        superficial_dim: features of NGLCM.
    """

    def __init__(self, backbone: Network, feat_dim: int, num_classes: int, superficial_dim: int = 64):
        super().__init__()
        self.backbone, self.superficial = backbone, NGLCM(feat_dim=superficial_dim)
        self.superficial_dim = superficial_dim
        self.head = nn.Linear(feat_dim + superficial_dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> F_P = head([h_f, 0]) (B, C), the logits at test time, and h_f (B, feat_dim)."""
        _, h_f = self.backbone(images)
        return self.head(torch.cat([h_f, h_f.new_zeros(len(h_f), self.superficial_dim)], 1)), h_f

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> F_A = head([h_f, h_g]) and F_G = head([0, h_g]), both (B, C)."""
        _, h_f = self.backbone(images)
        h_g = self.superficial(images)
        f_a = self.head(torch.cat([h_f, h_g], 1))
        return f_a, self.head(torch.cat([torch.zeros_like(h_f), h_g], 1))
