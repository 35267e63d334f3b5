"""Training words as a stream: the words of a step depend only on seed and step, so training can resume at any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from satrn.charset import Tokenizer
from satrn.config import SATRNConfig
from satrn.data.render import random_words, render_words
from satrn.settings import Settings


def seed_of(*key: int) -> int:
    """A seed of 32 bits for this key, such as (seed, step): torch's generator on the CPU ignores all higher bits."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def normalise(images: Tensor, cfg: SATRNConfig | Settings) -> Tensor:
    """Uint8 [B, C, H, W] (gray or RGB) to float32, as the network expects it.

    Gray is v/255 - 0.5. RGB is scaled by ImageNet's means and deviations; for variant mmocr the planes are blue, green,
    red, with the constants in the order of red, green, blue, as MMOCR trained.
    """
    images = images.float() / 255
    if cfg.in_channels == 1:
        return images - 0.5
    mean, deviation = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return ((images.flip(1) if cfg.variant == "mmocr" else images) - mean) / deviation


def positions(n: int, per_step: int, seed: int, step: int) -> Tensor:
    """Indices [per_step] into n words at a step: every word once per epoch, each epoch in a different order."""
    if n < 1:
        raise ValueError("a training set must not be empty")
    places = torch.arange(step * per_step, (step + 1) * per_step)
    epochs = (places // n).tolist()
    return torch.stack(
        [_order(n, seed, epoch)[place] for epoch, place in zip(epochs, (places % n).tolist(), strict=True)]
    )


@lru_cache(maxsize=32)  # two epochs of every set of a mixture
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch))


class RenderedWords:
    """Rendered words on the device.

    Args:
        s: settings (warp, img_size, charset, word_lengths, font_pixels, max_length).
        count: number of words.
        seed: seed of words and pictures.
        device: device of the words.
        degrees: one angle for all instead of the warp's.
        warp: instead of the settings'.
    """

    def __init__(
        self,
        s: Settings,
        count: int,
        seed: int,
        device: torch.device,
        degrees: float | None = None,
        warp: str | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.labels = random_words(count, s.charset, s.word_lengths, generator)
        images, self.angles = render_words(
            self.labels, seed, warp or s.warp, s.img_size, s.font_pixels, degrees=degrees
        )
        self.name = f"rendered {warp or s.warp}"
        self.images = images.expand(-1, s.in_channels, -1, -1).to(device)
        self.targets = Tokenizer(s.charset).encode(self.labels, s.max_length).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> dict:
        """Name, size and checksum."""
        digest = hashlib.sha256(self.images.cpu().numpy().tobytes() + "\n".join(self.labels).encode()).hexdigest()
        return {"name": self.name, "shape": list(self.images.shape), "sha256": digest[:16]}

    def record(self) -> dict:
        """For a run log."""
        return self.identity()

    def steps(self, s: Settings, seed: int, first: int, share: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 and targets of this rank's share of every batch, from a step on."""
        for step in range(first, s.steps):
            index = positions(len(self), s.batch_size, seed, step)[share].to(self.images.device, non_blocking=True)
            yield self.images[index], self.targets[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """All words once: images uint8 and labels."""
        for first in range(0, len(self), size):
            yield self.images[first : first + size], self.labels[first : first + size]


def share_counts(mix: Sequence[float], batch_size: int) -> list[int]:
    """Words of each set in a batch: the largest remainders get what rounding leaves; their sum is the batch."""
    exact = [batch_size * part / sum(mix) for part in mix]
    counts = [int(value) for value in exact]
    order = sorted(range(len(mix)), key=lambda i: counts[i] - exact[i])
    for i in order[: batch_size - sum(counts)]:
        counts[i] += 1
    return counts
