"""A backbone in three parts, with a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wsol_eval.models.heads import Head, Outputs


class WSOLNetwork(nn.Module):
    """Classifier with score maps.

    Args:
        low: images (B, 3, H, W) -> features of the side head B1 of SPG.
        middle: -> features of the side head B2.
        top: -> features of the head, at the size of the score map.
        head: of the method.
        is_new: of a parameter's name, whether it takes the larger learning rate (`lr_classifier_ratio`).
    """

    def __init__(self, low: nn.Module, middle: nn.Module, top: nn.Module, head: Head, is_new: Callable[[str], bool]):
        super().__init__()
        self.low, self.middle, self.top, self.head = low, middle, top, head
        self._is_new = is_new

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Outputs:
        """Logits (B, classes) and what the head's loss and score map need; ACoL erases by `labels` where given."""
        low = self.low(images)
        middle = self.middle(low)
        outputs = self.head((low, middle, self.top(middle)), labels)
        return outputs | {"input_size": images.shape[-2:]}

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """The method's training loss."""
        return self.head.loss(outputs, labels)

    @torch.no_grad()
    def predict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and raw score maps (B, h, w) of the given classes, from one forward pass."""
        outputs = self(images, labels)
        return outputs["logits"], self.head.score_map(outputs, labels).float()

    def score_map(self, images: Tensor, labels: Tensor) -> Tensor:
        """Raw score maps (B, h, w) of the given classes."""
        return self.predict(images, labels)[1]

    def parameter_groups(self, lr: float, new_ratio: float = 10.0) -> list[dict]:
        """Pretrained parameters at `lr`, new ones at `lr * new_ratio`."""
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.named_parameters():
            groups[self._is_new(name)].append(parameter)
        return [{"params": each, "lr": lr * ratio} for each, ratio in zip(groups, (1, new_ratio), strict=True) if each]
