"""Training and evaluation sets by name, and where they are: the paper's LMDBs, PARSeq's, and Union14M's lists."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from str_benchmark.data.annotated import AnnotatedDataset
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.names import UNION14M
from str_benchmark.data.samples import WordDataset

LIST = ".jsonl"
MEND = "put the released set there"


@dataclass(frozen=True)
class WordSet:
    """A set and the folders below the data root that may hold it."""

    name: str
    folder: str
    """in the layout of the paper's released LMDBs, or of the only release"""
    n: int | None
    """words, where the name fixes their number"""
    what: str
    parseq: str = ""
    """in the layout of PARSeq's release"""
    scale: str = ""
    """the scale that reads it, if it is not paper"""

    def place(self, data_root: Path) -> Path:
        """Where it is looked for: PARSeq's folder if only that exists, else the first one."""
        first, second = Path(data_root) / self.folder, Path(data_root) / self.parseq
        return second if self.parseq and second.is_dir() and not first.is_dir() else first


TRAINING = (
    WordSet("MJ", "training/MJ", None, "MJSynth, 8.9 M words", "train/synth/MJ"),
    WordSet("ST", "training/ST", None, "SynthText crops, 5.5 M words", "train/synth/ST"),
)
VALIDATION = WordSet("validation", "validation", None, "union of the IC13, IC15, IIIT, SVT training sets", "val")
EVALUATION = (
    WordSet("IIIT_3000", "evaluation/IIIT5k_3000", 3000, "regular", "test/IIIT5k"),
    WordSet("SVT_647", "evaluation/SVT", 647, "regular", "test/SVT"),
    WordSet("IC03_860", "evaluation/IC03_860", 860, "regular"),
    WordSet("IC03_867", "evaluation/IC03_867", 867, "regular"),
    WordSet("IC13_857", "evaluation/IC13_857", 857, "regular", "test/IC13_857"),
    WordSet("IC13_1015", "evaluation/IC13_1015", 1015, "regular", "test/IC13_1015"),
    WordSet("IC15_1811", "evaluation/IC15_1811", 1811, "irregular", "test/IC15_1811"),
    WordSet("IC15_2077", "evaluation/IC15_2077", 2077, "irregular", "test/IC15_2077"),
    WordSet("SVTP_645", "evaluation/SVTP", 645, "irregular", "test/SVTP"),
    WordSet("CUTE_288", "evaluation/CUTE80", 288, "irregular", "test/CUTE80"),
)
OTHERS = (
    WordSet("COCO_Text", "evaluation/COCO-Text", None, "irregular", "test/COCOv1.4"),
    WordSet(
        "IC03_train",
        "evaluation/IC03_train",
        1156,
        "ICDAR 2003's training photographs; see create-lmdb",
        scale="icdar2003",
    ),
    WordSet("IC13_1095", "evaluation/IC13_1095", 1095, "regular", "test/IC13_1095"),
    WordSet("ArT", "test/ArT", None, "irregular"),
    WordSet("Uber", "test/Uber", None, "irregular"),
    *(
        WordSet(name, f"Union14M-L/Union14M-Benchmarks/{name.removeprefix('Union14M_')}", None, "irregular")
        for name in UNION14M
    ),
)
SETS = {each.name: each for each in (*TRAINING, VALIDATION, *EVALUATION, *OTHERS)}


class Parts:
    """The stores of one set, concatenated: samples are drawn from the set, whatever its number of files."""

    def __init__(self, parts: Sequence[WordDataset]):
        self.parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[WordDataset, int]:
        """The store that contains a sample, and the index there."""
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def take(self, fraction: float) -> Parts:
        """The first int(total * fraction) samples, as the released code takes a share."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected (0, 1], got {fraction}")
        count = int(len(self) * fraction)
        starts = [0, *self._ends][: len(self.parts)]
        return Parts([part.first(max(0, count - start)) for part, start in zip(self.parts, starts, strict=True)])


def find_stores(folder: Path) -> list[Path]:
    """All LMDB folders at or below a folder, or else all .jsonl lists, sorted; a .jsonl file is its own store.

    Symbolic links are followed, hidden folders are not. FileNotFoundError if there is none.
    """
    if folder.suffix == LIST and folder.is_file():
        return [folder]
    found, lists, seen = [], [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link upwards, or a second link to one place
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "data.mdb" in files:
            found.append(Path(here))
        lists += [Path(here) / name for name in files if name.endswith(LIST)]
    if not found and not lists:
        raise FileNotFoundError(f"{folder}: no LMDB at or below it (no data.mdb), and no list (.jsonl)")
    return sorted(found or lists)


def locate(name: str, data_root: Path) -> list[Path]:
    """The stores of a set by name, or of a path.

    Raises:
        FileNotFoundError: the set is not below the data root; the message says where it was looked for.
    """
    if name in SETS:
        return find_stores(SETS[name].place(data_root))
    if not Path(name).exists():
        raise FileNotFoundError(f"{name}: neither a set ({', '.join(SETS)}) nor a folder or list")
    return find_stores(Path(name))


def wanted(name: str, data_root: Path) -> tuple[str, str, bool]:
    """A set as a need of a run: what, the remedy, whether it is there."""
    if name not in SETS:
        return (
            f"the set {name}",
            f"name a folder with an LMDB, a .jsonl list, or one of {', '.join(SETS)}",
            Path(name).exists(),
        )
    folder = SETS[name].place(data_root)
    try:
        find_stores(folder)
    except FileNotFoundError:
        return f"the set {name} ({folder})", MEND, False
    return name, "", True


def open_set(name: str, data_root: Path, **options: Any) -> list[WordDataset]:
    """Data sets of all stores of a set; options as for `WordDataset`."""
    kinds = {LIST: AnnotatedDataset}
    return [kinds.get(path.suffix, LMDBDataset)(path, **options) for path in locate(name, data_root)]
