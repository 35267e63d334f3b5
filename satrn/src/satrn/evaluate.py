"""Word accuracy in the field's usual sense, over test sets, angles and lines; A2DPE's gates as a report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from satrn.data.streams import RenderedWords, normalise
from satrn.data.words_lmdb import LmdbWords
from satrn.models import SATRN
from satrn.rotation import rotate_words

PROTOCOLS = ("case-insensitive", "case-sensitive", "exact")


def comparable(text: str, protocol: str = "case-insensitive") -> str:
    """The part of a word that is compared.

    Args:
        text: a reading or a label.
        protocol: case-insensitive (the paper's and the field's: lower-cased letters and digits), case-sensitive
            (letters and digits) or exact (every character).

    Raises:
        ValueError: another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if protocol == "exact":
        return text
    return re.sub("[^0-9A-Za-z]", "", text.lower() if protocol == "case-insensitive" else text)


def read_all(
    model: SATRN, data: RenderedWords | LmdbWords, batch_size: int = 500, degrees: float = 0.0
) -> tuple[list[str], list[str]]:
    """Readings and labels of a data set, optionally rotated; the model's mode is restored."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    readings, labels = [], []
    for images, words in data.batches(batch_size):
        images = images.to(device, non_blocking=True)
        if degrees:
            images = rotate_words(images, degrees)
        images = normalise(images, model.cfg).contiguous(memory_format=torch.channels_last)
        readings += model.generate(images).texts
        labels += words
    model.train(was_training)
    return readings, labels


def correct(
    model: SATRN,
    data: RenderedWords | LmdbWords,
    batch_size: int = 500,
    protocol: str = "case-insensitive",
    degrees: float = 0.0,
) -> np.ndarray:
    """Whether each word was read, bool [N]; see `comparable` for the protocol.

    A word of which the protocol compares nothing (punctuation alone) is never read, whatever the model says.

    Raises:
        ValueError: an empty data set.
    """
    readings, labels = read_all(model, data, batch_size, degrees)
    if not labels:
        raise ValueError("cannot evaluate an empty data set")
    reads, wanted = ([comparable(text, protocol) for text in texts] for texts in (readings, labels))
    return np.array([read == label != "" for read, label in zip(reads, wanted, strict=True)])


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Words that only one of two models read, and the exact two-sided p-value of equal accuracy.

    Args:
        first: whether each word was read, bool [N].
        second: the same words by the other model.

    Raises:
        ValueError: different numbers of words.
    """
    if len(first) != len(second):
        raise ValueError(f"both models must have read the same words, got {len(first)} and {len(second)}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    p = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": float(f"{p:.3g}")}


def evaluate_rotation(
    model: SATRN, data: RenderedWords | LmdbWords, angles: Iterable[float], batch_size: int = 500
) -> pd.DataFrame:
    """Word accuracy by angle.

    Args:
        model: the model to evaluate.
        data: upright words.
        angles: degrees by which all words are rotated (anticlockwise), edges repeated.
        batch_size: words per batch.

    Returns:
        Columns angle, n, accuracy (0 .. 1).
    """
    lines = []
    for angle in angles:
        hits = correct(model, data, batch_size, degrees=float(angle))
        lines.append({"angle": float(angle), "n": len(hits), "accuracy": float(hits.mean())})
    return pd.DataFrame(lines)


@torch.no_grad()
def aspect_ratios(model: SATRN, images: Tensor, batch_size: int = 500) -> Tensor:
    """A2DPE's ratio r = ||alpha||_1 / ||beta||_1 per image [B] (figure 7): low horizontal, high vertical words.

    Raises:
        ValueError: a network without A2DPE.
    """
    ratios = []
    for part in images.split(batch_size):
        encoded = model.encode(normalise(part, model.cfg))
        if encoded.alpha is None or encoded.beta is None:
            raise ValueError(f"aspect ratios need pos='a2dpe', got {model.cfg.pos!r}")
        ratios.append(encoded.alpha.float().sum(dim=1) / encoded.beta.float().sum(dim=1))
    return torch.cat(ratios)


def group_by_ratio(ratios: Sequence[float]) -> dict[str, int]:
    """The number of images in each of the paper's three groups."""
    r = np.asarray(ratios)
    return {"r < 0.6": int((r < 0.6).sum()), "0.6 .. 0.8": int(((r >= 0.6) & (r <= 0.8)).sum()),
            "r > 0.8": int((r > 0.8).sum())}  # fmt: skip


def line_jumps(attention: Tensor, steps: int) -> int:
    """How often the strongest row of one word's attention (steps, H', W') moves down, over its characters.

    A reader of two lines moves down once.
    """
    rows = attention[:steps].sum(dim=2).argmax(dim=1)
    return int((rows[1:] > rows[:-1]).sum())
