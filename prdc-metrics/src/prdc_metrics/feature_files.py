"""Rows from files: features in the usual formats, sample archives, seeded subsets. No pickle is loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors", ".csv", ".parquet")
NAMES = ("features", "reps")  # ours, and dgm-eval's


def load_features(path: str | Path) -> Tensor:
    """Read an (n, D) feature matrix, dtype as stored, on the CPU.

    Args:
        path: .npy, .pt (a tensor, loaded with weights_only), .npz or .safetensors, of whose arrays the one
            called "features" or "reps" is taken, or a single one of any name; .csv (with a header or without) or
            .parquet, all of whose columns are numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown suffix, damaged file, pickled objects, no numeric (n, D) matrix with n, D >= 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such feature file")
    if path.suffix.lower() not in FEATURE_SUFFIXES:
        raise ValueError(f"{path}: a feature file must end in one of {', '.join(FEATURE_SUFFIXES)}")
    try:
        features = as_tensor(_only_array(_parse_features(path)))
    except Exception as error:  # four parsers, each with its own exceptions for a damaged file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as features ({type(error).__name__}: {reason})") from error
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{path}: features must be (n, D) with n, D >= 1, got {tuple(features.shape)}")
    return features


def _parse_features(path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if suffix in (".csv", ".parquet"):
        return _parse_frame(path)
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        return loaded
    with loaded:  # members are read when asked for
        return _only_array(loaded)


def _parse_frame(path: Path) -> np.ndarray:
    import pandas as pd

    if path.suffix.lower() == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except ImportError:
            raise ValueError("parquet needs pyarrow: pip install pyarrow") from None
    else:
        first = pd.read_csv(path, header=None, nrows=1)
        headless = all(pd.api.types.is_numeric_dtype(kind) for kind in first.dtypes)
        frame = pd.read_csv(path, header=None if headless else "infer")
    words = frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]
    if len(words):
        raise ValueError(f"column {words[0]!r} is not numeric; remove it")
    return frame.to_numpy()


def _only_array(loaded: object) -> object:
    if not isinstance(loaded, Mapping):
        return loaded
    for name in NAMES:
        if name in loaded:
            return loaded[name]
    if {"mu", "sigma"} <= set(loaded):
        raise ValueError("holds the mean and covariance that FID needs; these metrics need the samples themselves")
    if len(loaded) != 1:
        raise ValueError(f"holds {sorted(loaded) or 'nothing'}, expected 'features', 'reps' or a single array")
    return next(iter(loaded.values()))


def as_tensor(array: object) -> Tensor:
    """A tensor or array of real numbers as a tensor on the CPU, dtype kept."""
    if not isinstance(array, Tensor | np.ndarray):
        raise ValueError(f"expected a tensor or an array, found {type(array).__name__}")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "iuf":
            raise ValueError(f"expected real numbers, found {array.dtype}")
        array = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if array.dtype == torch.bool or array.is_complex():
        raise ValueError(f"expected real numbers, found {array.dtype}")
    return array.detach().cpu()


def load_sample_archive(path: str | Path) -> np.ndarray | None:
    """Images (n, H, W, 3) uint8 of a sample archive written by guided-diffusion; None for any other file.

    The images are the first array of the .npz, named arr_0; labels may follow.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with np.load(path, allow_pickle=False) as loaded:
        if "arr_0" not in loaded or set(loaded) & set(NAMES):
            return None
        images = loaded["arr_0"]
    return images if images.ndim == 4 and images.dtype == np.uint8 else None


def subset(n_items: int, num_samples: int | None, seed: int) -> Tensor:
    """Ascending int64 indices of min(n_items, num_samples) different items, the same for the same seed.

    Args:
        n_items: size of the set.
        num_samples: how many to keep; None, or at least n_items, keeps all.
        seed: seed of the draw without replacement.

    Raises:
        ValueError: num_samples < 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if num_samples is None or num_samples >= n_items:
        return torch.arange(n_items)
    chosen = torch.randperm(n_items, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return chosen.sort().values
