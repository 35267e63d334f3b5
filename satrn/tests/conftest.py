"""Small networks, words in the real format, and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from satrn.config import SATRNConfig
from satrn.data.render import random_words, render_words
from satrn.data.words_lmdb import write_lmdb
from satrn.settings import RENDERED

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(d_model=16, heads=2, ffn=16, enc_layers=2, dec_layers=2, img_size=(16, 24), charset="abcde", max_length=6)


def _tiny(**changes):
    return SATRNConfig(**TINY | changes)


def _write_words(folder, count=12, charset="abc123", seed=0, size=(20, 40)):
    words = random_words(count, charset, (2, 4), torch.Generator().manual_seed(seed))
    images, _ = render_words(words, seed, "straight", size, 16.0)
    write_lmdb(folder, zip(images, words, strict=True))
    return words


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def tiny():
    return _tiny


@pytest.fixture(scope="session")
def write_words():
    return _write_words


@pytest.fixture(scope="session")
def small_settings():
    return replace(
        RENDERED, d_model=16, heads=2, ffn=16, enc_layers=1, qk_width=None, img_size=(16, 16), charset="47",
        train_images=64, test_images=32, steps=40, batch_size=8, font_pixels=8.0, warp="straight",
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, small_settings):
    """A checkpoint of a few steps, and its settings."""
    from satrn.experiments import train_and_evaluate
    from satrn.train import make_fabric

    path = tmp_path_factory.mktemp("checkpoint") / "satrn.pt"
    train_and_evaluate(small_settings, 3, Path("nowhere"), make_fabric("cpu"), path)
    return path
