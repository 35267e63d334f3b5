"""The paper's training and evaluation sets by name, and where they lie."""

from __future__ import annotations

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


def find_lmdbs(folder: Path) -> list[Path]:
    """All LMDB folders at or below a folder, sorted. FileNotFoundError where there is none."""
    found = sorted(path.parent for path in Path(folder).rglob("data.mdb"))
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


def open_set(name: str, data_root: Path, **options: Any) -> list[LMDBDataset]:
    """Data sets of all LMDBs of a set; options as for `LMDBDataset`."""
    return [LMDBDataset(path, **options) for path in locate(name, data_root)]
