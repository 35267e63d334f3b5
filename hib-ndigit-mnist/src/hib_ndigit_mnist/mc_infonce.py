"""MCInfoNCE, a competing method: a von Mises-Fisher distribution per image, trained by InfoNCE averaged over samples.

Kirchhof, Kasneci, Oh, *Probabilistic Contrastive Learning Recovers the Correct Aleatoric Uncertainty of Ambiguous
Inputs*, ICML 2023, arXiv 2302.02865. There, partners are two crops of an image; here, two images of a class.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import LOGVAR_RANGE, GaussianMixtureEmbedding, check_samples
from hib_ndigit_mnist.models import HedgedHead
from hib_ndigit_mnist.pairs import check_labels

INITIAL_KAPPA = 5.0  # times D: a sample and its mean then have a cosine of 0.9, whatever the dimension
INITIAL_SCALE = 20.0  # inverse temperature, as in the authors' code


class MCInfoNCEHead(nn.Module):
    """One linear layer that predicts a mean direction and a concentration kappa.

    Args:
        features: width of the backbone's output.
        dim: D >= 2.

    Raises:
        ValueError: fewer than two dimensions.
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim: expected >= 2 for directions, got {dim}")
        self.head = HedgedHead(features, dim + 1, point=True)
        nn.init.constant_(self.head.bias[-1], -math.log(INITIAL_KAPPA * dim))

    def forward(self, features: Tensor) -> GaussianMixtureEmbedding:
        """(B, features) -> (B, 1, D): the mean direction, of length 1, and -log kappa as every log variance.

        For large kappa, 1 / kappa is the variance along the sphere.
        """
        out = self.head(features).mu
        direction = F.normalize(out[..., :-1], dim=-1)
        return GaussianMixtureEmbedding(direction, out[..., -1:].clamp(*LOGVAR_RANGE).expand_as(direction))


class MCInfoNCEOutput(NamedTuple):
    """Scalars."""

    loss: Tensor
    scale: Tensor  # inverse temperature


class MCInfoNCELoss(nn.Module):
    """MCInfoNCE of a batch with labels; the inverse temperature is learned with the rest.

    Args:
        samples: K per image (16 in the paper).
    """

    def __init__(self, samples: int = 8):
        super().__init__()
        check_samples(samples, 1)
        self.samples, self.log_scale = samples, nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, embedding: GaussianMixtureEmbedding, labels: Tensor) -> MCInfoNCEOutput:
        """Loss of the embedding (B, 1, D) of `MCInfoNCEHead` with labels (B,).

        Raises:
            ValueError: a batch without a matching or a non-matching pair, labels of another length.
        """
        check_labels(labels, len(embedding))
        kappa = inverse_concentration(embedding).reciprocal()
        z = von_mises_fisher_samples(embedding.mu[:, 0], kappa, self.samples)
        scale = self.log_scale.exp()
        return MCInfoNCEOutput(infonce_of_samples(z, labels, scale), scale)


def infonce_of_samples(z: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
    """-log of the mean over K of a matching pair's softmax among all non-matching pairs, averaged over matching pairs.

    This is the loss of that paper without its constant factor for the number of non-matching pairs.

    Args:
        z: (K, B, D) unit vectors; the k-th samples of all images are compared with each other.
        labels: (B,), with a matching and a non-matching pair.
        scale: inverse temperature, > 0.
    """
    same = labels[:, None] == labels
    partner = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = scale * z @ z.transpose(1, 2)  # (K, B, B)
    others = similarity.masked_fill(same, -torch.inf).logsumexp(2, keepdim=True)
    right = F.logsigmoid(similarity - others).logsumexp(0) - math.log(len(z))  # (B, B)
    return -right[partner].mean()


def von_mises_fisher_samples(mean: Tensor, kappa: Tensor, samples: int) -> Tensor:
    """Samples of the density proportional to exp(kappa mean . z) on the sphere, by rejection (Wood 1994).

    As usual (arXiv 1804.00891), the gradient passes only through the accepted draws: that of the mean cosine is
    correct within 10 % for kappa >= 10.

    Args:
        mean: (B, D) unit vectors, D >= 2.
        kappa: (B,) concentrations, > 0.
        samples: K.

    Returns:
        (K, B, D) unit vectors; differentiable in mean and kappa.

    Raises:
        ValueError: a concentration that is not finite or not above 0: nothing would ever be accepted.
    """
    if not ((kappa > 0) & kappa.isfinite()).all():
        raise ValueError(f"kappa: expected finite values above 0, got {kappa.min().item()} .. {kappa.max().item()}")
    dim = mean.shape[1]
    concentration = kappa.double().expand(samples, -1)
    b = (dim - 1) / (2 * concentration + (4 * concentration.square() + (dim - 1) ** 2).sqrt())
    with torch.no_grad():
        draw = _accepted(concentration, b, dim)
    below = 1 - (1 - b) * draw
    along = (1 - (1 + b) * draw) / below  # cosine to the mean
    aside = 2 * (b * draw * (1 - draw)).sqrt() / below  # its sine, without cancellation
    noise = torch.randn(samples, *mean.shape, dtype=mean.dtype, device=mean.device)
    tangent = F.normalize(noise - (noise * mean).sum(-1, keepdim=True) * mean, dim=-1)
    return along.to(mean.dtype)[..., None] * mean + aside.to(mean.dtype)[..., None] * tangent


def _accepted(kappa: Tensor, b: Tensor, dim: int) -> Tensor:
    """Beta draws whose cosine has the correct density: the envelope touches it at the cosine `top`."""
    half = torch.full_like(kappa, (dim - 1) / 2)
    proposal = torch.distributions.Beta(half, half)
    top = (1 - b) / (1 + b)
    bound = kappa * top + (dim - 1) * (1 - top.square()).log()
    result, missing = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    while missing.any():
        draw = proposal.sample().clamp(1e-12, 1 - 1e-12)
        along = (1 - (1 + b) * draw) / (1 - (1 - b) * draw)
        level = kappa * along + (dim - 1) * (1 - top * along).log() - bound
        taken = missing & (level >= torch.rand_like(level).log())
        result, missing = torch.where(taken, draw, result), missing & ~taken
    return result


def inverse_concentration(embedding: GaussianMixtureEmbedding) -> Tensor:
    """That paper's uncertainty, 1 / kappa: (B, 1, D) -> (B,)."""
    return embedding.variance()[:, 0, 0]
