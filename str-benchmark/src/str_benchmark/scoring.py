"""From a model's readings to the metrics of a record."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from shared_utils.logging import get_logger
from shared_utils.runlog import Outcome
from str_benchmark.data import names
from str_benchmark.data.filters import by_rule
from str_benchmark.data.samples import WordDataset
from str_benchmark.data.sets import SETS, Parts
from str_benchmark.evaluation import Reading, evaluate, latency_ms, per_word
from str_benchmark.metrics import total_accuracy
from str_benchmark.models import Recognizer, count_parameters
from str_benchmark.models.inference import for_inference
from str_benchmark.settings import Settings

logger = get_logger("str-benchmark")


def score(
    model: Recognizer,
    s: Settings,
    sets: dict[str, list[WordDataset]],
    skip_broken: bool = False,
    *,
    engine: str = "torch",
    words: Path | None = None,
) -> Outcome:
    """Metrics of the tables: every set, their groups, time and parameters. Accuracies, NED and other shares in %.

    Args:
        model: the model, used in its fastest form.
        s: alphabets, padding, and the sets of the groups.
        sets: by name, as `Source.for_evaluation` opens them.
        skip_broken: skip broken images.
        engine: engine for reading, see `for_inference`.
        words: CSV to write, a line for each word.
    """
    reader = for_inference(model, engine)
    frame, correct, readings = evaluate(
        reader, sets, test_charset=s.test_characters, pad=s.pad, skip_broken=skip_broken
    )
    if words is not None:
        per_word(correct, readings).to_csv(words, index=False)
    counts = {row.set: (row.n, row.correct) for row in frame.itertuples()}
    metrics = {row.set.replace("-", "_"): 100 * row.accuracy for row in frame.itertuples()}
    groups = {
        "total_accuracy": s.regular + s.irregular,
        "regular_accuracy": s.regular,
        "irregular_accuracy": s.irregular,
        "in_distribution": names.IN_DISTRIBUTION,
        "out_distribution": names.OUT_OF_DISTRIBUTION,
        "combined_accuracy": names.each_word_once(list(counts)),
    }
    details = {"n": {row.set: row.n for row in frame.itertuples()}}
    for name, parts in groups.items():
        if parts and all(part in counts for part in parts):
            accuracy, details["n"][name] = total_accuracy(counts, parts)
            metrics[name] = 100 * accuracy
    if "total_accuracy" in metrics:
        logger.info("total accuracy %.2f %% of n = %d", metrics["total_accuracy"], details["n"]["total_accuracy"])
    metrics["ned"] = 100 * float(np.average(frame.ned, weights=frame.n))
    metrics["time_ms"] = latency_ms(reader)
    metrics["params_M"] = count_parameters(model) / 1e6
    shares = [reading.blank_share for reading in readings.values() if reading.blank_share is not None]
    if shares:
        metrics["blank_share"] = 100 * float(np.average(shares, weights=frame.n))
    details["read"] = {name: _first_words(reading) for name, reading in readings.items()}
    details["correct"] = {name: np.packbits(hits).tobytes().hex() for name, hits in correct.items()}
    details["intervals"] = {row.set: [round(100 * row.low, 2), round(100 * row.high, 2)] for row in frame.itertuples()}
    details["by_rule"] = {name: by_rule(name, readings[name].written, hits) for name, hits in correct.items()}
    details["by_rule"] = {name: found for name, found in details["by_rule"].items() if found}
    details["empty_labels"] = {row.set: row.empty_labels for row in frame.itertuples() if row.empty_labels}
    evaluated = [described(name, Parts(parts)) for name, parts in sets.items()]
    return Outcome(metrics, details, {"evaluation": evaluated}, caveats=_caveats(frame))


def _caveats(frame: pd.DataFrame) -> list[str]:
    """Why figures cannot be compared with published ones: skipped files, sets whose size does not fit their name."""
    found = [f"{row.broken} broken images of {row.set} skipped" for row in frame.itertuples() if row.broken]
    sizes = {row.set: row.n + row.broken for row in frame.itertuples() if row.set in SETS and SETS[row.set].n}
    other = [f"{name} {n:,} of {SETS[name].n:,}" for name, n in sizes.items() if n != SETS[name].n]
    return [*found, *(["other sets than the paper's: " + ", ".join(other)] if other else [])]


def _first_words(reading: Reading, n: int = 4) -> list[tuple[str, float]]:
    """Texts and confidences of a set's first images, for the sheet."""
    return [(text, round(p, 3)) for text, p in zip(reading.texts[:n], reading.confidences[:n], strict=True)]


def described(name: str, data: Parts) -> dict:
    """Which samples a run read: a checksum of their numbers and of each file's size."""
    digest = hashlib.sha256()
    for part in data.parts:
        digest.update(part.indices.tobytes() + str(part.size).encode())
    total = sum(part.total for part in data.parts)
    return {"name": name, "total": total, "used": len(data), "sha256": digest.hexdigest()[:16]}
