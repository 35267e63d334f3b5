"""Which data sets are needed, where they are looked for, and what to do if one is missing or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import joblib

from str_benchmark.data.lmdb_store import check_file
from str_benchmark.data.samples import WordDataset, decode_samples
from str_benchmark.data.sets import LIST, MEND, SETS, find_stores, open_set

CHUNK = 1000  # images of one task


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where (below the root), what to do if missing."""
    rows: list[tuple[str, ...]] = [("rendered words", "smoke, embedded, rendered", "made here", "", "yes", "", "")]
    for each in SETS.values():
        try:
            for path in find_stores(each.place(data_root)):
                if path.suffix != LIST:
                    check_file(path)
            found, mend = "yes", ""
        except FileNotFoundError:
            found, mend = "no", MEND
        except ValueError as error:
            found, mend = "damaged", str(error)
        size = each.what if each.n is None else f"{each.n:,} words, {each.what}"
        paper = each.folder.startswith(("training", "validation", "evaluation"))
        scale = each.scale or ("paper" if paper else "eval")
        where = each.place(data_root).relative_to(data_root)
        rows.append((each.name, scale, size, "its publishers'", found, str(where), mend))
    return rows


def verify(names: Sequence[str], data_root: Path, workers: int = 1) -> list[str]:
    """Decode every image of some sets (names or folders; none: all that are there) completely.

    Returns:
        a message for each broken image, with its LMDB and key, and one for each LMDB that lacks images or labels.

    Raises:
        FileNotFoundError: none of the sets is there.
    """
    if not names:
        names = [each.name for each in SETS.values() if each.place(data_root).is_dir()]
    if not names:
        raise FileNotFoundError(f"{data_root}: none of the data sets is here; `str-benchmark data` lists them")
    tasks, incomplete = [], []
    for name in names:
        for data in open_set(name, data_root, filter="off"):
            incomplete += [f"{data.path}: {data.report}"] if data.report.removed else []
            tasks += [joblib.delayed(_broken)(data, start) for start in range(0, len(data), CHUNK)]
    return incomplete + [line for found in joblib.Parallel(n_jobs=max(1, workers))(tasks) for line in found]


def _broken(data: WordDataset, start: int) -> list[str]:
    samples = [(data, index) for index in range(start, min(start + CHUNK, len(data)))]
    return decode_samples(samples, skip_broken=True).broken
