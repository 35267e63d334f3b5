"""MobileNetV2 for photos with several labels each (the paper uses MobileNet v1 at 224 pixels)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

BN_MODES = ("frozen", "local", "sent")


class MobileNetV2(nn.Module):
    """Backbone and one linear layer of logits, one per label.

    Args:
        classes: labels.
        pretrained: start from ImageNet's weights (fetched once by torchvision into its own cache).
        bn: what batch norm does in a client. frozen: running statistics are kept; local: statistics of the batch,
            nothing kept or sent; sent: running statistics are part of the update. The last two need engine "loop".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int, pretrained: bool = True, bn: str = "frozen"):
        super().__init__()
        if bn not in BN_MODES:
            raise ValueError(f"bn must be one of {', '.join(BN_MODES)}, got {bn!r}")
        net = mobilenet_v2(weights=MobileNet_V2_Weights.IMAGENET1K_V1 if pretrained else None)
        self.features, self.bn = net.features, bn
        self.fc = nn.Linear(net.last_channel, classes)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if bn == "local":
            replace_all_batch_norm_modules_(self.features)

    def train(self, mode: bool = True) -> MobileNetV2:
        """As usual, but frozen batch norm stays in evaluation mode."""
        super().train(mode)
        if self.bn == "frozen":
            for module in self.features.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def embed(self, x: Tensor) -> Tensor:
        """Images in [0, 1], (n, 3, H, W), to features (n, 1280)."""
        return self.features((x - self.mean) / self.std).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (n, classes)."""
        return self.fc(self.embed(x))
