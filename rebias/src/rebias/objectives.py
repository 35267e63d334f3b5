"""The objectives as losses for any training loop: ReBias, and the methods it is compared with.

f is the target network, g a biased network that sees only the shortcut. Every loss returns its total and a dict
of its parts (detached, for the log). Heads inside a loss are parameters: hand `loss.parameters()` to the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rebias.independence import MIN_BATCH, SIGMA_FLOOR, conditional_hsic, dimension_sigma, hsic, median_sigma, spread

Sigma = float | Tensor | str
DEGENERATE = 1e-2


class ReBiasLoss:
    """The minimax of section 3.2: min over f of L(f) + lambda max over g of [HSIC(f, g) - lambda_g L(g)].

    Neither loss sends a gradient into the other network.

    Args:
        f_lambda: lambda, weight of HSIC in f's loss.
        g_lambda: lambda_g, weight of the cross-entropy in g's loss; with 0, g only follows f.
        sigma_f: bandwidth of f's features: a number, "median" (of each batch, without the diagonal) or "dimension".
        sigma_g: the same for g.
        estimator: estimator of HSIC: "unbiased" (the paper's) or "biased".
        conditional: HSIC within classes instead of over the batch.
        gather: applied to features and targets before HSIC: under DDP, gathers those of all ranks, with gradient.
    """

    def __init__(
        self,
        f_lambda: float = 1.0,
        g_lambda: float = 1.0,
        sigma_f: Sigma = 1.0,
        sigma_g: Sigma = 1.0,
        estimator: str = "unbiased",
        conditional: bool = False,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        if estimator not in MIN_BATCH:
            raise ValueError(f"estimator must be one of {', '.join(MIN_BATCH)}, got {estimator!r}")
        self.f_lambda, self.g_lambda = f_lambda, g_lambda
        self.sigma_f, self.sigma_g = sigma_f, sigma_g
        self.estimator, self.conditional, self.gather = estimator, conditional, gather

    def f_loss(
        self, f_logits: Tensor, f_feat: Tensor, g_feats: Sequence[Tensor], targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L(f) + lambda sum over g of HSIC(f, g).

        Args:
            f_logits: (B, C).
            f_feat: (B, ...).
            g_feats: one (B, ...) tensor per biased network.
            targets: (B,) int64.
        """
        classification = F.cross_entropy(f_logits, targets)
        terms = (self.dependence(f_feat, g_feat.detach(), targets) for g_feat in g_feats)
        dependence = sum(terms, start=classification.new_zeros(()))
        total = classification + self.f_lambda * dependence
        return total, {"f_cross_entropy": classification.detach(), "f_hsic": dependence.detach()}

    def g_loss(
        self, g_logits: Tensor, g_feat: Tensor, f_feat: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda_g L(g) - HSIC(f, g).

        Args:
            g_logits: (B, C).
            g_feat: (B, ...).
            f_feat: (B, ...).
            targets: (B,) int64.
        """
        classification = F.cross_entropy(g_logits, targets)
        dependence = self.dependence(f_feat.detach(), g_feat, targets)
        total = self.g_lambda * classification - dependence
        return total, {"g_cross_entropy": classification.detach(), "g_hsic": dependence.detach()}

    def dependence(self, f_feat: Tensor, g_feat: Tensor, targets: Tensor) -> Tensor:
        """HSIC of the (gathered) features, 0-d; 0 if it is not defined.

        It is undefined for a batch with fewer samples than the estimator needs (4, or 2 for the biased one), such as
        the last one of an epoch, and within classes if no class has that many.
        """
        f_feat, g_feat, targets = self.gather(f_feat), self.gather(g_feat), self.gather(targets)
        largest = int(targets.bincount().max()) if self.conditional else len(targets)
        if largest < MIN_BATCH[self.estimator]:
            return f_feat.new_zeros((), dtype=torch.float32)
        sigmas = bandwidth(self.sigma_f, f_feat), bandwidth(self.sigma_g, g_feat)
        if self.conditional:
            return conditional_hsic(f_feat, g_feat, targets, *sigmas, self.estimator)
        return hsic(f_feat, g_feat, *sigmas, self.estimator)


def bandwidth(sigma: Sigma, features: Tensor) -> float | Tensor:
    """A number unchanged; "median" and "dimension" computed from the features. ValueError for other words.

    If more than half of a batch are near-copies, their median distance says nothing about the others and the gradient
    of HSIC would explode: the median is at least DEGENERATE times the root mean square distance.
    """
    if sigma == "median":
        floor = DEGENERATE * spread(features)
        return median_sigma(features, include_diagonal=False).maximum(floor).clamp_min(SIGMA_FLOOR)
    if sigma == "dimension":
        return dimension_sigma(features)
    if isinstance(sigma, str):
        raise ValueError(f"sigma must be a number, 'median' or 'dimension', got {sigma!r}")
    return sigma


class RUBiLoss(nn.Module):
    """RUBi (Cadene et al. 2019): f's logits are masked by the sigmoid of a head on g's features.

    loss = CE(f_logits * sigmoid(z), y) + question_weight * CE(z, y) with z = W g_feat + b; no gradient reaches g.

    Args:
        feat_dim: dimension of g's features.
        num_classes: C.
        question_weight: weight of the head's cross-entropy.
    """

    def __init__(self, feat_dim: int, num_classes: int, question_weight: float = 1.0):
        super().__init__()
        self.fc = nn.Linear(feat_dim, num_classes)
        self.question_weight = question_weight

    def forward(self, f_logits: Tensor, g_feat: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """f_logits (B, C), g_feat (B, feat_dim), targets (B,) int64."""
        z = self.fc(g_feat.flatten(1).detach())  # (B, C)
        fused, question = F.cross_entropy(f_logits * z.sigmoid(), targets), F.cross_entropy(z, targets)
        return fused + self.question_weight * question, {"fused": fused.detach(), "question": question.detach()}


class LearnedMixinLoss(nn.Module):
    """LearnedMixin+H (Clark et al. 2019): f learns what a pre-trained, frozen g leaves unexplained.

    loss = CE(f_logits + s g_logits, y) + w mean entropy(softmax(s g_logits)) with s = softplus(w'f_feat + b).

    Args:
        feat_dim: dimension of f's features.
        w: weight of the entropy.
    """

    def __init__(self, feat_dim: int, w: float = 0.36):
        super().__init__()
        self.fc = nn.Linear(feat_dim, 1)
        self.w = w

    def forward(
        self, f_logits: Tensor, f_feat: Tensor, g_logits: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f_logits and g_logits (B, C), f_feat (B, feat_dim), targets (B,) int64."""
        scaled = F.softplus(self.fc(f_feat.flatten(1))) * g_logits.detach()  # (B, 1) * (B, C)
        log_p = scaled.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        mixed = F.cross_entropy(f_logits + scaled, targets)
        return mixed + self.w * entropy, {"mixed": mixed.detach(), "entropy": entropy.detach()}


def hex_project(f_a: Tensor, f_g: Tensor) -> Tensor:
    """HEX (Wang et al. 2019): F_A minus its projection on the span of F_G over the batch.

    F_L = (I - F_G (F_G'F_G)^-1 F_G') F_A, through QR in float32 or better instead of the inverse. F_G must have full
    rank, as the inverse needs too; otherwise the result is no projection and has no finite gradient.

    Args:
        f_a: (B, C) logits from both branches.
        f_g: (B, C) logits from the superficial branch alone, B >= C.

    Raises:
        ValueError: wrong shapes, or fewer samples than classes.
    """
    if f_a.shape != f_g.shape or f_a.ndim != 2 or len(f_a) < f_a.shape[1]:
        raise ValueError(f"f_a and f_g must be (B, C) with B >= C, got {tuple(f_a.shape)} and {tuple(f_g.shape)}")
    with torch.autocast(f_a.device.type, enabled=False):
        f_a, f_g = (each if each.dtype == torch.float64 else each.float() for each in (f_a, f_g))
        q, _ = torch.linalg.qr(f_g)  # (B, C) orthonormal basis of the span
        return f_a - q @ (q.T @ f_a)


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float = 0.7) -> Tensor:
    """Mean of 1 - p_y^q, 0-d: LfF's biased network trusts what is easy.

    Zhang & Sabuncu (2018) divide by q; LfF's released gradient, q p_y^q times that of the cross-entropy, is the
    gradient of this loss.
    """
    p = logits.softmax(1).gather(1, targets[:, None])
    return (1 - p**q).mean()


class SampleLosses(nn.Module):
    """What LfF (Nam et al. 2020) remembers about a network: a moving average of every training sample's loss.

    Args:
        n_samples: size of the training set.
        num_classes: C.
        alpha: weight of the past in the average.
    """

    average: Tensor
    label: Tensor
    seen: Tensor

    def __init__(self, n_samples: int, num_classes: int, alpha: float = 0.7):
        super().__init__()
        self.num_classes, self.alpha = num_classes, alpha
        self.register_buffer("average", torch.zeros(n_samples))
        self.register_buffer("label", torch.zeros(n_samples, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(n_samples, dtype=torch.bool))

    def update(self, losses: Tensor, targets: Tensor, index: Tensor) -> None:
        """Add (B,) losses of the samples `index` (B,); the average starts at a sample's first loss."""
        old = torch.where(self.seen[index], self.average[index], losses)
        self.average[index] = self.alpha * old + (1 - self.alpha) * losses
        self.label[index], self.seen[index] = targets, True

    def relative(self, index: Tensor) -> Tensor:
        """(B,) averages over the largest average of a sample of the same class."""
        largest = self.average.new_zeros(self.num_classes).scatter_reduce(0, self.label, self.average, "amax")
        index = index.to(self.average.device)
        return self.average[index] / largest[self.label[index]]


def lff_weights(f_losses: Tensor, g_losses: Tensor) -> Tensor:
    """Relative difficulty of LfF, (B,): L_g / (L_g + L_f), both from `SampleLosses.relative`."""
    return g_losses / (g_losses + f_losses + 1e-8)


def balanced_cross_entropy(logits: Tensor, targets: Tensor, prior: Tensor) -> Tensor:
    """Bias-balanced loss (Hong & Yang 2021), 0-d: cross-entropy of logits + log p(label | bias).

    Args:
        logits: (B, C).
        targets: (B,) int64.
        prior: (B, C) share of each label among the training samples of the sample's bias.
    """
    return F.cross_entropy(logits + (prior + 1e-9).log(), targets)


def bias_contrastive(features: Tensor, targets: Tensor, bias: Tensor, temperature: float = 0.07) -> Tensor:
    """Bias-contrastive loss (Hong & Yang 2021), 0-d: a sample's positives share its class and have a different bias.

    The mean over samples of -log softmax, over all other samples, of the positives' cosine similarities; 0 for a sample
    without positives. Computed in float32 or float64.

    Args:
        features: (B, d).
        targets: (B,) int64.
        bias: (B,) int64.
        temperature: temperature of the softmax.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = (z @ z.T / temperature).masked_fill(own, -math.inf).log_softmax(1)  # (B, B)
        positive = (targets[:, None] == targets) & (bias[:, None] != bias)
        return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()
