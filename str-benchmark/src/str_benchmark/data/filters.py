"""Which labels are kept: for training by alphabet and length, for evaluation by the rules of a set's subsets."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from str_benchmark.charset import compatible, resolve_charset
from str_benchmark.data.names import wholes_of

FILTERS = ("report", "strip", "reference", "off")
EXAMPLES = 5


@dataclass
class FilterReport:
    """What a filter removed, rule by rule, with examples."""

    total: int
    kept: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def remove(self, rule: str, what: str) -> None:
        self.removed[rule] = self.removed.get(rule, 0) + 1
        shown = self.examples.setdefault(rule, [])
        if len(shown) < EXAMPLES:
            shown.append(what)

    def __str__(self) -> str:
        lines = [f"{self.kept:,} of {self.total:,} kept"]
        for rule, count in sorted(self.removed.items()):
            lines.append(f"{count:,} {rule}: " + ", ".join(map(repr, self.examples[rule])))
        return "; ".join(lines)


class LabelFilter:
    """Judges and cleans labels.

    Args:
        charset: preset or characters.
        case_sensitive: False lower-cases labels first; None: True where the charset has upper-case letters.
        max_length: longest label kept.
        mode: "report" (drop empty, too long and unknown), "strip" (remove unknown characters, drop too long and
            empty labels; with nfkd and drop_whitespace as in PARSeq), "reference" (the released code's filter, quirks
            included: the alphabet is an unescaped regular expression, lower-casing comes before the test even where
            case counts, empty labels stay), "off" (keep all).
        columns: columns of a CTC network. A label needs one for each character and one between two equal ones; with
            fewer its loss is infinite and it would train nothing, so all modes but "off" drop it. None: no such limit.
        nfkd: replace characters outside the charset by their compatible ones first, see `charset.compatible`.
        drop_whitespace: remove all whitespace first.
    """

    def __init__(
        self,
        charset: str,
        case_sensitive: bool | None = None,
        max_length: int = 25,
        mode: str = "report",
        columns: int | None = None,
        nfkd: bool = False,
        drop_whitespace: bool = False,
    ):
        if mode not in FILTERS:
            raise ValueError(f"filter: expected one of {', '.join(FILTERS)}, got {mode!r}")
        if max_length < 1:
            raise ValueError(f"max_length: expected 1 or more, got {max_length}")
        self.charset, self.max_length, self.mode = resolve_charset(charset), max_length, mode
        self.columns, self.nfkd, self.drop_whitespace = columns, nfkd, drop_whitespace
        self.case_sensitive = any(map(str.isupper, self.charset)) if case_sensitive is None else case_sensitive
        inside = self.charset if mode == "reference" else re.escape(self.charset)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the unescaped form
                self._outside = re.compile(f"[^{inside}]")
        except re.error as error:
            raise ValueError(
                f"charset: {self.charset!r} is not a valid character class in the released code ({error}); "
                'use filter="report"'
            ) from error

    @property
    def settings(self) -> dict:
        """Everything that determines which labels are kept."""
        return {
            "charset": self.charset,
            "case_sensitive": self.case_sensitive,
            "max_length": self.max_length,
            "mode": self.mode,
            "columns": self.columns,
            "nfkd": self.nfkd,
            "drop_whitespace": self.drop_whitespace,
        }

    def broken_rule(self, label: str) -> str | None:
        """The rule that removes a label, or None if it is kept."""
        if self.mode == "off":
            return None
        label = self._tidy(label)
        if len(label) > self.max_length:
            return f"longer than {self.max_length}"
        if self.columns is not None and ctc_columns(self.clean(label)) > self.columns:
            return f"in need of more than the {self.columns} columns of this CTC network (a larger --width has more)"
        if self.mode == "reference":
            return "with unknown characters" if self._outside.search(label.lower()) else None
        label = self.clean(label) if self.mode == "strip" else self._cased(label)
        if not label:
            return "empty"
        return "with unknown characters" if self._outside.search(label) else None

    def clean(self, label: str) -> str:
        """The label in the form that is trained and compared: case applied, without characters outside the charset."""
        return self._outside.sub("", self._cased(self._tidy(label)))

    def _tidy(self, label: str) -> str:
        if self.drop_whitespace:
            label = "".join(label.split())
        return compatible(self._cased(label), self.charset) if self.nfkd else label

    def _cased(self, label: str) -> str:
        return label if self.case_sensitive else label.lower()


def ctc_columns(label: str) -> int:
    """Columns that CTC needs for a label: its characters, and a blank between two equal ones."""
    return len(label) + sum(a == b for a, b in itertools.pairwise(label))


def is_alphanumeric(label: str) -> bool:
    """Only ASCII letters and digits, at least one."""
    return label.isascii() and label.isalnum()


SUBSET_RULES: dict[str, Callable[[str], bool]] = {
    "IC13_1015": is_alphanumeric,
    "IC13_857": lambda label: is_alphanumeric(label) and len(label) >= 3,
    "IC03_867": lambda label: is_alphanumeric(label) and len(label) >= 3,
    "IC03_train_1097": is_alphanumeric,
    "IC03_train_936": lambda label: is_alphanumeric(label) and len(label) >= 3,
    "IC15_2077": lambda label: True,
}
"""subsets with a common name that follow from the label alone; IC03_860 and IC15_1811 are hand-made lists"""


def subset(labels: Sequence[str], rule: str) -> list[int]:
    """Indices of the labels that a rule keeps.

    Raises:
        ValueError: a subset that labels do not determine (IC03_860, IC15_1811): its list must come with the images.
    """
    if rule not in SUBSET_RULES:
        raise ValueError(f"rule: expected one of {', '.join(SUBSET_RULES)}, got {rule!r}; other subsets are lists")
    return [index for index, label in enumerate(labels) if SUBSET_RULES[rule](label)]


def by_rule(name: str, labels: Sequence[str], correct: np.ndarray) -> dict[str, tuple[int, int]]:
    """Scores of the subsets that follow from the labels alone: subset: (n, words read).

    Args:
        name: name of the set.
        labels: as they are written.
        correct: which of them were read, (n,) bool.
    """
    kept = {part: subset(labels, part) for part in SUBSET_RULES if name in wholes_of(part)}
    return {part: (len(indices), int(correct[indices].sum())) for part, indices in kept.items()}
