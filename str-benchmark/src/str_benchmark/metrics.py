"""Word accuracy, normalised edit similarity and the statistics of comparisons (sections 4.1, 4.4): plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from str_benchmark.charset import normalise


def correct_words(predictions: Sequence[str], labels: Sequence[str], test_charset: str = "36") -> np.ndarray:
    """Which predictions equal their labels on the test alphabet, (n,) bool.

    A label without any test character never counts as read: otherwise an empty prediction would match it.

    Raises:
        ValueError: an empty set, or sequences of different lengths.
    """
    if not labels or len(predictions) != len(labels):
        raise ValueError(f"expected as many predictions as labels, one or more, got {len(predictions)}, {len(labels)}")
    texts, targets = ([normalise(text, test_charset) for text in each] for each in (predictions, labels))
    return np.array([text == target != "" for text, target in zip(texts, targets, strict=True)])


def word_accuracy(predictions: Sequence[str], labels: Sequence[str], test_charset: str = "36") -> float:
    """Share of words read without a mistake, in [0, 1]."""
    return float(correct_words(predictions, labels, test_charset).mean())


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def edit_similarity(prediction: str, label: str) -> float:
    """1 - Levenshtein / longer length; 0 when either is empty, even both (ICDAR 2019)."""
    if not prediction or not label:
        return 0.0
    return 1 - levenshtein(prediction, label) / max(len(prediction), len(label))


def ned(predictions: Sequence[str], labels: Sequence[str], test_charset: str = "36") -> float:
    """Mean edit similarity on the test alphabet, in [0, 1]; higher is better."""
    if not labels or len(predictions) != len(labels):
        raise ValueError(f"expected as many predictions as labels, one or more, got {len(predictions)}, {len(labels)}")
    pairs = zip(predictions, labels, strict=True)
    return float(np.mean([edit_similarity(normalise(p, test_charset), normalise(t, test_charset)) for p, t in pairs]))


def total_accuracy(counts: Mapping[str, tuple[int, int]], sets: Sequence[str]) -> tuple[float, int]:
    """Accuracy over the union of sets (count-weighted, not the mean of the columns) and its n.

    Args:
        counts: set name: (n, correct).
        sets: the union's parts; the paper's seven hold 8,539 words.

    Raises:
        ValueError: a part that was not evaluated, or no words at all.
    """
    missing = [name for name in sets if name not in counts]
    if missing or not sets:
        raise ValueError(f"the total needs {', '.join(sets) or 'sets'}; not evaluated: {', '.join(missing)}")
    n = sum(counts[name][0] for name in sets)
    if not n:
        raise ValueError(f"the total needs words; {', '.join(sets)} hold none")
    return sum(counts[name][1] for name in sets) / n, n


def bootstrap_interval(
    correct: np.ndarray, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the accuracy over resampled words.

    Args:
        correct: (n,) bool.
        seed: seed of the resampling.
        resamples: number of resamples.
        level: confidence level, in (0, 1).
    """
    correct = np.asarray(correct, dtype=bool)
    if correct.ndim != 1 or not len(correct):
        raise ValueError(f"correct: expected (n,) with n >= 1, got {correct.shape}")
    hits = np.random.default_rng(seed).binomial(len(correct), correct.mean(), resamples)  # = resampling n words
    low, high = np.quantile(hits / len(correct), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Exact McNemar test of two models on the same words: only words that exactly one of them reads count.

    Args:
        a: which words the first model reads, (n,) bool.
        b: the same for the second.

    Returns:
        only_a, only_b, p_value (two-sided; 1 if the models never differ).
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two vectors of one length, got {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": float(p)}


def failure_intersection(correct: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Words that no model reads (section 4.5), and what independent models of these accuracies would miss.

    Independence is assumed within each set: otherwise sets of different difficulty would look like a common weakness.

    Args:
        correct: of each set, (models, n) bool, the same models in each.

    Returns:
        shares of all words: missed_by_all, expected (in each set the product of the error rates), read_by_all.
    """
    parts = [np.asarray(part, dtype=bool) for part in correct.values()]
    if not parts or any(part.ndim != 2 or not part.size or len(part) != len(parts[0]) for part in parts):
        raise ValueError(f"correct: expected (models, n) of each set, got {[part.shape for part in parts]}")
    n = sum(part.shape[1] for part in parts)
    return {
        "missed_by_all": sum(int((~part).all(0).sum()) for part in parts) / n,
        "expected": sum(part.shape[1] * float((1 - part.mean(1)).prod()) for part in parts) / n,
        "read_by_all": sum(int(part.all(0).sum()) for part in parts) / n,
    }
