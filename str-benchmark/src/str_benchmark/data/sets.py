"""The paper's training and evaluation sets by name, and where they lie."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from str_benchmark.data.lmdb_store import LMDBDataset


@dataclass(frozen=True)
class WordSet:
    """A set in the layout of the released LMDBs; `n` is the number of its words where the name fixes it."""

    name: str
    folder: str
    n: int | None
    what: str


TRAINING = (
    WordSet("MJ", "training/MJ", None, "MJSynth, 8.9 M words"),
    WordSet("ST", "training/ST", None, "SynthText crops, 5.5 M words"),
)
VALIDATION = WordSet("validation", "validation", None, "union of the IC13, IC15, IIIT, SVT training sets")
EVALUATION = (
    WordSet("IIIT_3000", "evaluation/IIIT5k_3000", 3000, "regular"),
    WordSet("SVT_647", "evaluation/SVT", 647, "regular"),
    WordSet("IC03_860", "evaluation/IC03_860", 860, "regular"),
    WordSet("IC03_867", "evaluation/IC03_867", 867, "regular"),
    WordSet("IC13_857", "evaluation/IC13_857", 857, "regular"),
    WordSet("IC13_1015", "evaluation/IC13_1015", 1015, "regular"),
    WordSet("IC15_1811", "evaluation/IC15_1811", 1811, "irregular"),
    WordSet("IC15_2077", "evaluation/IC15_2077", 2077, "irregular"),
    WordSet("SVTP_645", "evaluation/SVTP", 645, "irregular"),
    WordSet("CUTE_288", "evaluation/CUTE80", 288, "irregular"),
)
COCO_TEXT = WordSet("COCO_Text", "evaluation/COCO-Text", None, "irregular")
SETS = {each.name: each for each in (*TRAINING, VALIDATION, *EVALUATION, COCO_TEXT)}


class Parts:
    """The LMDBs of one set in a row: samples are drawn from the set, however many files it lies in."""

    def __init__(self, parts: Sequence[LMDBDataset]):
        self.parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[LMDBDataset, int]:
        """The LMDB that a sample lies in, and its place there."""
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def take(self, fraction: float) -> Parts:
        """The first int(total * fraction) samples, as the released code takes a share."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected (0, 1], got {fraction}")
        count = int(len(self) * fraction)
        starts = [0, *self._ends][: len(self.parts)]
        return Parts([part.first(max(0, count - start)) for part, start in zip(self.parts, starts, strict=True)])


def find_lmdbs(folder: Path) -> list[Path]:
    """All LMDB folders at or below a folder, sorted; symbolic links are followed, hidden folders are not.

    FileNotFoundError where there is none.
    """
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads upwards, or twice to one place
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "data.mdb" in files:
            found.append(Path(here))
    found.sort()
    if not found:
        raise FileNotFoundError(f"{folder}: no LMDB at or below it (no data.mdb)")
    return found


def locate(name: str, data_root: Path) -> list[Path]:
    """The LMDBs of a set by name, or of a path.

    Raises:
        FileNotFoundError: the set is not below the data root; the message says where it was looked for.
    """
    if name in SETS:
        return find_lmdbs(Path(data_root) / SETS[name].folder)
    if not Path(name).exists():
        raise FileNotFoundError(f"{name}: neither a set ({', '.join(SETS)}) nor a folder")
    return find_lmdbs(Path(name))


def wanted(name: str, data_root: Path) -> tuple[str, str, bool]:
    """A set as a need of a run: what, the remedy, whether it is there."""
    if name not in SETS:
        return f"the set {name}", f"name a folder with an LMDB, or one of {', '.join(SETS)}", Path(name).exists()
    folder = Path(data_root) / SETS[name].folder
    try:
        find_lmdbs(folder)
    except FileNotFoundError:
        return f"the set {name} ({folder})", "put the released LMDB there", False
    return name, "", True


def open_set(name: str, data_root: Path, **options: Any) -> list[LMDBDataset]:
    """Data sets of all LMDBs of a set; options as for `LMDBDataset`."""
    return [LMDBDataset(path, **options) for path in locate(name, data_root)]
