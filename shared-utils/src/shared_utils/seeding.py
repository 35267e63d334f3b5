"""Seeds all random numbers with one integer; saves and restores the whole RNG state for an exact resume."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool = False) -> torch.Generator:
    """Seed Python, NumPy and torch (CPU and CUDA).

    Args:
        seed: any integer in 0 .. 2**32 - 1.
        deterministic: also refuse non-deterministic kernels.

    Returns:
        A CPU generator with the same seed, for a DataLoader.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return torch.Generator().manual_seed(seed)


def rng_state() -> dict:
    """State of all generators, made of tensors and plain values, so that it can be loaded with `weights_only`."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    kind, twister, has_gauss, cached = (numpy[name] for name in ("bit_generator", "state", "has_gauss", "gauss"))
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(twister["key"].astype(np.int64)), twister["pos"], has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: dict) -> None:
    """Restore all generators to a state from `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
