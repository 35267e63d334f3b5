"""The match probability of points and of distributions (sections 3.1, 3.2 and 3.4 of arXiv 1810.00319).

The convention everywhere: p(m | z1, z2) = sigmoid(-a ||z1 - z2|| + b), Euclidean distance, a > 0 (equation 2).
Everything is computed in float32 or float64, also under autocast.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.expansion import expansion_of_sigmoid, sigmoid_as_gaussians
from hib_ndigit_mnist.pair_nll import DISTANCE_EPS, squared_distances
from hib_ndigit_mnist.quadrature import expected_sigmoid, is_isotropic
from hib_ndigit_mnist.series import series_of_sigmoid

ESTIMATORS = ("mc", "quadrature")
TILE = 1 << 21  # distances computed at once for all pairs: 8 MB of float32 per intermediate


class MatchProbability(nn.Module):
    """p(m | z1, z2) = sigmoid(-a ||z1 - z2|| + b) with learned a = softplus(a_raw) > 0 and b.

    Args:
        a: initial slope, > 0; one number, or one per stacked model.
        b: initial offset; b / a acts as a learned soft margin.
        eps: added to the squared distance, so that the gradient exists at zero.

    Raises:
        ValueError: a is not positive.
    """

    def __init__(self, a: float | Tensor = 1.0, b: float | Tensor = 1.0, eps: float = DISTANCE_EPS):
        super().__init__()
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if not (a > 0).all():
            raise ValueError(f"a: expected a positive number, got {a.tolist()}")
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
        """Return a and b as numbers (one model)."""
        return float(self.a.detach()), float(self.b.detach())

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def logits(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Logits b - a * distance between all sample pairs: (..., K1, D), (..., K2, D) -> (..., K1, K2).

        Leading dimensions of a and b line up with the first ones of z (stacked models).
        """
        z1, z2 = at_least_float32(z1), at_least_float32(z2)
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
        tolerance: float = 1e-6,
    ) -> Tensor:
        """p(m | x1, x2) of the pairs (first[i], second[i]): (B,), equations 4 and 5.

        Args:
            first: B images, (B, C1, D).
            second: B images, (B, C2, D).
            samples: K, samples per image, for mc.
            method: "mc" (K x K cross pairs) or "quadrature" (deterministic).
            generator: draws the samples.
            tolerance: absolute error of the quadrature.

        Raises:
            ValueError: unknown method, different lengths or D, K not a multiple of C; a tolerance below 1e-6 that
                quadrature cannot meet in more than two dimensions with unequal variances.
        """
        self._check(first, second, method)
        if len(first) != len(second):
            raise ValueError(f"expected first and second of equal length, got {len(first)} and {len(second)}")
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
        """p(m | x1, x2) of each image of `first` with each of `second`, in tiles: (B1, B2). Arguments as in `prob`."""
        self._check(first, second, method)
        dtype = torch.promote_types(first.mu.dtype, torch.float32)
        if first.is_point and second.is_point:
            p1, p2 = (e.mu[:, 0].to(dtype) for e in (first, second))
            distance = torch.cdist(p1, p2, compute_mode="donot_use_mm_for_euclid_dist")  # exact near zero
            return torch.sigmoid(self.b - self.a * distance)
        if method == "quadrature":
            return self._pairwise_quadrature(first, second, tolerance).to(dtype)
        z1, z2 = (at_least_float32(e.sample(samples, generator)) for e in (first, second))
        return _mean_sigmoid(z1, z2, *self.values(), self.eps)

    @torch.no_grad()
    def self_mismatch(
        self,
        embedding: GaussianMixtureEmbedding,
        samples: int = 8,
        method: str = "mc",
        generator: torch.Generator | None = None,
        tolerance: float = 1e-6,
    ) -> Tensor:
        """eta(x) = 1 - p(m | x, x), the uncertainty of each image (section 3.4): (B,).

        Monte Carlo draws two independent sets of samples; comparing one set with itself would be biased by the K zero
        distances. Arguments as in `prob`.
        """
        return 1 - self.prob(embedding, embedding, samples, method, generator, tolerance)

    def _check(self, first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding, method: str) -> None:
        if method not in ESTIMATORS:
            raise ValueError(f"method: expected one of {', '.join(ESTIMATORS)}, got {method!r}")
        if first.dim != second.dim:
            raise ValueError(f"expected embeddings of equal dimension, got {first.dim} and {second.dim}")
        if self.a_raw.ndim:
            raise ValueError("expected a and b of one model, got those of stacked models")

    def _pairwise_quadrature(
        self, first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding, tolerance: float
    ) -> Tensor:
        """In closed form if that reaches the tolerance, else pair by pair."""
        a, b = self.values()
        if sigmoid_as_gaussians(b, tolerance) is None:
            each = [first[[i] * len(second)] for i in range(len(first))]
            return torch.stack([self._quadrature(rows, second, tolerance) for rows in each])
        result = torch.zeros((), device=first.mu.device)
        (mu1, variance1), (mu2, variance2) = (
            (e.mu.movedim(-1, 0), e.variance().movedim(-1, 0)) for e in (first, second)
        )
        rows = max(1, TILE // (16 * max(1, len(second))))  # a tile fits the cache

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
        """In closed form if that reaches the tolerance, else by integration or, for D > 2, as a cosine series."""
        mean = first.mu.double()[:, :, None] - second.mu.double()[:, None]  # (B, C1, C2, D)
        variance = first.variance().double()[:, :, None] + second.variance().double()[:, None]
        mean, variance = mean.flatten(0, 2), variance.flatten(0, 2)
        a, b = self.values()
        terms = expansion_of_sigmoid(mean.T, variance.T, a, b, tolerance)
        if terms is None and (first.dim <= 2 or is_isotropic(variance)):
            terms = expected_sigmoid(mean, variance, self.a.double(), self.b.double(), tolerance)
        elif terms is None:
            terms = series_of_sigmoid(mean, variance, a, b, tolerance)
        if terms is None:
            raise ValueError(
                f"tolerance: {tolerance:g} cannot be met for D = {first.dim} and b = {b:.3g}; 1e-6 can, "
                "except for extreme variances: use mc for these"
            )
        return terms.view(len(first), -1).mean(1).to(torch.promote_types(first.mu.dtype, torch.float32))


def _mean_sigmoid(z1: Tensor, z2: Tensor, a: float, b: float, eps: float) -> Tensor:
    """The mean over K1 x K2 of sigmoid(b - a d), a tile of images at a time: (B1, B2)."""
    (n1, k1, dim), (n2, k2, _) = z1.shape, z2.shape
    result = z1.new_empty(n1, n2)
    side = max(1, math.isqrt(TILE // (k1 * k2)))
    centre = z1.mean((0, 1))
    left_all, right_all = ((z - centre).transpose(0, 1).contiguous() for z in (z1, z2))  # (K, B, D)
    for i in range(0, n1, side):
        left = left_all[:, i : i + side].reshape(-1, dim)
        for j in range(0, n2, side):
            squares = squared_distances(left, right_all[:, j : j + side].reshape(-1, dim))
            squares.add_(eps).sqrt_().mul_(-a).add_(b).sigmoid_()
            result[i : i + side, j : j + side] = squares.view(k1, len(left) // k1, k2, -1).mean((0, 2))
    return result


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, leave others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
