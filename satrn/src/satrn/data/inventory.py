"""Which data sets are needed, where they are looked for, and how many words they must have.

Three released layouts are recognised as unpacked: the STR benchmark's (training/, evaluation/), PARSeq's (train/synth,
train/real, test/) and Union14M's as LMDBs (Union14M-L-LMDB-Filtered/, u14m/).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from satrn.data.words_lmdb import LmdbWords, lmdb_folders
from satrn.settings import Settings
from shared_utils.images import BrokenFile
from shared_utils.logging import progress
from shared_utils.preflight import Need

TRAIN_SIZES = {"MJ": 8_919_000, "ST": 5_522_000}
TEST_SIZES = {"IIIT5K": 3000, "SVT": 647, "IC03": 867, "IC13": 1015, "IC15": 2077, "SVTP": 645, "CT80": 288}
NAMES = {
    "IIIT5K": ("IIIT5k_3000", "IIIT5k"),
    "IC03": ("IC03_867",),
    "IC13": ("IC13_1015",),
    "IC15": ("IC15_2077",),
    "CT80": ("CUTE80",),
}
TRAIN_FOLDERS = ("training", "train", "train/synth", "train/real", "Union14M-L-LMDB-Filtered")
TEST_FOLDERS = ("evaluation", "test", "u14m")


def training_folder(root: Path, name: str) -> Path:
    """Where a training set (released or your own) is below a data root, or where it is expected first."""
    return _find(root, TRAIN_FOLDERS, (name,))


def test_folder(root: Path, name: str) -> Path:
    """Where a test set (released or your own) is below a data root, or where it is expected first."""
    return _find(root, TEST_FOLDERS, NAMES.get(name, (name,)))


def _find(root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    places = [Path(root) / folder / name for name in names for folder in folders]
    return next((place for place in places if place.is_dir() and lmdb_folders(place)), places[0])


def wanted(s: Settings, root: Path) -> dict[str, Path]:
    """Folders of all sets that a run reads, by name."""
    if s.dataset != "lmdb":
        return {}
    train = {f"training set {name}": training_folder(root, name) for name in s.train_sets}
    return train | {f"test set {name}": test_folder(root, name) for name in s.test_sets}


def needs(s: Settings, root: Path) -> Iterator[Need]:
    """Every set that a run reads, including those of the evaluation."""
    for name, place in wanted(s, root).items():
        yield Need(f"{name} ({place})", "put its LMDB there", bool(lmdb_folders(place)))


def caveats(train: dict, tests: list[dict], s: Settings) -> list[str]:
    """Why figures on these sets cannot be compared with the paper's, from what a run log says about them."""
    found = []
    for name, record in zip(s.train_sets, train["sets"], strict=True):
        if record["words"] < 0.9 * TRAIN_SIZES.get(name, 0):
            found.append(f"{record['words']:,} of some {TRAIN_SIZES[name]:,} words of {name}")
    for name, record in zip(s.test_sets, tests, strict=True):
        if record["words"] != TEST_SIZES.get(name, record["words"]):
            found.append(f"{record['words']:,} of the paper's {TEST_SIZES[name]:,} words of {name}")
    for record in [*train["sets"], *tests]:
        if record.get("skipped"):
            found.append(f"{record['skipped']:,} broken words of {record['name']} skipped")
    return found


def inventory(root: Path) -> list[tuple[str, str, str, str, str, str, str]]:
    """Rows: name, scale, size, licence, found, where (below the root), what to do if missing."""
    rows = [("rendered words", "smoke, embedded, rendered", "made here", "", "yes", "", "")]
    places = [(name, training_folder(root, name), f"{size / 1e6:.1f} M words") for name, size in TRAIN_SIZES.items()]
    places += [(name, test_folder(root, name), f"{size:,} words") for name, size in TEST_SIZES.items()]
    places += [("multi_line", training_folder(root, "multi_line"), "`satrn render` writes it")]
    places += [("MULTI_LINE", test_folder(root, "MULTI_LINE"), "own crops")]
    real = [("scene", training_folder(root, "scene"), "`satrn render` writes it")]
    real += [("IC03_train", test_folder(root, "IC03_train"), "1,156 words of ICDAR 2003's training photographs")]
    scales = ["paper"] * len(places) + ["icdar2003"] * len(real)
    for scale, (name, place, size) in zip(scales, places + real, strict=True):
        found = bool(lmdb_folders(place))
        where = str(place.relative_to(root))
        remedy = "" if found else "put the LMDB there"
        rows.append((name, scale, size, "its publishers'", "yes" if found else "no", where, remedy))
    return rows


def verify(root: Path) -> dict[str, tuple[int, list[str]]]:
    """Decode every word below a data root: by LMDB, the number of words and a message for each broken one.

    Raises:
        FileNotFoundError: there is no LMDB.
    """
    folders = lmdb_folders(root)
    if not folders:
        raise FileNotFoundError(f"{root}: no LMDB below this folder")
    checked = {}
    for folder in folders:
        words, broken = LmdbWords(folder, (4, 4)), []
        with progress() as bar:
            for index in bar.track(range(len(words)), description=str(folder.relative_to(root))):
                try:
                    words[index]
                except (BrokenFile, ValueError) as error:
                    broken.append(str(error))
        checked[str(folder.relative_to(root))] = len(words), broken
    return checked
