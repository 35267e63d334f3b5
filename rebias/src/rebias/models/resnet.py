"""ResNet-18 (f of 9-class ImageNet) that returns features as well as logits."""

from __future__ import annotations

from torch import Tensor, nn

from rebias.models.network import Network


class ResNet18(Network):
    """torchvision's ResNet-18, trained from scratch; 11,181,129 parameters with 9 classes."""

    def __init__(self, num_classes: int = 9):
        from torchvision.models import resnet18  # slow to import, and nothing else in the package needs it

        super().__init__()
        self.backbone = resnet18(num_classes=num_classes)
        self.fc, self.backbone.fc = self.backbone.fc, nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, C) and pooled features (B, 512)."""
        features = self.backbone(images)
        return self.fc(features), features
