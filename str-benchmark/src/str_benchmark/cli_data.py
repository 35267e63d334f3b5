"""Commands that read and write data sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import tyro

PROGRAM = "str-benchmark"


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/str-benchmark."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / PROGRAM)


def default_workers() -> int:
    """Loader processes: one per CPU core, at most eight."""
    return min(8, os.cpu_count() or 1)


@dataclass
class Data:
    """What is needed and what is there; inspect, verify; `data --tiny` shows what a data root looks like."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Nothing; inspect and sets: show what a filter removes, with examples; verify and sets: decode every image
    completely. Sets are names, folders with LMDBs or .jsonl lists; verify without sets takes all that are there."""
    charset: str = "36"
    """inspect: 36, 62, 94, the characters or a .txt file."""
    max_length: int = 25
    """inspect: longest label."""
    filter: str = "report"
    """inspect: report, strip, reference or off."""
    nfkd: bool = False
    """inspect: replace characters outside the alphabet by their compatible ones (é by e)."""
    drop_whitespace: bool = False
    """inspect: take whitespace out of labels."""
    tiny: Path | None = None
    """Write every set in miniature into this folder, in the layout of the released LMDBs."""
    workers: int = field(default_factory=default_workers)
    """verify: processes."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""

    def __call__(self) -> None:
        from str_benchmark.data import inventory, sets

        verb, names = (self.words[0], self.words[1:]) if self.words else ("", ())
        if self.tiny is not None:
            from str_benchmark.tiny import write_tiny

            return print(write_tiny(self.tiny))
        if verb == "inspect" and names:
            options = {name: getattr(self, name) for name in ("charset", "max_length", "filter", "nfkd")}
            options["drop_whitespace"] = self.drop_whitespace
            for name in names:
                for data in sets.open_set(name, self.data_root, **options):
                    print(f"{data.path}: {data.report}")
            return
        if verb == "verify":
            broken = inventory.verify(names, self.data_root, self.workers)
            print("\n".join(broken) or "every image was decoded to its end")
            if broken:
                raise RuntimeError(f"{len(broken)} broken images")
            return
        if verb:
            raise ValueError(f"data: expected nothing, inspect and sets, or verify, got {' '.join(self.words)}")
        from rich.table import Table as Grid

        from shared_utils.logging import console

        columns = ("data", "scale", "size", "licence", "found", "where", "if missing")
        grid = Grid(*columns, title=f"below {self.data_root}")
        for row in inventory.inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)


@dataclass
class CreateLmdb:
    """Write an LMDB from a list of images and labels, or from the photographs of ICDAR 2003."""

    gt: tyro.conf.Positional[Path]
    """Text file with lines `path<TAB>label`, or ICDAR 2003's words.xml."""
    output: tyro.conf.Positional[Path]
    """Folder of the new LMDB."""
    images: Path = Path(".")
    """Folder that the paths of a text file start from."""
    skip_broken: bool = False
    """Go on without broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.data.create import icdar2003_words, listed_images
        from str_benchmark.data.lmdb_store import write_lmdb

        if self.gt.suffix == ".xml":
            count = write_lmdb(icdar2003_words(self.gt, self.skip_broken), self.output)
        else:
            count = write_lmdb(listed_images(self.gt, self.images, self.skip_broken), self.output)
        print(f"{count} words written")


@dataclass
class Render:
    """Render words into a new LMDB."""

    output: tyro.conf.Positional[Path]
    """Folder of the new LMDB."""
    words: Path | None = None
    """Text file, one word a line; none: random words."""
    n: int = 1000
    """Number of random words."""
    alphabet: str = "0123456789abcdefghijklmnopqrstuvwxyz"
    """Characters of random words."""
    fonts: str = "all"
    """sans, serif, all, or a folder with .ttf or .otf."""
    warp: str = "none"
    """none, rotate, curve or perspective."""
    seed: int = 0
    """Of everything."""

    def __call__(self) -> None:
        from str_benchmark.data.create import rendered_items
        from str_benchmark.data.lmdb_store import write_lmdb

        words = self.words.read_text(encoding="utf-8-sig").split() if self.words else None
        items = rendered_items(words, self.n, self.alphabet, self.fonts, self.warp, self.seed)
        print(f"{write_lmdb(items, self.output)} words written")
