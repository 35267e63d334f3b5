"""The paper's protocol (section 4.1): greedy reading, words compared on the test alphabet, every score with its n."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from shared_utils.logging import get_logger
from str_benchmark.charset import resolve_charset
from str_benchmark.data.samples import WordDataset, decode_samples
from str_benchmark.data.sets import SETS
from str_benchmark.metrics import bootstrap_interval, correct_words, edit_similarity, normalise
from str_benchmark.models import Recognizer
from str_benchmark.reading import grouped, read_pixels
from str_benchmark.tokenizers import BLANK

logger = get_logger("str-benchmark")

BLANK_PLATEAU = 0.95  # share of blank columns above which a CTC model has learnt to say nothing


@dataclass
class Reading:
    """A model's readings of one set, in the set's order; broken images are skipped and named."""

    words: list[str]
    """where each word is: store and key"""
    written: list[str]
    """labels as the store has them"""
    texts: list[str]
    labels: list[str]
    """cleaned"""
    confidences: list[float]
    broken: list[str]
    blank_share: float | None
    """CTC: share of columns whose best class is the blank"""


def read(
    model: Recognizer, datasets: Sequence[WordDataset], *, pad: bool = False, batch_size: int = 256,
    skip_broken: bool = False,
) -> Reading:  # fmt: skip
    """Read whole data sets; with several ranks each reads its part, and all get everything."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    samples = [(data, index) for data in datasets for index in range(len(data))]
    parts: list[tuple] = []  # positions, texts, labels, confidences, blank shares, broken
    training = model.training
    model.eval()
    mine = range(rank, len(samples), world)
    for start in range(0, len(mine), batch_size):
        positions = mine[start : start + batch_size]
        loaded = decode_samples([samples[p] for p in positions], skip_broken)
        for group, pixels in grouped(model, loaded.pictures, pad):
            texts, confidences, probs = read_pixels(model, pixels)
            blanks = (probs.argmax(-1) == BLANK).float().mean(1).tolist()
            labels = [loaded.labels[k] for k in group]
            parts.append(([positions[loaded.kept[k]] for k in group], texts, labels, confidences, blanks, []))
        parts.append(([], [], [], [], [], loaded.broken))
    model.train(training)
    if world > 1:
        gathered: list = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = [part for each in gathered for part in each]
    columns = [[value for part in parts for value in part[number]] for number in range(6)]
    order = np.argsort(columns[0], kind="stable")
    texts, labels, confidences, blanks = ([column[i] for i in order] for column in columns[1:5])
    found = [samples[columns[0][i]] for i in order]
    words = [f"{data.path.name}/{data.key(index)}" for data, index in found]
    written = [data.text(index) for data, index in found]
    share = float(np.mean(blanks)) if model.config.pred == "CTC" and blanks else None
    return Reading(words, written, texts, labels, confidences, columns[5], share)


def evaluate(
    model: Recognizer,
    sets: Mapping[str, Sequence[WordDataset]],
    *,
    test_charset: str = "",
    pad: bool = False,
    skip_broken: bool = False,
    batch_size: int = 256,
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, Reading]]:
    """Score a model on sets.

    Args:
        model: a recognizer.
        sets: name: data sets, opened with filter "off" and the test charset.
        test_charset: characters that count; empty: the model's.
        pad: as in training.
        skip_broken: skip broken images; the log names them and the column `broken` counts them.
        batch_size: words at once.

    Returns:
        A frame with one row per set (set, n, correct, accuracy, low, high, ned, broken, empty_labels); which words
        were read (n,) bool; and the readings. `low`, `high`: 95 % bootstrap interval of the accuracy. `empty_labels`:
        labels without any of the test characters; they count as words that were not read.

    Raises:
        ValueError: no sets, an empty set, or one without any label on the test characters.
        BrokenFile: a broken image, unless skip_broken.
    """
    if not sets:
        raise ValueError("sets: expected one or more, got none")
    test_charset = resolve_charset(test_charset or model.config.charset)
    rows, correct, readings = [], {}, {}
    for name, datasets in sets.items():
        reading = read(model, datasets, pad=pad, batch_size=batch_size, skip_broken=skip_broken)
        hits = correct_words(reading.texts, reading.labels, test_charset)
        pairs = [
            (normalise(text, test_charset), normalise(label, test_charset))
            for text, label in zip(reading.texts, reading.labels, strict=True)
        ]
        low, high = bootstrap_interval(hits)
        similarity = float(np.mean([edit_similarity(*pair) for pair in pairs]))
        empty = sum(not label for _, label in pairs)
        if empty == len(hits):
            raise ValueError(nothing_to_compare(name, test_charset))
        rows.append((name, len(hits), int(hits.sum()), hits.mean(), low, high, similarity, len(reading.broken), empty))
        correct[name], readings[name] = hits, reading
        _warn(name, reading, len(hits), empty)
    columns = ["set", "n", "correct", "accuracy", "low", "high", "ned", "broken", "empty_labels"]
    return pd.DataFrame(rows, columns=columns), correct, readings


def nothing_to_compare(name: str, test_charset: str) -> str:
    """The message for a set whose script differs from the test characters."""
    return (
        f"{name}: no label has any of the {len(test_charset)} test characters {test_charset[:20]!r}...; "
        "use --test-charset to name those that count"
    )


def _warn(name: str, reading: Reading, n: int, empty: int) -> None:
    if empty:
        logger.warning("%s: %d labels have no test character; they count as not read", name, empty)
    expected = SETS[name].n if name in SETS else None
    if expected is not None and n != expected:
        logger.warning("%s has %d words, expected %d: this is another set of the same name", name, n, expected)
    for message in reading.broken[:20]:
        logger.warning("%s: skipped: %s", name, message)
    if reading.blank_share is not None and reading.blank_share > BLANK_PLATEAU:
        share = 100 * reading.blank_share
        logger.warning("%s: %.1f %% of the columns are blank: CTC has not left its plateau", name, share)


def per_word(correct: Mapping[str, np.ndarray], readings: Mapping[str, Reading]) -> pd.DataFrame:
    """A row for each word: set, word (its store and key), label (as written), read, confidence, correct."""
    parts = [
        pd.DataFrame(
            {
                "set": name,
                "word": reading.words,
                "label": reading.written,
                "read": reading.texts,
                "confidence": np.round(reading.confidences, 4),
                "correct": correct[name],
            }
        )
        for name, reading in readings.items()
    ]
    return pd.concat(parts, ignore_index=True)


def latency_ms(model: Recognizer, repeats: int = 10, warmup: int = 3) -> float:
    """Median milliseconds for one image, warm and synchronised; the attention head takes all its steps."""
    device, config = model.device, model.config
    image = torch.zeros(1, config.in_channels, *config.img_size, device=device)
    times = []
    training = model.training
    model.eval()
    with torch.inference_mode():
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            model(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    model.train(training)
    return float(np.median(times[warmup:]))
