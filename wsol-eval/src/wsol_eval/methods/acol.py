"""ACoL (Zhang et al., CVPR 2018): a second classifier sees the features without what the first one found."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from wsol_eval.methods.attention import attention


def erase(features: Tensor, maps: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Features with zeros where the normalised map of the label reaches the threshold.

    Args:
        features: (B, C, h, w).
        maps: (B, classes, h, w) of the first classifier.
        labels: (B,).
        threshold: in [0, 1].
    """
    return features * (attention(maps, labels) < threshold)


def acol_loss(logits_a: Tensor, logits_b: Tensor, labels: Tensor) -> Tensor:
    """Sum of both classifiers' cross-entropies."""
    return cross_entropy(logits_a, labels) + cross_entropy(logits_b, labels)
