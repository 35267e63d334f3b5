"""Generators: one determined by a key, and one for each worker of a DataLoader."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch.utils.data import get_worker_info


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator determined by the key (seed, epoch, batch, ...)."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def own_stream(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator; in a DataLoader's worker it is reseeded once, from its seed and the worker's.

    Workers start with equal copies of a generator, and with the same copies in every epoch: without this they would all
    draw the same. A worker's seed comes from the loader (`DataLoader(generator=...)`, else torch's default) and changes
    from epoch to epoch.
    """
    worker = get_worker_info()
    if generator is not None and worker is not None:
        _reseed(generator, worker.seed)
    return generator


@lru_cache(maxsize=64)  # a worker has a few generators: each is reseeded once
def _reseed(generator: torch.Generator, seed: int) -> None:
    generator.manual_seed(generator_for(generator.initial_seed(), seed).initial_seed())
