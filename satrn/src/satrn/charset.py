"""Between text and class numbers: 0 ends a word, 1 is an unknown character, the charset follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

END, UNKNOWN, FIRST = 0, 1, 2
IGNORED = -100


class Tokenizer:
    """Text to targets and back; no character has a special meaning (a label may contain "[s]" or any metacharacter).

    Args:
        charset: different characters.
    """

    def __init__(self, charset: str):
        self.charset = charset
        self.number = {character: FIRST + i for i, character in enumerate(charset)}

    def encode(self, labels: Sequence[str], max_length: int, unknown: str = "error") -> Tensor:
        """Targets int64 [B, longest + 1]: characters, end, then `IGNORED`.

        Args:
            labels: words.
            max_length: maximal number of targets of a word, including its end.
            unknown: error, or "class" to map characters outside the charset to class 1.

        Raises:
            ValueError: no labels; an unknown character; a label that is empty or too long; another `unknown`.
        """
        if unknown not in ("error", "class"):
            raise ValueError(f"unknown must be error or class, got {unknown!r}")
        if not labels:
            raise ValueError("labels must not be empty")
        targets = torch.full((len(labels), max(map(len, labels)) + 1), IGNORED)
        for row, label in enumerate(labels):
            if not 0 < len(label) < max_length:
                raise ValueError(f"label {label!r} must have 1 to {max_length - 1} characters, got {len(label)}")
            strangers = [character for character in label if character not in self.number]
            if strangers and unknown == "error":
                raise ValueError(f"label {label!r}: character {strangers[0]!r} is not in the charset")
            numbers = [self.number.get(character, UNKNOWN) for character in label]
            targets[row, : len(label) + 1] = torch.tensor([*numbers, END])
        return targets

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of class numbers [B, L] up to the first end; an unknown character becomes U+FFFD."""
        names = ["", "\ufffd", *self.charset]
        texts = []
        for row in ids.tolist():
            end = row.index(END) if END in row else len(row)
            texts.append("".join(names[number] for number in row[:end]))
        return texts
