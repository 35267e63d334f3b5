"""An image as a distribution: a uniform mixture of C diagonal Gaussians in D dimensions (section 3.2 of the paper).

Leading dimensions are stacked models: everything here takes (..., B, C, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGVAR_RANGE = (-14.0, 6.0)
KL_METHODS = ("auto", "closed", "mc", "upper_bound")


@dataclass(frozen=True)
class GaussianMixtureEmbedding:
    """p(z|x) for a batch of images; float32 or float64.

    Args:
        mu: (..., B, C, D) component means.
        logvar: (..., B, C, D) log variances, or None for a point embedding (then C = 1).

    Raises:
        ValueError: fewer than three dimensions, C or D of 0, shapes that differ, a point with several components.
        TypeError: not a floating-point tensor.
    """

    mu: Tensor
    logvar: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim < 3 or 0 in self.mu.shape[-2:]:
            raise ValueError(f"mu: expected (..., B, C, D) with C, D >= 1, got {tuple(self.mu.shape)}")
        if not self.mu.is_floating_point():
            raise TypeError(f"mu: expected a floating-point tensor, got {self.mu.dtype}")
        if self.logvar is None and self.components != 1:
            raise ValueError(f"a point embedding has one component, but mu has {self.components}")
        if self.logvar is not None and self.logvar.shape != self.mu.shape:
            raise ValueError(f"logvar: expected shape {tuple(self.mu.shape)}, got {tuple(self.logvar.shape)}")

    @property
    def components(self) -> int:
        """C."""
        return self.mu.shape[-2]

    @property
    def dim(self) -> int:
        """D."""
        return self.mu.shape[-1]

    @property
    def is_point(self) -> bool:
        """No variance: every sample is the mean."""
        return self.logvar is None

    def __len__(self) -> int:
        return self.mu.shape[-3]

    def __getitem__(self, index: slice | list[int] | Tensor) -> GaussianMixtureEmbedding:
        """Select images of an unstacked embedding (B, C, D)."""
        return GaussianMixtureEmbedding(self.mu[index], None if self.logvar is None else self.logvar[index])

    def to(self, *args: Any) -> GaussianMixtureEmbedding:
        """Like `Tensor.to`."""
        return GaussianMixtureEmbedding(self.mu.to(*args), None if self.logvar is None else self.logvar.to(*args))

    def variance(self) -> Tensor:
        """(..., B, C, D); zeros for a point."""
        return torch.zeros_like(self.mu) if self.logvar is None else self.logvar.exp()

    def mean(self) -> Tensor:
        """(..., B, D) of the mixture."""
        return self.mu.mean(-2)

    def covariance(self) -> Tensor:
        """(..., B, D, D) of the mixture: within components plus between them."""
        spread = self.mu - self.mu.mean(-2, keepdim=True)  # (..., B, C, D)
        between = spread.transpose(-1, -2) @ spread / self.components
        return between + torch.diag_embed(self.variance().mean(-2))

    def sample(self, samples: int, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Stratified reparametrised samples: K / C from each component, z = mu + exp(logvar / 2) * noise.

        Args:
            samples: K; a point embedding repeats its mean K times.
            generator: draws the noise, on the device of mu.
            noise: (..., B, K, D) standard normals to use instead.

        Returns:
            (..., B, K, D); the samples of a component are adjacent.

        Raises:
            ValueError: K < 1 or K not a multiple of C.
        """
        check_samples(samples, self.components)
        per_component = samples // self.components
        mu = self.mu.repeat_interleave(per_component, dim=-2)  # (..., B, K, D)
        if self.logvar is None:
            return mu
        if noise is None:
            noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
        return mu + (self.logvar / 2).exp().repeat_interleave(per_component, dim=-2) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture: z (..., B, K, D) -> (..., B, K). ValueError for a point embedding."""
        if self.logvar is None:
            raise ValueError("a point embedding has no density")
        mu, logvar = self.mu.unsqueeze(-3), self.logvar.unsqueeze(-3)  # (..., B, 1, C, D)
        squares = (z.unsqueeze(-2) - mu).square() * (-logvar).exp()
        per_component = -0.5 * (squares + logvar + math.log(2 * math.pi)).sum(-1)  # (..., B, K, C)
        return per_component.logsumexp(-1) - math.log(self.components)

    def kl(self, method: str = "auto", z: Tensor | None = None) -> Tensor:
        """KL(p(z|x) || N(0, I)) in nats, (..., B); 0 for a point embedding.

        Args:
            method: "closed" for one Gaussian; "mc": the mean over `z` of log p(z|x) - log N(z; 0, I), unbiased for
                stratified samples; "upper_bound": the mean KL of the components (exact if they coincide);
                "auto": closed if C = 1, else mc.
            z: (..., B, K, D) samples of this embedding, for mc.

        Raises:
            ValueError: unknown method, closed with C > 1, mc without z.
        """
        if method not in KL_METHODS:
            raise ValueError(f"method: expected one of {', '.join(KL_METHODS)}, got {method!r}")
        if method == "auto":
            method = "closed" if self.components == 1 else "mc"
        if method == "closed" and self.components != 1:
            raise ValueError(f"a mixture of {self.components} has no closed-form KL; use mc or upper_bound")
        if self.logvar is None:
            return self.mu.new_zeros(self.mu.shape[:-2])
        if method == "mc":
            if z is None:
                raise ValueError("method mc needs samples z")
            prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)  # (..., B, K)
            return (self.log_prob(z) - prior).mean(-1)
        per_component = 0.5 * (self.mu.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)  # (..., B, C)
        return per_component.mean(-1)


def default_logvar(dim: int) -> float:
    """Initial log variance, -2 for D = 2; two samples of an image are then equally far apart for every D."""
    return -2 - math.log(dim / 2)


def check_samples(samples: int, components: int) -> None:
    """ValueError unless K >= 1 is a multiple of C."""
    if samples < 1 or samples % components:
        raise ValueError(f"samples: expected a multiple of the {components} components, got K = {samples}")
