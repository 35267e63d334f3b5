"""Strings to class indices and back, for both prediction heads (section 3.4)."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from str_benchmark.charset import resolve_charset

BLANK = 0  # CTC
GO, END = 0, 1  # attention: [GO] also pads, [s] ends a word


class _Tokenizer(ABC):
    """What both heads share: looking characters up, with errors that name character and label."""

    specials: int

    def __init__(self, charset: str):
        self.charset = resolve_charset(charset)
        self._index = {character: index for index, character in enumerate(self.charset, self.specials)}
        self.num_classes = len(self.charset) + self.specials

    def _lookup(self, label: str, max_length: int, unknown: str) -> list[int]:
        if unknown == "drop":
            label = "".join(character for character in label if character in self._index)
        elif unknown != "error":
            raise ValueError(f"unknown: expected 'error' or 'drop', got {unknown!r}")
        for character in label:
            if character not in self._index:
                raise ValueError(f"label {label!r}: character {character!r} is not in the charset {self.charset!r}")
        if len(label) > max_length:
            raise ValueError(f"label {label!r}: {len(label)} characters, max_length is {max_length}")
        return [self._index[character] for character in label]

    def _indices(self, values: Tensor) -> Tensor:
        """(B, T) class indices of indices or of probabilities (B, T, K)."""
        if values.ndim == 3 and values.is_floating_point():
            if values.shape[-1] != self.num_classes:
                raise ValueError(f"probs: expected (B, T, {self.num_classes}), got {tuple(values.shape)}")
            return values.argmax(-1)
        if values.ndim != 2 or values.is_floating_point():
            raise ValueError(f"expected (B, T) indices or (B, T, K) probs, got {tuple(values.shape)} {values.dtype}")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
            raise ValueError(f"indices: expected 0 .. {self.num_classes - 1}, got {values.min()} .. {values.max()}")
        return values

    def decode(self, values: Tensor) -> tuple[list[str], list[float]]:
        """Greedy texts with the confidence of each.

        Args:
            values: probabilities (B, T, K) float, or class indices (B, T) int (their confidence is 1).

        Returns:
            texts, and confidences in [0, 1] as section 4.1 of the reference's evaluation counts them.
        """
        texts = [self._text(row) for row in self._indices(values).tolist()]
        if values.ndim == 2:
            return texts, [1.0] * len(texts)
        return texts, [self._confidence(row) for row in values.detach().float().cpu()]

    @abstractmethod
    def _text(self, indices: Sequence[int]) -> str: ...

    @abstractmethod
    def _confidence(self, probs: Tensor) -> float: ...


class CTCTokenizer(_Tokenizer):
    """Class 0 is the blank, characters follow."""

    specials = 1

    def encode(self, labels: Sequence[str], max_length: int = 25, unknown: str = "error") -> tuple[Tensor, Tensor]:
        """Indices (B, max_length) int64, padded with 0, and lengths (B,) int64.

        Raises:
            ValueError: an unknown character (unless `unknown="drop"`), or a label longer than max_length.
        """
        ids = torch.zeros(len(labels), max_length, dtype=torch.int64)
        found = [self._lookup(label, max_length, unknown) for label in labels]
        for row, indices in zip(ids, found, strict=True):
            row[: len(indices)] = torch.tensor(indices, dtype=torch.int64)
        return ids, torch.tensor([len(indices) for indices in found], dtype=torch.int64)

    def _columns(self, indices: Sequence[int]) -> list[int]:
        """Columns that start a character: not blank, not a repeat of the previous column."""
        return [t for t, k in enumerate(indices) if k != BLANK and (t == 0 or k != indices[t - 1])]

    def _text(self, indices: Sequence[int]) -> str:
        return "".join(self.charset[indices[t] - 1] for t in self._columns(indices))

    def _confidence(self, probs: Tensor) -> float:
        return float(probs.amax(-1).prod())  # over all columns, blanks included

    def char_confidences(self, probs: Tensor) -> list[list[float]]:
        """For each text of `decode` one probability per character: the highest column of its run."""
        result = []
        for row in probs.detach().float().cpu():
            best, indices = row.amax(-1).tolist(), row.argmax(-1).tolist()
            starts = self._columns(indices)
            runs = [
                [best[t] for t in range(start, end) if indices[t] == indices[start]]
                for start, end in itertools.pairwise([*starts, len(indices)])
            ]
            result.append([max(run) for run in runs])
        return result


class AttnTokenizer(_Tokenizer):
    """Class 0 is [GO], class 1 the end [s], characters follow."""

    specials = 2

    def encode(self, labels: Sequence[str], max_length: int = 25, unknown: str = "error") -> tuple[Tensor, Tensor]:
        """[GO] characters [s], padded with [GO]: (B, max_length + 2) int64; lengths with [s]: (B,) int64.

        Raises:
            ValueError: an unknown character (unless `unknown="drop"`), or a label longer than max_length.
        """
        ids = torch.full((len(labels), max_length + 2), GO, dtype=torch.int64)
        found = [self._lookup(label, max_length, unknown) for label in labels]
        for row, indices in zip(ids, found, strict=True):
            row[1 : len(indices) + 2] = torch.tensor([*indices, END], dtype=torch.int64)
        return ids, torch.tensor([len(indices) + 1 for indices in found], dtype=torch.int64)

    def _steps(self, indices: Sequence[int]) -> list[int]:
        """Steps that output a character: before the first [s]; a [GO] outputs nothing."""
        end = indices.index(END) if END in indices else len(indices)
        return [t for t in range(end) if indices[t] != GO]

    def _text(self, indices: Sequence[int]) -> str:
        return "".join(self.charset[indices[t] - 2] for t in self._steps(indices))

    def _confidence(self, probs: Tensor) -> float:
        confidences = self.char_confidences(probs[None])[0]
        return float(torch.tensor(confidences).prod()) if confidences else 0.0

    def char_confidences(self, probs: Tensor) -> list[list[float]]:
        """For each text of `decode` the probability of every character."""
        best, indices = probs.detach().float().cpu().max(-1)
        return [
            [row[t] for t in self._steps(steps)] for row, steps in zip(best.tolist(), indices.tolist(), strict=True)
        ]


def make_tokenizer(pred: str, charset: str) -> CTCTokenizer | AttnTokenizer:
    """The tokenizer of a prediction stage, "CTC" or "Attn"."""
    heads: dict[str, type[CTCTokenizer] | type[AttnTokenizer]] = {"CTC": CTCTokenizer, "Attn": AttnTokenizer}
    return heads[pred](charset)
