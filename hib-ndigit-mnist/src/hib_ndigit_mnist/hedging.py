"""Hedged instance embedding: the match probability and what is trained with it (section 3 of arXiv 1810.00319).

One convention everywhere: p(m | z1, z2) = sigmoid(-a ||z1 - z2|| + b), Euclidean distance, a > 0 (equation 2).
Everything is computed in float32 or float64, also under autocast.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding, check_samples
from hib_ndigit_mnist.expansion import expansion_of_sigmoid, sigmoid_as_gaussians
from hib_ndigit_mnist.pair_nll import DISTANCE_EPS, pair_nll
from hib_ndigit_mnist.pairs import Pairs, balanced_pairs, check_labels, dense_pairs, pairs_of
from hib_ndigit_mnist.quadrature import expected_sigmoid

OBJECTIVES = ("log_mean", "mean_log")
ESTIMATORS = ("mc", "quadrature")
TILE = 1 << 21  # distances at once in all-pairs work: 8 MB of float32 per intermediate


class MatchProbability(nn.Module):
    """p(m | z1, z2) = sigmoid(-a ||z1 - z2|| + b) with learned a = softplus(a_raw) > 0 and b.

    Args:
        a: initial slope, > 0; one number, or one per stacked model.
        b: initial offset; b / a acts as a learned soft margin.
        eps: added to the squared distance, so that its gradient exists at zero.

    Raises:
        ValueError: a not positive.
    """

    def __init__(self, a: float | Tensor = 1.0, b: float | Tensor = 1.0, eps: float = DISTANCE_EPS):
        super().__init__()
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if not (a > 0).all():
            raise ValueError(f"a: positive was expected, got {a.tolist()}")
        dtype = a.dtype if a.is_floating_point() else torch.get_default_dtype()
        self.a_raw = nn.Parameter(torch.where(a > 20, a.double(), a.double().expm1().log()).to(dtype))
        self.b = nn.Parameter(b.to(dtype).expand_as(self.a_raw).clone())
        self.eps = eps

    @classmethod
    def from_double_convention(cls, a: float, b: float) -> MatchProbability:
        """From code whose "sigmoid" is e^x / (e^x + e^-x) = sigmoid(2x), such as PCME: its a and b are half of ours."""
        return cls(2 * a, 2 * b)

    @property
    def a(self) -> Tensor:
        """The slope."""
        return F.softplus(self.a_raw)

    def values(self) -> tuple[float, float]:
        """Both a and b as numbers (one model)."""
        return float(self.a.detach()), float(self.b.detach())

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def logits(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Logits b - a * distance between all sample pairs: (..., K1, D), (..., K2, D) -> (..., K1, K2).

        Leading dimensions of a and b line up with the first ones of z (stacked models).
        """
        z1, z2 = _at_least_float32(z1), _at_least_float32(z2)
        squares = (z1.unsqueeze(-2) - z2.unsqueeze(-3)).square().sum(-1)
        a, b = (x.to(z1.dtype).view(*x.shape, *[1] * (squares.ndim - x.ndim)) for x in (self.a, self.b))
        return b - a * (squares + self.eps).sqrt()

    @torch.no_grad()
    def prob(
        self,
        first: GaussianMixtureEmbedding,
        second: GaussianMixtureEmbedding,
        samples: int = 8,
        method: str = "mc",
        generator: torch.Generator | None = None,
        tolerance: float = 1e-9,
    ) -> Tensor:
        """p(m | x1, x2) of equally many images: (B,), equations 4 and 5.

        Args:
            first: B images, (B, C1, D).
            second: B images, (B, C2, D).
            samples: K of each image, for mc.
            method: "mc" (K x K cross pairs), or "quadrature": deterministic.
            generator: of the samples.
            tolerance: absolute error of the quadrature.

        Raises:
            ValueError: unknown method, lengths or D that differ, K not a multiple of C; quadrature for D > 2 with a
                sigmoid too steep for the tolerance (b of about 5 at 1e-6, 8 at 1e-4).
        """
        self._check(first, second, method)
        if len(first) != len(second):
            raise ValueError(f"as many first as second images were expected, got {len(first)} and {len(second)}")
        if method == "quadrature":
            return self._quadrature(first, second, tolerance)
        z1, z2 = first.sample(samples, generator), second.sample(samples, generator)
        return self.logits(z1, z2).sigmoid().mean((-2, -1))

    @torch.no_grad()
    def pairwise(
        self,
        first: GaussianMixtureEmbedding,
        second: GaussianMixtureEmbedding,
        samples: int = 8,
        method: str = "mc",
        generator: torch.Generator | None = None,
        tolerance: float = 1e-4,
    ) -> Tensor:
        """p(m | x1, x2) of every first with every second image, in tiles: (B1, B2). Arguments as in `prob`."""
        self._check(first, second, method)
        dtype = torch.promote_types(first.mu.dtype, torch.float32)
        if first.is_point and second.is_point:
            p1, p2 = (e.mu[:, 0].to(dtype) for e in (first, second))
            distance = torch.cdist(p1, p2, compute_mode="donot_use_mm_for_euclid_dist")  # exact near zero
            return torch.sigmoid(self.b - self.a * distance)
        if method == "quadrature":
            return self._pairwise_quadrature(first, second, tolerance).to(dtype)
        z1, z2 = (_at_least_float32(e.sample(samples, generator)) for e in (first, second))
        return _mean_sigmoid(z1, z2, *self.values(), self.eps)

    @torch.no_grad()
    def self_mismatch(
        self,
        embedding: GaussianMixtureEmbedding,
        samples: int = 8,
        method: str = "mc",
        generator: torch.Generator | None = None,
        tolerance: float = 1e-9,
    ) -> Tensor:
        """eta(x) = 1 - p(m | x, x), the uncertainty of each image (section 3.4): (B,).

        Monte Carlo draws two independent sets of samples; one set against itself would be biased by its K zero
        distances. Arguments as in `prob`.
        """
        return 1 - self.prob(embedding, embedding, samples, method, generator, tolerance)

    def _check(self, first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding, method: str) -> None:
        if method not in ESTIMATORS:
            raise ValueError(f"method: one of {', '.join(ESTIMATORS)} was expected, got {method!r}")
        if first.dim != second.dim:
            raise ValueError(f"embeddings of one dimension were expected, got {first.dim} and {second.dim}")
        if self.a_raw.ndim:
            raise ValueError("a and b of one model were expected, these are stacked")

    def _pairwise_quadrature(
        self, first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding, tolerance: float
    ) -> Tensor:
        """In closed form where that reaches the tolerance, else pair by pair."""
        a, b = self.values()
        if sigmoid_as_gaussians(b, tolerance) is None:
            each = [first[[i] * len(second)] for i in range(len(first))]
            return torch.stack([self._quadrature(rows, second, tolerance) for rows in each])
        result = torch.zeros((), device=first.mu.device)
        (mu1, variance1), (mu2, variance2) = (
            (e.mu.movedim(-1, 0), e.variance().movedim(-1, 0)) for e in (first, second)
        )
        rows = max(1, TILE // (16 * len(second)))  # a tile that stays in the cache

        def tile(i: int, j: int, start: int) -> Tensor:
            part = slice(start, start + rows)
            mean = mu1[:, part, i, None] - mu2[:, None, :, j]  # (D, rows, B2)
            variance = variance1[:, part, i, None] + variance2[:, None, :, j]
            return cast(Tensor, expansion_of_sigmoid(mean, variance, a, b, tolerance))  # None was excluded above

        for i in range(first.components):
            for j in range(second.components):
                result = result + torch.cat([tile(i, j, start) for start in range(0, len(first), rows)])
        return result / (first.components * second.components)

    def _quadrature(
        self, first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding, tolerance: float
    ) -> Tensor:
        """In closed form where that reaches the tolerance, else by integration."""
        mean = first.mu.double()[:, :, None] - second.mu.double()[:, None]  # (B, C1, C2, D)
        variance = first.variance().double()[:, :, None] + second.variance().double()[:, None]
        mean, variance = mean.flatten(0, 2), variance.flatten(0, 2)
        terms = expansion_of_sigmoid(mean.T, variance.T, *self.values(), tolerance)
        if terms is None:
            terms = expected_sigmoid(mean, variance, self.a.double(), self.b.double(), tolerance)
        return terms.view(len(first), -1).mean(1).to(torch.promote_types(first.mu.dtype, torch.float32))


def _mean_sigmoid(z1: Tensor, z2: Tensor, a: float, b: float, eps: float) -> Tensor:
    """The mean over K1 x K2 of sigmoid(b - a d), a tile of images at a time: (B1, B2)."""
    (n1, k1, dim), (n2, k2, _) = z1.shape, z2.shape
    result = z1.new_empty(n1, n2)
    side = max(1, math.isqrt(TILE // (k1 * k2)))
    right_all = z2.permute(2, 1, 0).contiguous()  # (D, K2, B2)
    for i in range(0, n1, side):
        left = z1[i : i + side].permute(2, 1, 0)[:, :, None, :, None]  # (D, K1, 1, b1, 1)
        for j in range(0, n2, side):
            right = right_all[:, :, j : j + side][:, None, :, None]  # (D, 1, K2, 1, b2)
            squares = (left[0] - right[0]).square_()  # (K1, K2, b1, b2)
            for d in range(1, dim):
                difference = left[d] - right[d]
                squares.addcmul_(difference, difference)
            squares.add_(eps).sqrt_().mul_(-a).add_(b).sigmoid_()
            result[i : i + side, j : j + side] = squares.mean((0, 1))
    return result


def soft_contrastive_loss(
    logits: Tensor, match: Tensor, objective: str = "log_mean", reduction: str = "mean"
) -> Tensor:
    """-log p(m = match) of pairs from the logits of their K x K sample pairs (equation 3).

    Args:
        logits: (P, K1, K2) floating, as `MatchProbability.logits` gives them.
        match: (P,) bool or 0 / 1.
        objective: "log_mean" = -log E[p], which pays for putting part of the mass right and so hedges; "mean_log" =
            -E[log p], the bound of the paper. mean_log >= log_mean.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or (P,).

    Raises:
        ValueError: values of match other than 0 and 1, shapes that do not fit, an unknown objective or reduction.
    """
    match = _as_bool(match)
    if logits.ndim != 3 or match.shape != logits.shape[:1]:
        raise ValueError(f"logits (P, K, K), match (P,) were expected, got {tuple(logits.shape)}, {tuple(match.shape)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: one of {', '.join(OBJECTIVES)} was expected, got {objective!r}")
    logits = _at_least_float32(logits)
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
        raise ValueError(f"z1, z2 (P, D), match (P,) were expected, got {[tuple(x.shape) for x in (z1, z2, match)]}")
    if margin <= 0:
        raise ValueError(f"margin: positive was expected, got {margin}")
    squares = (_at_least_float32(z1) - _at_least_float32(z2)).square().sum(-1)
    apart = (margin - (squares + DISTANCE_EPS).sqrt()).clamp_min(0).square()
    return _reduce(torch.where(match, squares, apart), reduction)


class LossOutput(NamedTuple):
    """Scalars, or (M,) for stacked models: loss = (nll_pos + nll_neg) / 2 + beta * kl."""

    loss: Tensor
    nll_pos: Tensor
    nll_neg: Tensor
    kl: Tensor  # of both images of a pair: twice the mean over images
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
        z: (..., B, K, D) its samples.
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
        negatives: "balanced" takes all matching pairs and as many random others, "all" every pair; matching and other
            pairs weigh 1/2 each in both.
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
            raise ValueError(f"beta: >= 0 was expected, got {beta}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: one of {', '.join(OBJECTIVES)} was expected, got {objective!r}")
        check_samples(samples, 1)
        if negatives not in ("balanced", "all"):
            raise ValueError(f"negatives: balanced or all was expected, got {negatives!r}")
        self.beta, self.samples, self.objective, self.negatives, self.kl = beta, samples, objective, negatives, kl
        self.match = MatchProbability(a, b)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(
        self,
        embedding: GaussianMixtureEmbedding,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Loss of a batch.

        Args:
            embedding: (B, C, D).
            labels: (B,) class of each image; an image is never paired with itself.
            indices_tuple: pairs instead of labels, as miners of pytorch-metric-learning return them.
            generator: of samples and of the choice of negatives, on the embedding's device.

        Raises:
            ValueError: neither labels nor pairs, labels of another length, a batch without a matching or without a
                non-matching pair (with the counts per class), K not a multiple of C.
        """
        if embedding.mu.ndim != 3:
            raise ValueError(f"embedding: (B, C, D) was expected, got {tuple(embedding.mu.shape)}")
        embedding = embedding.to(torch.promote_types(embedding.mu.dtype, torch.float32))
        z = embedding.sample(1 if embedding.is_point else self.samples, generator)
        pairs = self._pairs(len(embedding), embedding.mu.device, labels, indices_tuple, generator)
        return vib_objective(embedding, z, pairs, self.match, self.beta, self.objective, self.kl)

    def _pairs(
        self,
        batch: int,
        device: torch.device,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        if indices_tuple is not None:
            return pairs_of(indices_tuple, batch)
        if labels is None:
            raise ValueError("labels or indices_tuple is needed")
        check_labels(labels, batch)
        if self.negatives == "all":
            return dense_pairs(labels)
        total = batch * (batch - 1) // 2
        return balanced_pairs(labels, torch.rand(total, generator=generator, device=device), total)


def _as_bool(match: Tensor) -> Tensor:
    if match.dtype == torch.bool:
        return match
    if not ((match == 0) | (match == 1)).all():
        raise ValueError(f"match: 0 / 1 or bool was expected, got values such as {match.flatten()[0].item()}")
    return match.bool()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: mean, sum or none was expected, got {reduction!r}")
    return values if reduction == "none" else getattr(values, reduction)()
