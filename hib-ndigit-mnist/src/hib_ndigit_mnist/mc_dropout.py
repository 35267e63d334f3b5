"""Monte Carlo dropout, a competing method: a point embedding with dropout left on and several passes per image.

Gal, Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016, arXiv 1506.02142. The passes of an image are a
mixture of points, so match probabilities and eta follow equation 5 of the paper on hedged embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import LOGVAR_RANGE, GaussianMixtureEmbedding
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.models import HedgedHead


class DropoutHead(nn.Module):
    """Dropout on the features, then a point head; one pass in training, `passes` in eval mode.

    Args:
        features: width of the backbone's output.
        dim: D.
        probability: probability of dropping a feature, in (0, 1).
        passes: K >= 2, components of the embedding in eval mode.

    Raises:
        ValueError: a probability outside (0, 1), fewer than two passes.
    """

    def __init__(self, features: int, dim: int, probability: float = 0.2, passes: int = 8):
        super().__init__()
        if not 0 < probability < 1 or passes < 2:
            raise ValueError(f"expected dropout in (0, 1) and passes >= 2, got {probability}, {passes}")
        self.probability, self.passes = probability, passes
        self.head = HedgedHead(features, dim, point=True)

    def forward(self, features: Tensor) -> GaussianMixtureEmbedding:
        """(B, features) -> (B, 1, D) in training; (B, K, D) in eval mode, each with almost no variance."""
        if self.training:
            return self.head(self._drop(features))
        mu = torch.cat([self.head(self._drop(features)).mu for _ in range(self.passes)], 1)
        return GaussianMixtureEmbedding(mu, torch.full_like(mu, LOGVAR_RANGE[0]))

    def _drop(self, features: Tensor) -> Tensor:
        return nn.functional.dropout(features, self.probability, training=True)


def mismatch_of_passes(embedding: GaussianMixtureEmbedding, match: MatchProbability) -> Tensor:
    """An unbiased eta from one set of passes: 1 - the mean p(m) of two different passes, (B, K, D) -> (B,).

    Pairs of a pass with itself (distance 0) are excluded.
    """
    with torch.no_grad():
        p = match.logits(embedding.mu, embedding.mu).sigmoid()  # (B, K, K)
    different = ~torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    return 1 - p[:, different].mean(1)
