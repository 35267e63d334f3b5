"""Batches that hold each training set in an exact share (section 4.1), reproducible from their index alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared_utils.logging import get_logger
from str_benchmark.data.images import to_input
from str_benchmark.data.samples import Loaded, load_samples
from str_benchmark.data.sets import Parts
from str_benchmark.tokenizers import AttnTokenizer, CTCTokenizer

Batch = tuple[Tensor, Tensor, Tensor]  # images, ids, lengths

logger = get_logger("str-benchmark")


def batch_shares(ratios: Sequence[float], batch_size: int) -> list[int]:
    """Samples of each set in a batch: proportional, summing to batch_size (largest remainders).

    Raises:
        ValueError: a ratio that is not positive, or one too small for a single sample.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"ratios: expected positive numbers, got {list(ratios)}")
    exact = [batch_size * ratio / sum(ratios) for ratio in ratios]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: batch_size - sum(shares)]:
        shares[i] += 1
    if min(shares) == 0:
        raise ValueError(f"ratios: {list(ratios)} leave a set without samples in a batch of {batch_size}")
    return shares


class BalancedBatchSampler:
    """An endless stream of batches with exact shares; every set is reshuffled when it is used up.

    Batch number `step` is a function of (seed, step): a resumed stream needs only its position.

    Args:
        datasets: anything with a length.
        ratios: share of each.
        batch_size: samples of a batch over all ranks.
        seed: seed of the order.
        rank: this process.
        world: processes; each takes its own part of every batch.
        stop: number of batches; None: endless.
    """

    def __init__(
        self,
        datasets: Sequence,
        ratios: Sequence[float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        stop: int | None = None,
    ):
        if len(ratios) != len(datasets):
            raise ValueError(f"ratios: expected {len(datasets)}, one per data set, got {len(ratios)}")
        if batch_size % world:
            raise ValueError(f"batch_size: {batch_size} cannot be shared by {world} ranks")
        self.sizes = [len(each) for each in datasets]
        if min(self.sizes) == 0:
            raise ValueError(f"datasets: number {self.sizes.index(0)} is empty")
        self.shares = batch_shares(ratios, batch_size)
        self.seed, self.rank, self.world, self.stop, self.step = seed, rank, world, stop, 0
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def _order(self, number: int, epoch: int) -> Tensor:
        if self._orders.get(number, (None,))[0] != epoch:
            seed = np.random.SeedSequence([self.seed, number, epoch]).generate_state(1)[0]  # torch keeps 32 bits
            generator = torch.Generator().manual_seed(int(seed))
            self._orders[number] = epoch, torch.randperm(self.sizes[number], generator=generator)
        return self._orders[number][1]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(data set, index) of this rank's samples of batch `step`."""
        samples = []
        for number, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            for draw in range(step * share, (step + 1) * share):
                samples.append((number, int(self._order(number, draw // size)[draw % size])))
        return samples[self.rank :: self.world]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while self.stop is None or self.step < self.stop:
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def state_dict(self) -> dict:
        """Position in the stream, and what it belongs to."""
        return {"step": self.step, "seed": self.seed, "sizes": self.sizes, "shares": self.shares}

    def load_state_dict(self, state: dict) -> None:
        """Continue where another stream stopped. ValueError if it mixed other data."""
        mine = self.state_dict() | {"step": state.get("step")}
        if mine != state:
            raise ValueError(f"sampler state of other data: {json.dumps(state)} instead of {json.dumps(mine)}")
        self.step = state["step"]


class Mixture(Dataset):
    """Several sets whose batches are loaded in one go: lists of (set, index) to pixels and labels."""

    def __init__(self, datasets: Sequence[Parts], size: tuple[int, int], pad: bool, skip_broken: bool):
        self.datasets, self.size, self.pad, self.skip_broken = list(datasets), size, pad, skip_broken

    def __getitems__(self, batch: Sequence[tuple[int, int]]) -> Loaded:
        samples = [self.datasets[number][index] for number, index in batch]
        return load_samples(samples, self.size, self.pad, self.skip_broken)


def _as_it_is(batch: Loaded) -> Loaded:
    return batch


class TrainingData:
    """What the training loop draws from: batches on the device, from workers or from memory.

    Args:
        datasets: the training sets.
        sampler: its batches.
        tokenizer: of the model's head.
        max_length: of a label.
        size: (H, W) of the images.
        device: device of the batches.
        pad: keep the ratio and pad, instead of stretching.
        resident: decode everything once and keep it on the device (small sets).
        workers: loader processes otherwise.
        skip_broken: skip broken images, counted and named; a batch is then smaller.
    """

    def __init__(
        self,
        datasets: Sequence[Parts],
        sampler: BalancedBatchSampler,
        tokenizer: CTCTokenizer | AttnTokenizer,
        max_length: int,
        size: tuple[int, int],
        device: torch.device,
        *,
        pad: bool = False,
        resident: bool = False,
        workers: int = 0,
        skip_broken: bool = False,
    ):
        self.sampler, self.tokenizer, self.max_length, self.device = sampler, tokenizer, max_length, device
        self.datasets, self.mixture = list(datasets), Mixture(datasets, size, pad, skip_broken)
        self.workers, self.broken = workers, 0
        self.resident = [self._keep(each) for each in datasets] if resident else None

    def _keep(self, data: Parts) -> Batch:
        if self.mixture.skip_broken:
            raise ValueError("resident training data must be complete: train without resident to skip broken images")
        loaded = load_samples([data[index] for index in range(len(data))], self.mixture.size, self.mixture.pad)
        ids, lengths = self.tokenizer.encode(loaded.labels, self.max_length)
        return loaded.pixels.to(self.device), ids.to(self.device), lengths

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches start .. stop-1: images (B, C, H, W) float32 and ids int64 on the device, lengths on the CPU."""
        if self.resident is not None:
            for step in range(start, stop):
                self.sampler.step = step + 1
                yield self._gather(self.resident, self.sampler.batch(step))
            return
        self.sampler.step, self.sampler.stop = start, stop
        loader = DataLoader(
            self.mixture,
            batch_sampler=self.sampler,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # __getitems__ returns a Loaded, not a list
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
        )
        for batch in loader:
            self._report(batch)
            ids, lengths = self.tokenizer.encode(batch.labels, self.max_length)
            images = to_input(batch.pixels.to(self.device, non_blocking=True))
            yield images, ids.to(self.device, non_blocking=True), lengths

    @staticmethod
    def _gather(resident: list[Batch], batch: list[tuple[int, int]]) -> Batch:
        parts = []
        for number, kept in enumerate(resident):
            chosen = torch.tensor([index for which, index in batch if which == number], dtype=torch.int64)
            parts.append([part[chosen.to(part.device, non_blocking=True)] for part in kept])
        pixels, ids, lengths = (torch.cat(each) for each in zip(*parts, strict=True))
        return to_input(pixels), ids, lengths

    def _report(self, batch: Loaded) -> None:
        if not batch.labels:
            raise ValueError(f"a batch without readable images: {batch.broken[0]}")
        for message in batch.broken:
            self.broken += 1
            if self.broken <= 20:
                logger.warning("broken image %d, skipped: %s", self.broken, message)
