"""Which images form a pair: the paper's two input streams, the pairs of a batch, and fixed pairs for verification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs of one batch, or of stacked batches in leading dimensions.

    Args:
        first: (..., P) int64 indices into the batch.
        second: (..., P) int64.
        match: (..., P) bool.
        weight: (..., P); sums to 1/2 over the matching pairs and to 1/2 over the others; 0 for padding.
    """

    first: Tensor
    second: Tensor
    match: Tensor
    weight: Tensor


class ClassIndex:
    """Finds, for any image of a data set, a random other image of its class.

    Args:
        labels: (n,) integers.

    Raises:
        ValueError: not (n,), or a class with a single image (it has no partner).
    """

    def __init__(self, labels: Tensor):
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels: expected (n,) with n >= 1, got {tuple(labels.shape)}")
        classes, which, counts = labels.unique(return_inverse=True, return_counts=True)
        if counts.min() < 2:
            raise ValueError(f"labels: every class needs two images, class {int(classes[counts.argmin()])} has one")
        self.order = which.argsort(stable=True)  # images grouped by class
        self.start, self.count = (counts.cumsum(0) - counts)[which], counts[which]  # of each image's class
        self.rank = torch.empty_like(self.order)
        self.rank[self.order] = torch.arange(len(labels), device=labels.device)
        self.rank -= self.start

    def partner(self, image: Tensor, uniform: Tensor) -> Tensor:
        """Images of the same class, never the image itself, chosen by `uniform` in [0, 1)."""
        others = self.count[image] - 1
        step = 1 + torch.minimum((uniform * others).long(), others - 1)
        return self.order[self.start[image] + (self.rank[image] + step) % self.count[image]]


def two_streams(index: ClassIndex, size: int, uniform: Tensor) -> Tensor:
    """Stream one draws images uniformly, stream two a partner of the same class for each: (..., 2, h) -> (..., 2 h).

    A partner is never its own image, but an image may be drawn twice.
    """
    anchor = (uniform[..., 0, :] * size).long().clamp_max(size - 1)
    return torch.cat([anchor, index.partner(anchor, uniform[..., 1, :])], -1)


class TwoStreamSampler:
    """Batches with many matching pairs, for a `DataLoader(batch_sampler=...)`.

    Args:
        labels: (n,) integers; every class has at least two images.
        batch_size: even; half of the images are drawn uniformly, the other half are their partners of the same class.
        seed: seed of the order; every pass continues the stream.
        batches: number per pass; default n // batch_size, at least 1.

    Raises:
        ValueError: batch_size odd or below 2, labels as in `ClassIndex`.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int, batches: int | None = None):
        if batch_size < 2 or batch_size % 2:
            raise ValueError(f"batch_size: expected an even number >= 2, got {batch_size}")
        self.labels = torch.as_tensor(labels)
        self.index, self.batch_size = ClassIndex(self.labels), batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = batches or max(1, len(self.labels) // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.batches):
            uniform = torch.rand(2, self.batch_size // 2, generator=self.generator)
            batch = two_streams(self.index, len(self.labels), uniform)
            yield batch[torch.randperm(self.batch_size, generator=self.generator)].tolist()


def sample_pairs(labels: Tensor, generator: torch.Generator | None = None) -> Pairs:
    """All matching pairs of a batch and equally many random others, without padding: labels (B,)."""
    first, second, match = _upper_triangle(labels)
    matching, others = match.nonzero()[:, 0], (~match).nonzero()[:, 0]
    keys = torch.rand(len(others), generator=generator, device=labels.device)
    taken = torch.cat([matching, others[keys.topk(min(len(matching), len(others))).indices]])
    first, second, match = first[taken], second[taken], match[taken]
    return Pairs(first, second, match, _balance(match, torch.ones_like(match)))


def balanced_pairs(labels: Tensor, keys: Tensor, limit: int) -> Pairs:
    """All matching pairs of a batch and equally many others; of fixed size, so that a CUDA graph can use them.

    Args:
        labels: (..., B).
        keys: (..., B (B - 1) / 2) uniform in [0, 1): choose the non-matching pairs (and matching ones beyond `limit`).
        limit: maximal number of pairs of each kind; missing ones are padded with weight 0.
    """
    first, second, match = _upper_triangle(labels)
    limit = min(limit, keys.shape[-1])
    positive = (keys + match).topk(limit, -1).indices  # (..., limit), matches before others
    negative = (keys - match.to(keys.dtype)).topk(limit, -1).indices
    n_positive = match.sum(-1, keepdim=True).clamp_max(limit)
    n_negative = torch.minimum(n_positive, (~match).sum(-1, keepdim=True))
    slot = torch.arange(limit, device=labels.device)
    taken = torch.cat([slot < n_positive, slot < n_negative], -1)
    chosen = torch.cat([positive, negative], -1)
    is_match = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)], -1).bool()
    return Pairs(first.gather(-1, chosen), second.gather(-1, chosen), is_match, _balance(is_match, taken))


def pairs_of(indices_tuple: tuple[Tensor, ...], batch: int) -> Pairs:
    """Pairs chosen by a miner of pytorch-metric-learning: (anchor, positive, anchor, negative), or triplets.

    Raises:
        ValueError: not three or four tensors, different lengths, an index outside 0 .. batch - 1, an image paired with
            itself.
    """
    if len(indices_tuple) == 3:
        indices_tuple = (indices_tuple[0], indices_tuple[1], indices_tuple[0], indices_tuple[2])
    if len(indices_tuple) != 4 or any(len(a) != len(b) for a, b in (indices_tuple[:2], indices_tuple[2:])):
        raise ValueError("indices_tuple: expected (anchor, positive, anchor, negative) or (anchor, positive, negative)")
    first, second = torch.cat(indices_tuple[::2]), torch.cat(indices_tuple[1::2])
    for part in (first, second):
        if len(part) and (part.min() < 0 or part.max() >= batch):
            raise ValueError(f"indices_tuple: expected indices in 0..{batch - 1}, got {int(part.max())}")
    if (own := (first == second).nonzero()).numel():
        raise ValueError(f"indices_tuple: expected pairs of different images, got image {int(first[own[0]])} twice")
    match = torch.arange(len(first), device=first.device) < len(indices_tuple[0])
    return Pairs(first, second, match, _balance(match, torch.ones_like(match)))


def check_labels(labels: Tensor, batch: int) -> None:
    """ValueError unless labels are (batch,) with a matching and a non-matching pair."""
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape ({batch},), one per embedding, got {tuple(labels.shape)}")
    classes, counts = labels.unique(return_counts=True)
    shown = ", ".join(f"{label}: {count}" for label, count in zip(classes.tolist(), counts.tolist(), strict=True))
    if batch < 2 or counts.max() < 2:
        raise ValueError(
            f"labels: no matching pair in the batch, images per class {{{shown}}}; TwoStreamSampler draws pairs"
        )
    if len(classes) < 2:
        raise ValueError(f"labels: no non-matching pair in the batch; images per class {{{shown}}}")


def verification_pairs(
    labels: Tensor, n: int | str = 10_000, seed: int = 0, positive_rate: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed pairs of a test set: first (P,), second (P,) int64, match (P,) bool; no image is paired with itself.

    Args:
        labels: (m,) integers.
        n: number of pairs to draw, or "all" for every pair i < j.
        seed: seed of the draw.
        positive_rate: share of matching pairs; average precision strongly depends on it.

    Raises:
        ValueError: n < 1, a rate outside [0, 1], or a kind of pair that the labels do not have.
    """
    if n == "all":
        first, second, match = (part.clone() for part in _upper_triangle(labels))
        return first, second, match
    if not isinstance(n, int) or n < 1 or not 0 <= positive_rate <= 1:
        raise ValueError(f"expected n >= 1 or 'all', positive_rate in [0, 1], got n={n}, rate={positive_rate}")
    positives = round(n * positive_rate)
    generator = torch.Generator().manual_seed(seed)
    _, counts = labels.unique(return_counts=True)
    if positives < n and len(counts) < 2:
        raise ValueError("labels: a single class has no non-matching pair")
    paired = torch.empty(0, dtype=torch.long)
    if positives:
        lonely = labels.unique()[counts < 2]
        usable = (~torch.isin(labels, lonely)).nonzero()[:, 0]
        if not len(usable):
            raise ValueError("labels: no class has two images, so there is no matching pair")
        anchor = torch.randint(len(usable), (positives,), generator=generator)
        partner = ClassIndex(labels[usable]).partner(anchor, torch.rand(positives, generator=generator))
        paired = torch.stack([usable[anchor], usable[partner]])
    others = torch.randint(len(labels), (2, n - positives), generator=generator)
    while len(same := (labels[others[0]] == labels[others[1]]).nonzero()[:, 0]):
        others[:, same] = torch.randint(len(labels), (2, len(same)), generator=generator)
    first, second = torch.cat([paired, others], 1) if positives else others
    return first, second, labels[first] == labels[second]


def _upper_triangle(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = labels.shape[-1]
    first, second = torch.triu_indices(batch, batch, 1, device=labels.device)
    match = labels[..., first] == labels[..., second]
    return first.expand(match.shape), second.expand(match.shape), match


def _balance(match: Tensor, taken: Tensor) -> Tensor:
    positive, negative = (match & taken).float(), (~match & taken).float()
    halves = [kind / (2 * kind.sum(-1, keepdim=True).clamp_min(1)) for kind in (positive, negative)]
    return halves[0] + halves[1]
