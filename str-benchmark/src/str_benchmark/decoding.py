"""Decoding of CTC outputs: the best path, and the best labellings by prefix beam search."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from str_benchmark.tokenizers import BLANK, CTCTokenizer

Beams = dict[tuple[int, ...], tuple[float, float]]  # prefix: log P(ends in a blank), log P(ends in its last character)

MINUS_INFINITY = float("-inf")


def ctc_greedy(log_probs: Tensor, charset: str) -> list[str]:
    """Best path: the best class of each column, repeats dropped, then blanks.

    Args:
        log_probs: (B, T, K), K = len(charset) + 1; anything with the same order will do (logits, probabilities).
        charset: characters of classes 1 .. K-1, or a preset.
    """
    return CTCTokenizer(charset).decode(log_probs)[0]


def ctc_beam_search(
    log_probs: Tensor, charset: str, beam: int = 10, per_column: int | None = None
) -> list[list[tuple[str, float]]]:
    """Labellings by their total probability over all alignments (prefix beam search).

    Args:
        log_probs: (B, T, K) log-probabilities, normalised over K.
        charset: characters of classes 1 .. K-1, or a preset.
        beam: prefixes kept after each column, at least 1.
        per_column: number of best classes of a column that are considered; None: all.

    Returns:
        for each image at most `beam` pairs (text, log-probability), the best first.

    Raises:
        ValueError: a wrong shape, probabilities that do not sum to 1, NaN, or beam or per_column < 1.
    """
    tokenizer = CTCTokenizer(charset)
    if log_probs.ndim != 3 or log_probs.shape[-1] != tokenizer.num_classes:
        raise ValueError(f"log_probs: expected (B, T, {tokenizer.num_classes}), got {tuple(log_probs.shape)}")
    if beam < 1:
        raise ValueError(f"beam: expected 1 or more, got {beam}")
    if per_column is not None and per_column < 1:
        raise ValueError(f"per_column: expected 1 or more, got {per_column}")
    columns = log_probs.detach().double().cpu().numpy()
    sums = np.exp(columns).sum(-1)
    if not np.allclose(sums, 1, atol=1e-3):
        raise ValueError(f"log_probs: expected columns that sum to 1, got sums of {sums.min():.4g} .. {sums.max():.4g}")
    return [
        [
            ("".join(tokenizer.charset[k - 1] for k in prefix), score)
            for prefix, score in _search(image, beam, per_column)
        ]
        for image in columns
    ]


def _search(columns: np.ndarray, beam: int, per_column: int | None) -> list[tuple[tuple[int, ...], float]]:
    """Prefixes (class indices) with log-probabilities, of one image's columns (T, K)."""
    beams: Beams = {(): (0.0, MINUS_INFINITY)}
    for column in columns:
        grown: Beams = {}
        classes = np.argsort(column)[::-1][:per_column].tolist()

        def add(
            prefix: tuple[int, ...], blank: float = MINUS_INFINITY, char: float = MINUS_INFINITY, into: Beams = grown
        ) -> None:
            if blank == char == MINUS_INFINITY:
                return  # no alignment leads here
            old = into.get(prefix, (MINUS_INFINITY, MINUS_INFINITY))
            into[prefix] = (_log_add(old[0], blank), _log_add(old[1], char))

        for prefix, (blank, char) in beams.items():
            total = _log_add(blank, char)
            for k in classes:
                p = float(column[k])
                if k == BLANK:
                    add(prefix, blank=total + p)
                elif prefix and k == prefix[-1]:
                    add(prefix, char=char + p)  # the same character goes on
                    add((*prefix, k), char=blank + p)  # a second one needs a blank between
                else:
                    add((*prefix, k), char=total + p)
        ranked = sorted(grown.items(), key=lambda item: _log_add(*item[1]), reverse=True)
        beams = dict(ranked[:beam])
    return [(prefix, _log_add(*scores)) for prefix, scores in beams.items()]


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == MINUS_INFINITY else a + float(np.log1p(np.exp(b - a)))
