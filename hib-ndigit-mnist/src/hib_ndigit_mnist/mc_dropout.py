"""Monte Carlo dropout, a rival: a point embedding whose dropout stays on, and several passes per image.

Gal, Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016, arXiv 1506.02142. The passes of an image are a
mixture of points, so that its match probabilities and its eta are those of equation 5 of hedged embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hib_ndigit_mnist.embedding import LOGVAR_RANGE, GaussianMixtureEmbedding
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.models import HedgedHead


class DropoutHead(nn.Module):
    """Dropout on the features, then a point head; one pass while training, `passes` in eval mode.

    Args:
        features: width of the backbone's output.
        dim: D.
        probability: of dropping a feature, in (0, 1).
        passes: K >= 2, components of the embedding in eval mode.

    Raises:
        ValueError: a probability outside (0, 1), fewer than two passes.
    """

    def __init__(self, features: int, dim: int, probability: float = 0.2, passes: int = 8):
        super().__init__()
        if not 0 < probability < 1 or passes < 2:
            raise ValueError(f"dropout in (0, 1) and passes >= 2 were expected, got {probability}, {passes}")
        self.probability, self.passes = probability, passes
        self.head = HedgedHead(features, dim, point=True)

    def forward(self, features: Tensor) -> GaussianMixtureEmbedding:
        """(B, features) -> (B, 1, D) while training; (B, K, D) in eval mode, of nearly no variance each."""
        if self.training:
            return self.head(self._drop(features))
        mu = torch.cat([self.head(self._drop(features)).mu for _ in range(self.passes)], 1)
        return GaussianMixtureEmbedding(mu, torch.full_like(mu, LOGVAR_RANGE[0]))

    def _drop(self, features: Tensor) -> Tensor:
        return nn.functional.dropout(features, self.probability, training=True)


def mismatch_of_passes(embedding: GaussianMixtureEmbedding, match: MatchProbability) -> Tensor:
    """An eta without bias from one set of passes: 1 - the mean p(m) of two different ones, (B, K, D) -> (B,).

    Pairs of a pass with itself, at distance 0, are left out.
    """
    with torch.no_grad():
        p = match.logits(embedding.mu, embedding.mu).sigmoid()  # (B, K, K)
    different = ~torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    return 1 - p[:, different].mean(1)
