"""Which data sets are needed, where they are looked for, and how many words they must have."""

from __future__ import annotations

from pathlib import Path

TEST_FOLDERS = {
    "IIIT5K": ("IIIT5k_3000", 3000),
    "SVT": ("SVT", 647),
    "IC03": ("IC03_867", 867),
    "IC13": ("IC13_1015", 1015),
    "IC15": ("IC15_2077", 2077),
    "SVTP": ("SVTP", 645),
    "CT80": ("CUTE80", 288),
}
TRAIN_SIZES = {"MJ": "8.9 M words", "ST": "5.5 M to 7 M words"}
HOW = "put the LMDB there"


def test_folder(root: Path, name: str) -> Path:
    """Of a test set: the benchmark's folder, else the name itself (own sets)."""
    return root / "evaluation" / TEST_FOLDERS.get(name, (name, 0))[0]


def inventory(root: Path) -> list[tuple[str, str, str, str, str, str, str]]:
    """Rows: name, scale, size, licence, found, where (below the root), what to do if missing."""
    rows = [("rendered words", "smoke, embedded, rendered", "made here", "", "yes", "", "")]
    wanted = [(f"training/{name}", name, size) for name, size in TRAIN_SIZES.items()]
    wanted += [(f"evaluation/{folder}", name, f"{count:,} words") for name, (folder, count) in TEST_FOLDERS.items()]
    wanted.append(("evaluation/MULTI_LINE", "MULTI_LINE", "own crops"))
    for where, name, size in wanted:
        found = (root / where / "data.mdb").is_file()
        rows.append((name, "paper", size, "its publishers'", "yes" if found else "no", where, "" if found else HOW))
    return rows
