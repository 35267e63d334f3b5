"""Weights that the golden fixtures were made with, and small data in the real formats."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def _fill(model):
    """Deterministic weights by key, as tests/golden/README.md says."""
    state = model.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        rng, shape = np.random.RandomState(zlib.crc32(name.encode())), tuple(value.shape)
        if name.endswith("running_mean"):
            new = rng.uniform(-0.1, 0.1, shape)
        elif name.endswith("running_var"):
            new = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("localization_fc2.weight"):
            new = rng.uniform(-0.01, 0.01, shape)
        elif name.endswith("localization_fc2.bias"):
            new = value.double().numpy() + rng.uniform(-0.1, 0.1, shape)
        elif value.ndim >= 2:
            new = rng.uniform(-1, 1, shape) * np.sqrt(6 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            new = rng.uniform(0.5, 1.5, shape)
        else:
            new = rng.uniform(-0.1, 0.1, shape)
        state[name] = torch.from_numpy(np.asarray(new)).float()
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="session")
def fill():
    return _fill


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def _word_lmdb(path, labels, size=(40, 16)):
    """A small LMDB of noise images with the given labels."""
    from PIL import Image

    from str_benchmark.data.lmdb_store import write_lmdb

    rng = np.random.default_rng(len(labels))
    write_lmdb(((Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8)), label) for label in labels), path)
    return path


@pytest.fixture(scope="session")
def word_lmdb():
    return _word_lmdb


def _released_layout(root, n=6):
    """All sets of the paper as tiny LMDBs in the layout of the released ones."""
    from str_benchmark.data.sets import SETS

    for number, each in enumerate(SETS.values()):
        parent = root / each.folder
        nested = parent / "train" if each.name == "MJ" else parent  # MJ lies in several LMDBs
        nested.parent.mkdir(parents=True, exist_ok=True)
        _word_lmdb(nested, [f"w{number}{i}" for i in range(n)])
    return root


@pytest.fixture(scope="session")
def released_layout():
    return _released_layout
