"""The losses of a hedged embedding: contrastive losses of pairs and the information bottleneck (section 3).

Everything is computed in float32 or float64, also under autocast.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding, check_samples
from hib_ndigit_mnist.hedging import MatchProbability, at_least_float32
from hib_ndigit_mnist.pair_nll import DISTANCE_EPS, all_pairs_nll, pair_nll
from hib_ndigit_mnist.pairs import Pairs, check_labels, pairs_of, sample_pairs

OBJECTIVES = ("log_mean", "mean_log")
HOPELESS = 0.95  # initial eta from which on nothing is learned


def soft_contrastive_loss(
    logits: Tensor, match: Tensor, objective: str = "log_mean", reduction: str = "mean"
) -> Tensor:
    """-log p(m = match) of pairs from the logits of their K x K sample pairs (equation 3).

    Args:
        logits: (P, K1, K2) floating point, as returned by `MatchProbability.logits`.
        match: (P,) bool or 0 / 1.
        objective: "log_mean" = -log E[p], which rewards placing part of the mass correctly and therefore hedges;
            "mean_log" = -E[log p], the bound of the paper. mean_log >= log_mean.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or (P,).

    Raises:
        ValueError: values of match other than 0 and 1, mismatched shapes, an unknown objective or reduction.
    """
    match = _as_bool(match)
    if logits.ndim != 3 or match.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (P, K, K), match (P,), got {tuple(logits.shape)}, {tuple(match.shape)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    logits = at_least_float32(logits)
    log_right = F.logsigmoid(torch.where(match[:, None, None], logits, -logits)).flatten(1)  # (P, K1 K2)
    if objective == "log_mean":
        return _reduce(math.log(log_right.shape[1]) - log_right.logsumexp(1), reduction)
    return _reduce(-log_right.mean(1), reduction)


def contrastive_loss(z1: Tensor, z2: Tensor, match: Tensor, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """Classical contrastive loss (equation 1): d^2 for a match, max(0, margin - d)^2 otherwise.

    Args:
        z1: (P, D).
        z2: (P, D).
        match: (P,) bool or 0 / 1.
        margin: M > 0.
        reduction: "mean", "sum" or "none".
    """
    match = _as_bool(match)
    if z1.shape != z2.shape or match.shape != z1.shape[:-1]:
        raise ValueError(f"expected z1, z2 (P, D), match (P,), got {[tuple(x.shape) for x in (z1, z2, match)]}")
    if margin <= 0:
        raise ValueError(f"margin: expected a positive number, got {margin}")
    squares = (at_least_float32(z1) - at_least_float32(z2)).square().sum(-1)
    apart = (margin - (squares + DISTANCE_EPS).sqrt()).clamp_min(0).square()
    return _reduce(torch.where(match, squares, apart), reduction)


class LossOutput(NamedTuple):
    """Scalars, or (M,) for stacked models: loss = (nll_pos + nll_neg) / 2 + beta * kl."""

    loss: Tensor
    nll_pos: Tensor
    nll_neg: Tensor
    kl: Tensor  # summed over both images of a pair: twice the mean over images
    a: Tensor
    b: Tensor


def vib_objective(
    embedding: GaussianMixtureEmbedding,
    z: Tensor,
    pairs: Pairs,
    match: MatchProbability,
    beta: float | Tensor,
    objective: str = "log_mean",
    kl: str = "auto",
) -> LossOutput:
    """The variational information bottleneck of weighted pairs (equation 7), for one model or stacked ones.

    Args:
        embedding: (..., B, C, D).
        z: (..., B, K, D) samples of the embedding.
        pairs: (..., P), balanced by weight.
        match: a and b, () or (...).
        beta: weight of the KL term; a number or (...).
        objective: see `soft_contrastive_loss`.
        kl: see `GaussianMixtureEmbedding.kl`.
    """
    a, b = match.a.to(z.dtype), match.b.to(z.dtype)
    nll = pair_nll(z, pairs.first, pairs.second, pairs.match, a, b, objective, match.eps) * pairs.weight
    positive = 2 * (nll * pairs.match).sum(-1)
    negative = 2 * (nll * ~pairs.match).sum(-1)
    divergence = 2 * embedding.kl(kl, z).mean(-1)
    return LossOutput((positive + negative) / 2 + beta * divergence, positive, negative, divergence, a, b)


class VIBPairLoss(nn.Module):
    """The training loss of hedged instance embedding on a batch with labels (equation 7).

    Args:
        beta: weight of the KL term, >= 0.
        samples: K per image; a point embedding always has one.
        objective: "log_mean" or "mean_log".
        negatives: "balanced" takes all matching pairs and equally many random others, "all" every pair; with both,
            matching and other pairs weigh 1/2 each.
        kl: see `GaussianMixtureEmbedding.kl`.
        a: initial slope of the match probability.
        b: initial offset.

    Raises:
        ValueError: beta < 0, samples < 1, an unknown objective or choice of negatives.
    """

    def __init__(
        self,
        beta: float = 1e-4,
        samples: int = 8,
        objective: str = "log_mean",
        negatives: str = "balanced",
        kl: str = "auto",
        a: float = 1.0,
        b: float = 1.0,
    ):
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"beta: expected >= 0, got {beta}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        check_samples(samples, 1)
        if negatives not in ("balanced", "all"):
            raise ValueError(f"negatives: expected balanced or all, got {negatives!r}")
        self.beta, self.samples, self.objective, self.negatives, self.kl = beta, samples, objective, negatives, kl
        self.match, self._started = MatchProbability(a, b), False

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(
        self,
        embedding: GaussianMixtureEmbedding,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Loss of a batch; call backward on `loss`.

        Args:
            embedding: (B, C, D).
            labels: (B,) class of each image; an image is never paired with itself.
            indices_tuple: pairs instead of labels, as returned by miners of pytorch-metric-learning. If a miner finds
                none, the loss and its gradients are 0, as in that library.
            generator: draws samples and negatives, on the embedding's device.

        Raises:
            ValueError: neither labels nor pairs, labels of another length, a batch without a matching or a non-matching
                pair (shows the counts per class), an image paired with itself, K not a multiple of C.
        """
        if embedding.mu.ndim != 3:
            raise ValueError(f"embedding: expected (B, C, D), got {tuple(embedding.mu.shape)}")
        embedding = embedding.to(torch.promote_types(embedding.mu.dtype, torch.float32))
        self._look_at_the_start(embedding)
        z = embedding.sample(1 if embedding.is_point else self.samples, generator)
        if indices_tuple is not None:
            pairs = pairs_of(indices_tuple, len(embedding))
            beta = self.beta if len(pairs.first) else 0.0
            return vib_objective(embedding, z, pairs, self.match, beta, self.objective, self.kl)
        if labels is None:
            raise ValueError("labels or indices_tuple is needed")
        check_labels(labels, len(embedding))
        if self.negatives == "balanced":
            pairs = sample_pairs(labels, generator)
            return vib_objective(embedding, z, pairs, self.match, self.beta, self.objective, self.kl)
        a, b = self.match.a.to(z.dtype), self.match.b.to(z.dtype)
        nll, positive, negative = all_pairs_nll(z, labels, a, b, self.objective, self.match.eps)
        divergence = 2 * embedding.kl(self.kl, z).mean()
        return LossOutput(nll + self.beta * divergence, positive, negative, divergence, a, b)

    def _look_at_the_start(self, embedding: GaussianMixtureEmbedding) -> None:
        """Warn once, at the first batch, if images of this variance do not even match themselves."""
        if self._started:
            return
        self._started = True
        eta = eta_of_variance(float(embedding.variance().detach().sum(-1).mean()), *self.match.values())
        if not embedding.is_point and eta > HOPELESS:
            warnings.warn(
                f"an image matches itself with a probability of {1 - eta:.2g} at the start, so that partners cannot "
                "match either; lower logvar_bias (it depends on the dimension) or raise b",
                stacklevel=3,
            )


def eta_of_variance(total_variance: float, a: float, b: float) -> float:
    """Approximate self-mismatch of a Gaussian with this total variance: two samples are sqrt(2 total) apart."""
    return 1 / (1 + math.exp(min(b - a * math.sqrt(2 * total_variance), 700)))


def _as_bool(match: Tensor) -> Tensor:
    if match.dtype == torch.bool:
        return match
    if (wrong := match[(match != 0) & (match != 1)]).numel():
        raise ValueError(f"match: expected 0 / 1 or bool, got values such as {wrong[0].item()}")
    return match.bool()


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
    return values if reduction == "none" else getattr(values, reduction)()
