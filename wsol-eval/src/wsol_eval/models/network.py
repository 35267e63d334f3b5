"""What training and evaluation need of a network: `Network`; and ours, a backbone in three parts with a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wsol_eval.methods.attention import select
from wsol_eval.models.heads import Head, Outputs


class Network(nn.Module):
    """Classifier with score maps. A method of your own is a subclass with a `forward`; the rest has defaults.

    `forward(images, labels=None)` returns a dict with `logits` (B, classes) and what `loss` and `map_of` need; `labels`
    are None, or the classes (B,) in training and evaluation.
    """

    hyperparameters: ClassVar[dict[str, tuple[float, float]]] = {}
    """Keyword arguments of the constructor that `search` draws, uniformly between two bounds."""

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Training loss of a batch, 0-d."""
        return cross_entropy(outputs["logits"], labels)

    def map_of(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Raw score maps (B, h, w) of the given classes: their channels of `outputs["maps"]` (B, classes, h, w)."""
        return select(outputs["maps"], labels)

    def is_new(self, name: str) -> bool:
        """Whether the parameter of this name takes the larger learning rate (`lr_classifier_ratio`)."""
        return False

    @torch.no_grad()
    def predict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and raw score maps (B, h, w) of the given classes, from one forward pass."""
        outputs = self(images, labels)
        return outputs["logits"], self.map_of(outputs, labels).float()

    def score_map(self, images: Tensor, labels: Tensor) -> Tensor:
        """Raw score maps (B, h, w) of the given classes."""
        return self.predict(images, labels)[1]

    def parameter_groups(self, lr: float, new_ratio: float = 10.0) -> list[dict]:
        """Pretrained parameters at `lr`, new ones at `lr * new_ratio`."""
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.named_parameters():
            groups[self.is_new(name)].append(parameter)
        return [{"params": each, "lr": lr * ratio} for each, ratio in zip(groups, (1, new_ratio), strict=True) if each]


class WSOLNetwork(Network):
    """A backbone in three parts, with the head of a method.

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
        return self.head.loss(outputs, labels)

    def map_of(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return self.head.score_map(outputs, labels)

    def is_new(self, name: str) -> bool:
        return self._is_new(name)
