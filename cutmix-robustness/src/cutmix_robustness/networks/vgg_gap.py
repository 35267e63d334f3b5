"""VGG-GAP: VGG-16's convolutions without the last pooling, one more convolution, and a global average (Table 9)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import vgg16

from cutmix_robustness.networks.blocks import initialise


class VggGap(nn.Module):
    """14 x 14 feature maps at 224 x 224; the convolutions carry torchvision's names (`vgg.0.weight`, ...).

    Args:
        num_classes: K.
    """

    points = ()

    def __init__(self, num_classes: int = 200):
        super().__init__()
        self.vgg = vgg16(weights=None).features[:-1]
        self.extra = nn.Sequential(nn.Conv2d(512, 1024, 3, padding=1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """Last feature maps (N, 1024, H / 16, W / 16)."""
        return self.extra(self.vgg(x))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        return self.fc(self.features(x).mean((2, 3)))
