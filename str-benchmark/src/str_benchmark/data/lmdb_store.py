"""Word images in LMDBs (keys image-%09d, label-%09d from 1, num-samples): written, checked, indexed, read lazily.

An environment is opened on first use, once per process and file, and closed before a fork (LMDB forbids sharing one),
so a data set may be handed to any kind of worker. The samples that a filter keeps are determined once per file and
settings, and cached next to the LMDB, or under ~/.cache if that folder is not writable.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image

from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from str_benchmark.data.filters import FilterReport, LabelFilter
from str_benchmark.data.samples import WordDataset

logger = get_logger("str-benchmark")

MAP_SIZE = 1 << 40  # address space, not disk
META = struct.Struct("<IIQQ")  # magic, version, address, map size; two databases of 48 bytes follow, then the last page
MAGIC = 0xBEEFC0DE
CACHE_VERSION = 1

_open: dict[str, tuple[lmdb.Environment, lmdb.Transaction]] = {}


def _close_all() -> None:
    for environment, transaction in _open.values():
        transaction.abort()
        environment.close()
    _open.clear()


os.register_at_fork(before=_close_all)


def _transaction(folder: str) -> lmdb.Transaction:
    if folder not in _open:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
        _open[folder] = environment, environment.begin(buffers=True)
    return _open[folder][1]


def check_file(folder: Path) -> Path:
    """The data file of an LMDB, complete according to its header.

    A truncated file must not be mapped: reading past its end kills the process (SIGBUS).

    Raises:
        FileNotFoundError: no data.mdb.
        ValueError: a file that is not an LMDB, or is shorter than its header says.
    """
    path = Path(folder) / "data.mdb"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: is not an LMDB (no data.mdb)")
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(200)
        if len(first) < 200 or META.unpack_from(first, 16)[0] != MAGIC:
            raise ValueError(f"{path}: not an LMDB file")
        page = struct.unpack_from("<I", first, 40)[0]  # page size: md_pad of the first database
        file.seek(page)
        second = file.read(200)
    newest = (0, 0)  # transaction, last page; LMDB reads the newer of its two meta pages
    for meta in (first, second):
        if len(meta) == 200 and META.unpack_from(meta, 16)[0] == MAGIC:
            last_page, transaction = struct.unpack_from("<QQ", meta, 16 + META.size + 2 * 48)
            newest = max(newest, (transaction, last_page))
    expected = (newest[1] + 1) * page
    if size < expected or len(second) < 200:
        raise ValueError(f"{path}: truncated: {size:,} bytes, its header says {max(expected, 2 * page):,}")
    return path


def write_lmdb(items: Iterable[tuple[bytes | Image.Image, str]], path: Path | str) -> int:
    """Write images (encoded bytes, or Pillow images as PNG) with labels into a new LMDB; returns their number.

    It is written next to its final place and renamed, so a kill leaves no partial file.

    Raises:
        FileExistsError: the path already exists.
        ValueError: no items; the error of an item, with nothing left behind.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        with lmdb.open(str(part), map_size=MAP_SIZE, sync=False) as environment:
            number = _write(environment, items)
            if not number:
                raise ValueError(f"{path}: no samples to write")
            environment.sync(True)
        (part / "lock.mdb").unlink(missing_ok=True)
        os.replace(part, path)
    finally:
        for left in part.glob("*") if part.exists() else ():
            left.unlink()
        if part.exists():
            part.rmdir()
    return number


def _write(environment: lmdb.Environment, items: Iterable[tuple[bytes | Image.Image, str]]) -> int:
    number, transaction = 0, environment.begin(write=True)
    for image, label in items:
        number += 1
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            image = buffer.getvalue()
        transaction.put(b"image-%09d" % number, image)
        transaction.put(b"label-%09d" % number, label.encode())
        if number % 10_000 == 0:
            transaction.commit()
            transaction = environment.begin(write=True)
    transaction.put(b"num-samples", str(number).encode())
    transaction.commit()
    return number


class LMDBDataset(WordDataset):
    """Samples of one LMDB, named by its folder; options as for `WordDataset`.

    Raises:
        FileNotFoundError, ValueError: no LMDB, a truncated one, one without samples or without num-samples.
    """

    def __init__(self, path: Path | str, *args: Any, **options: Any):
        super().__init__(path, *args, **options)
        data = check_file(self.path)
        self.total = self._count()
        self.indices, self.report = _cached_index(self.path, data, self.total, self.filter)

    def _count(self) -> int:
        value = _transaction(str(self.path)).get(b"num-samples")
        text = b"" if value is None else bytes(value)
        if not text.strip().isdigit():
            raise ValueError(f"{self.path}: num-samples is {text.decode(errors='replace') or 'missing'}")
        if int(text) == 0:
            raise ValueError(f"{self.path}: an empty LMDB (num-samples is 0)")
        return int(text)

    @property
    def size(self) -> int:
        """Bytes of the data file."""
        return (self.path / "data.mdb").stat().st_size

    def key(self, index: int) -> str:
        """Such as image-000000001."""
        return f"image-{self.indices[index]:09d}"

    def text(self, index: int) -> str:
        """The label as it was written."""
        value = _transaction(str(self.path)).get(b"label-%09d" % self.indices[index])
        if value is None:
            raise ValueError(f"{self.path}: label-{self.indices[index]:09d} is missing")
        return str(value, "utf-8")

    def encoded(self, index: int) -> bytes | memoryview | None:
        """The image's bytes."""
        return _transaction(str(self.path)).get(b"image-%09d" % self.indices[index])


def _cached_index(folder: Path, data: Path, total: int, rules: LabelFilter) -> tuple[np.ndarray, FilterReport]:
    """Kept sample numbers (from 1, uint32), from the cache or by reading every label."""
    about = data.stat()
    key = json.dumps([CACHE_VERSION, str(folder), about.st_size, about.st_mtime_ns, rules.settings])
    name = f"index-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    home = folder if os.access(folder, os.W_OK) else Path.home() / ".cache" / "str-benchmark" / "index"
    try:
        with np.load(home / name, allow_pickle=False) as content:
            return content["indices"], FilterReport(**json.loads(str(content["report"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s: unreadable index (%s), computed again", home / name, error)
    indices, report = _index(folder, total, rules)
    try:
        with whole_file(home / name) as temporary, open(temporary, "wb") as file:
            np.savez(file, indices=indices, report=json.dumps(vars(report)))
    except OSError as error:
        logger.warning("%s: the index cannot be cached (%s)", folder, error)
    return indices, report


def _index(folder: Path, total: int, rules: LabelFilter) -> tuple[np.ndarray, FilterReport]:
    """One walk over all labels in key order."""
    transaction, report = _transaction(str(folder)), FilterReport(total)
    pictured = _pictured(transaction, total)
    kept = np.zeros(total + 1, dtype=bool)
    seen = np.zeros(total + 1, dtype=bool)
    cursor = transaction.cursor()
    for key, value in cursor.iternext() if cursor.set_range(b"label-") else ():
        key = bytes(key)
        if not key.startswith(b"label-"):
            break
        number = int(key[6:]) if key[6:].isdigit() else 0
        if not 1 <= number <= total:
            continue
        seen[number] = True
        try:
            label = str(value, "utf-8")
        except UnicodeDecodeError:
            report.remove("with a label that is not UTF-8", f"label-{number:09d}")
            continue
        rule = "without an image" if pictured is not None and not pictured[number] else rules.broken_rule(label)
        if rule:
            report.remove(rule, label)
        else:
            kept[number] = True
    for absent in np.flatnonzero(~seen[1:]) + 1:
        report.remove("without a label", f"label-{absent:09d}")
    indices = np.flatnonzero(kept).astype(np.uint32)
    report.kept = len(indices)
    return indices, report


def _pictured(transaction: lmdb.Transaction, total: int) -> np.ndarray | None:
    """Which samples have an image; None if the number of entries shows that nothing is missing."""
    if transaction.stat()["entries"] >= 2 * total + 1:
        return None
    found = np.zeros(total + 1, dtype=bool)
    cursor = transaction.cursor()
    for key in cursor.iternext(values=False) if cursor.set_range(b"image-") else ():
        key = bytes(key)
        if not key.startswith(b"image-"):
            break
        number = int(key[6:]) if key[6:].isdigit() else 0
        found[number if number <= total else 0] = True
    return found
