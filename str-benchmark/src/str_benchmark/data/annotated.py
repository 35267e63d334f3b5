"""Image files listed in JSON lines, {"filename": ..., "text": ...} each: Union14M and other data of MMOCR 0.x."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from str_benchmark.data.filters import FilterReport
from str_benchmark.data.samples import WordDataset


class AnnotatedDataset(WordDataset):
    """Samples of one .jsonl file; options as for `WordDataset`.

    Its image paths are relative to its folder or to a folder above it: the nearest one in which the first image is
    found. Only the start of each line is kept in memory, so millions of words fit.

    Raises:
        FileNotFoundError: no such file, or no image in any of these folders.
        ValueError: a line that is not such a record (named by number); an empty file.
    """

    def __init__(self, path: Path | str, *args: Any, **options: Any):
        super().__init__(path, *args, **options)
        starts, kept, report = [], [], FilterReport(0)
        with open(self.path, "rb") as file:
            for line in file:
                starts.append(file.tell() - len(line))
                if not line.strip():
                    continue
                report.total += 1
                label = self._parse(line, len(starts))[1]
                rule = self.filter.broken_rule(label)
                if rule:
                    report.remove(rule, label)
                else:
                    kept.append(len(starts))
        if not report.total:
            raise ValueError(f"{self.path}: no annotations in this file")
        report.kept = len(kept)
        self.report, self.total = report, report.total
        self.indices, self._starts = np.array(kept, dtype=np.uint32), np.array(starts, dtype=np.int64)
        self._base = self._find_base() if kept else self.path.parent

    def _parse(self, line: bytes, number: int) -> tuple[str, str]:
        """Image path and label."""
        try:
            record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            filename, text = record["filename"], record["text"]
        except (ValueError, KeyError, TypeError):
            shown = line.decode(errors="replace").strip()[:80]
            raise ValueError(
                f'{self.path}, line {number}: expected {{"filename": ..., "text": ...}}, got {shown!r}'
            ) from None
        return str(filename), str(text)

    def _record(self, index: int) -> tuple[str, str]:
        number = int(self.indices[index])
        with open(self.path, "rb") as file:
            file.seek(self._starts[number - 1])
            return self._parse(file.readline(), number)

    def _find_base(self) -> Path:
        first = self._record(0)[0]
        for folder in self.path.parents:
            if (folder / first).is_file():
                return folder
        raise FileNotFoundError(f"{self.path}: its first image {first} is in none of the folders above it")

    @property
    def size(self) -> int:
        """Bytes of the list."""
        return self.path.stat().st_size

    def key(self, index: int) -> str:
        """The image's path as given in the file."""
        return self._record(index)[0]

    def text(self, index: int) -> str:
        """The label as given in the file."""
        return self._record(index)[1]

    def encoded(self, index: int) -> bytes | None:
        """The image file; None if it is missing."""
        try:
            return (self._base / self.key(index)).read_bytes()
        except FileNotFoundError:
            return None
