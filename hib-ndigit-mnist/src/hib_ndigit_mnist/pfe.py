"""Probabilistic face embeddings, a competing method: a variance learned for a fixed point embedding.

Shi, Jain, *Probabilistic Face Embeddings*, ICCV 2019, arXiv 1904.09658. There, the mean comes from a face network
trained beforehand; here, the soft contrastive loss trains it in the same run, unaffected by the variance's gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hib_ndigit_mnist.embedding import LOGVAR_RANGE, GaussianMixtureEmbedding
from hib_ndigit_mnist.losses import LossOutput, VIBPairLoss
from hib_ndigit_mnist.models import HedgedHead


def mutual_likelihood_score(first: GaussianMixtureEmbedding, second: GaussianMixtureEmbedding) -> Tensor:
    """Log likelihood that two Gaussians share one latent point (equation 3 of that paper): two of (P, 1, D) -> (P,)."""
    variance = first.variance() + second.variance()
    terms = (first.mu - second.mu).square() / variance + variance.log() + math.log(2 * math.pi)
    return -0.5 * terms.sum((-2, -1))


class PFEHead(HedgedHead):
    """A `HedgedHead` whose log variances pass no gradient to the features."""

    def forward(self, features: Tensor) -> GaussianMixtureEmbedding:  # type: ignore[override]
        """(B, features) -> the embedding (B, 1, D)."""
        mean, variance = (super(PFEHead, self).forward(each) for each in (features, features.detach()))
        return GaussianMixtureEmbedding(mean.mu, variance.logvar)


class PFELoss(VIBPairLoss):
    """The soft contrastive loss of the means, minus the mean mutual likelihood score of the matching pairs.

    The score uses detached means; `kl` of the output is the negative score.
    """

    def forward(
        self, embedding: GaussianMixtureEmbedding, labels: Tensor, generator: torch.Generator | None = None
    ) -> LossOutput:
        """Loss of a batch (B, 1, D) with labels (B,); raises like `VIBPairLoss`."""
        out = super().forward(GaussianMixtureEmbedding(embedding.mu), labels, generator=generator)
        first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
        match = labels[first] == labels[second]
        fixed = GaussianMixtureEmbedding(embedding.mu.detach(), embedding.logvar)
        score = mutual_likelihood_score(fixed[first[match]], fixed[second[match]]).mean()
        return out._replace(loss=out.loss - score, kl=-score)


def harmonic_mean_sigma(embedding: GaussianMixtureEmbedding) -> Tensor:
    """The uncertainty of section 5 of that paper: harmonic mean of the standard deviations, (B, 1, D) -> (B,)."""
    sigma = embedding.variance().clamp_min(math.exp(LOGVAR_RANGE[0])).sqrt()
    return sigma.flatten(1).shape[1] / sigma.flatten(1).reciprocal().sum(1)
