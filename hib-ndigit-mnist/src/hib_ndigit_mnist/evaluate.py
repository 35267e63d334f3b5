"""The paper's protocol (section 4.2): verification, identification and the quality of the uncertainty eta.

Test occluders are drawn once from a fixed seed, so that all methods see the same corrupted images. Match
probabilities are computed by quadrature, so scores have no sampling noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hib_ndigit_mnist.data import NDigitSet
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.expansion import sigmoid_as_gaussians
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.metrics import (
    BinnedCorrelation,
    accuracy_rejection_area,
    average_precision,
    binned_correlation,
    count_partners,
    expected_calibration_error,
    knn_predict,
    ood_auroc,
    r_auroc,
)
from hib_ndigit_mnist.models import Encoder
from hib_ndigit_mnist.occlusion import OcclusionInfo, apply_occlusion, draw_occlusion
from hib_ndigit_mnist.pairs import verification_pairs

CONDITIONS = ("clean", "corrupt")
TEST_SEED = 0  # for test occluders and pairs: the same for every model
PAIR_TOLERANCE = 1e-6
RANKING_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TestSet:
    """Test images in both conditions, and the pairs and queries to evaluate.

    Args:
        images: (n, 1, H, W) uint8 by condition.
        labels: (n,) int64.
        occluders: those of the corrupt condition, fields (n, N).
        pairs: first, second, match, (P,) each.
        queries: (Q,) indices of images that are identified among all n.
    """

    images: dict[str, Tensor]
    labels: Tensor
    occluders: OcclusionInfo
    pairs: tuple[Tensor, Tensor, Tensor]
    queries: Tensor

    __test__ = False  # not a test case, despite its name

    @classmethod
    def of(cls, data: NDigitSet, images: int = 10_000, pairs: int | str = 10_000, queries: int = 10_000) -> TestSet:
        """Fixed random images of a split (all, if there are fewer), and the given numbers of pairs and queries."""
        generator = torch.Generator().manual_seed(TEST_SEED)
        rows = torch.randperm(len(data), generator=generator)[:images]
        clean = data.images(rows)
        uniform = torch.rand(len(rows), data.num_digits, 4, generator=generator)
        occluders = draw_occlusion(uniform, 1.0, data.tile)
        both = {"clean": clean, "corrupt": apply_occlusion(clean, occluders)}
        labels = data.labels[rows]
        asked = torch.arange(min(queries, len(rows)))
        return cls(both, labels, occluders, verification_pairs(labels, pairs, TEST_SEED), asked)

    def hidden_ink(self) -> Tensor:
        """(n,) occluded share of the clean image's brightness."""
        clean, corrupt = (self.images[c].flatten(1).double().sum(1) for c in CONDITIONS)
        return 1 - corrupt / clean.clamp_min(1)


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor, batch: int = 2048) -> GaussianMixtureEmbedding:
    """Images (n, 1, H, W) -> the embedding in float64, on the encoder's device."""
    device = next(encoder.parameters()).device
    parts = [encoder(part.to(device)) for part in images.split(batch)]
    mu = torch.cat([part.mu for part in parts]).double()
    return GaussianMixtureEmbedding(mu, None if parts[0].is_point else torch.cat([p.logvar for p in parts]).double())


class Evaluation:
    """One model on one test set; everything is computed once, on first use.

    Args:
        encoder: on the device where the evaluation is to run.
        match: its match probability.
        test: images, pairs and queries.
        estimator: "quadrature", "mc", or "auto": quadrature unless D > 2 and the sigmoid is too steep for the closed
            form, without which all pairs of a large test set take too long.
        samples: K of the Monte Carlo estimator.
        nearest_k: number of neighbours that vote.
    """

    def __init__(
        self,
        encoder: Encoder,
        match: MatchProbability,
        test: TestSet,
        estimator: str = "auto",
        samples: int = 8,
        nearest_k: int = 5,
    ):
        if estimator == "auto":
            exact = encoder.dim <= 2 or sigmoid_as_gaussians(match.values()[1], RANKING_TOLERANCE) is not None
            estimator = "quadrature" if exact else "mc"
        self.encoder, self.match = encoder.eval(), match.to(next(encoder.parameters()).device)
        self.test, self.k = test, nearest_k
        self.options: dict[str, Any] = {"method": estimator, "samples": samples}

    @property
    def queries(self) -> Tensor:
        """(Q',) the queries that have a partner: other images of their class."""
        labels, queries = self.test.labels, self.test.queries
        return queries[count_partners(labels[queries], labels, queries) > 0]

    @cached_property
    def embeddings(self) -> dict[str, GaussianMixtureEmbedding]:
        """Embeddings by condition."""
        return {condition: embed(self.encoder, images) for condition, images in self.test.images.items()}

    def draws(self) -> torch.Generator:
        """Generator of the samples: the same for every model, on its device."""
        return torch.Generator(self.embeddings["clean"].mu.device).manual_seed(TEST_SEED)

    @cached_property
    def pair_scores(self) -> dict[str, Tensor]:
        """p(m | x1, x2) of the verification pairs, by condition: (P,)."""
        first, second, _ = self.test.pairs
        options = self.options | {"generator": self.draws(), "tolerance": PAIR_TOLERANCE}
        return {c: self.match.prob(e[first], e[second], **options).cpu() for c, e in self.embeddings.items()}

    @cached_property
    def eta(self) -> dict[str, Tensor]:
        """Self-mismatch by condition: (n,)."""
        options = self.options | {"generator": self.draws(), "tolerance": PAIR_TOLERANCE}
        return {c: self.match.self_mismatch(e, **options).cpu() for c, e in self.embeddings.items()}

    @cached_property
    def _votes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Whether k neighbours and whether the nearest one are right, (Q',) bool each, by condition and gallery."""
        device = self.embeddings["clean"].mu.device
        labels, queries = self.test.labels.to(device), self.queries.to(device)
        options = self.options | {"generator": self.draws(), "tolerance": RANKING_TOLERANCE}
        result = {}
        for name, condition, gallery in (
            ("clean", "clean", "clean"),
            ("corrupt", "corrupt", "clean"),
            ("corrupt_same", "corrupt", "corrupt"),
        ):
            right = []
            for part in queries.split(500):
                scores = self.match.pairwise(self.embeddings[condition][part], self.embeddings[gallery], **options)
                partners = count_partners(labels[part], labels, part)
                each_k = partners.clamp(max=self.k), 1  # as in `knn_accuracy`
                votes = [knn_predict(scores, labels, k, own=part) == labels[part] for k in each_k]
                right.append(torch.stack(votes).cpu())
            most, nearest = torch.cat(right, 1)
            result[name] = most, nearest
        return result

    @property
    def correct(self) -> dict[str, Tensor]:
        """Whether the vote for `queries` is right, (Q',) bool: "clean", "corrupt" (clean gallery), "corrupt_same"."""
        return {name: most for name, (most, _) in self._votes.items()}

    # ---- tables ----

    def verification(self) -> dict[str, float]:
        """Average precision of the pairs by condition, and the share of matching pairs among them."""
        match = self.test.pairs[2]
        result = {f"ap_{c}": average_precision(match, scores) for c, scores in self.pair_scores.items()}
        return result | {"positive_rate": float(match.double().mean())}

    def identification(self) -> dict[str, float]:
        """K-nearest-neighbour accuracy: clean, corrupt against clean images, corrupt against corrupt ones."""
        return {f"knn_{name}": float(right.double().mean()) for name, right in self.correct.items()}

    def tau(self, condition: str, task: str, bins: int = 20) -> BinnedCorrelation:
        """Correlation of eta with accuracy ("knn") or average precision ("ap", binned by the first image's eta)."""
        eta = self.eta[condition]
        if task == "knn":
            return binned_correlation(eta[self.queries], self.correct[condition].double(), bins)
        first, _, match = self.test.pairs
        return binned_correlation(eta[first], self.pair_scores[condition], bins, match)

    def uncertainty(self) -> dict[str, float]:
        """Tau and its p by condition and task, mean eta, and ROC AUC of eta for corrupt against clean."""
        result = {f"eta_{c}": float(eta.mean()) for c, eta in self.eta.items()}
        result["auc"] = ood_auroc(self.eta["clean"], self.eta["corrupt"])
        for condition in CONDITIONS:
            for task in ("ap", "knn"):
                tau = self.tau(condition, task)
                result |= {f"tau_{task}_{condition}": tau.tau, f"p_{task}_{condition}": tau.p_value}
        result["ink"] = float(stats.spearmanr(self.test.hidden_ink(), self.eta["corrupt"]).statistic)
        return result

    def selective(self) -> dict[str, float]:
        """R@1 by match probability, and how well eta predicts it: R-AUROC and area under accuracy-rejection."""
        result = {}
        for condition in CONDITIONS:
            right, eta = self._votes[condition][1], self.eta[condition][self.queries]
            result[f"r1_{condition}"] = float(right.double().mean())
            result[f"r_auroc_{condition}"] = r_auroc(eta, right)
            result[f"rejection_area_{condition}"] = accuracy_rejection_area(eta, right)
        return result

    def spread(self) -> dict[str, float]:
        """Mean sigma by condition and in units of the learned margin b / a, their ratio, distance of components."""
        sigma = {c: float(e.variance().sqrt().mean()) for c, e in self.embeddings.items()}
        result = {f"sigma_{c}": value for c, value in sigma.items()}
        result["sigma_ratio"] = sigma["corrupt"] / sigma["clean"]
        a, b = self.match.values()
        result["sigma_over_margin"] = sigma["corrupt"] * a / b
        if self.encoder.components > 1:
            for condition, e in self.embeddings.items():
                result[f"apart_{condition}"] = float(component_distance(e).mean())
            result["apart_ratio"] = result["apart_corrupt"] / result["apart_clean"]
        return result

    def divergence(self) -> dict[str, float]:
        """Mean KL to the prior in nats, by condition (mixtures: the bound by components)."""
        return {f"kl_{c}": float(e.kl("upper_bound").mean()) for c, e in self.embeddings.items()}

    def calibration(self) -> dict[str, float]:
        """Expected calibration error of p(m), by condition."""
        match = self.test.pairs[2]
        return {f"ece_{c}": expected_calibration_error(p, match).error for c, p in self.pair_scores.items()}

    def structure(self) -> dict[str, float]:
        """Mean distance between centroids of classes that share a digit, over that of other classes (clean images)."""
        centroids, numbers = class_centroids(self.embeddings["clean"], self.test.labels)
        return {"shared_over_other": shared_digit_ratio(centroids, numbers, self.test.occluders.side.shape[1])}


def component_distance(embedding: GaussianMixtureEmbedding) -> Tensor:
    """(B,) mean distance between the components' means."""
    mu, c = embedding.mu, embedding.components
    return torch.cdist(mu, mu).sum((1, 2)) / (c * (c - 1))


def class_centroids(embedding: GaussianMixtureEmbedding, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean embedding per class (classes, D), and the classes."""
    numbers, which = labels.unique(return_inverse=True)
    sums = torch.zeros(len(numbers), embedding.dim, dtype=embedding.mu.dtype).index_add_(
        0, which, embedding.mean().cpu()
    )
    return sums / which.bincount()[:, None], numbers


def shares_digit(numbers: Tensor, num_digits: int) -> Tensor:
    """(classes, classes) bool: the same digit in at least one position; a class does not share with itself."""
    digits = torch.stack([numbers // 10**position % 10 for position in range(num_digits)], 1)
    shared = (digits[:, None] == digits[None]).any(2)
    return shared & ~torch.eye(len(numbers), dtype=torch.bool)


def shared_digit_ratio(centroids: Tensor, numbers: Tensor, num_digits: int) -> float:
    """Mean distance of classes that share a digit, over that of classes that do not; below 1: structured."""
    distance, shared = torch.cdist(centroids, centroids), shares_digit(numbers, num_digits)
    other = ~shared & ~torch.eye(len(numbers), dtype=torch.bool)
    return float(distance[shared].mean() / distance[other].mean())


def fit_match(encoder: Encoder, data: NDigitSet, occlusion_p: float, pairs: int = 10_000) -> MatchProbability:
    """Fit a and b for points trained without them: logistic regression of match on distance, over training pairs."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    rows = torch.randperm(len(data), generator=generator)[:5000]
    occluders = draw_occlusion(torch.rand(len(rows), data.num_digits, 4, generator=generator), occlusion_p, data.tile)
    z = embed(encoder, apply_occlusion(data.images(rows), occluders)).mean().cpu()
    first, second, match = verification_pairs(data.labels[rows], pairs, TEST_SEED)
    distance = (z[first] - z[second]).norm(dim=1, keepdim=True)
    fitted = LogisticRegression(C=1e6).fit(distance.numpy(), match.numpy())
    return MatchProbability(max(-float(fitted.coef_[0, 0]), 1e-3), float(fitted.intercept_[0]))
