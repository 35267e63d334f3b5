"""Which data sets are needed, where they are looked for, and what to do where one is missing or damaged."""

from __future__ import annotations

from pathlib import Path

from str_benchmark.data.lmdb_store import check_file
from str_benchmark.data.sets import SETS, find_lmdbs


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where (below the root), what to do if missing."""
    rows: list[tuple[str, ...]] = [("rendered words", "smoke, embedded, rendered", "made here", "", "yes", "", "")]
    for each in SETS.values():
        try:
            for path in find_lmdbs(data_root / each.folder):
                check_file(path)
            found, mend = "yes", ""
        except FileNotFoundError:
            found, mend = "no", "put the released LMDB there"
        except ValueError as error:
            found, mend = "damaged", str(error)
        size = each.what if each.n is None else f"{each.n:,} words, {each.what}"
        rows.append((each.name, "paper", size, "its publishers'", found, each.folder, mend))
    return rows
