"""Every set in miniature: the layout, keys and oddities of the released LMDBs and lists, written in seconds.

They show what a data root looks like, and let every table be rehearsed without the real archives.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from str_benchmark.data.lmdb_store import write_lmdb
from str_benchmark.data.names import UNION14M
from str_benchmark.data.sets import SETS, TRAINING, VALIDATION
from str_benchmark.render import random_words, render_words

LABELS = ("Hello", "it's", "2019", "A", "café", "Tesco’s", "!!", "WORD", "x" * 26, "balloon")
"""what real labels hold: cases, quotes, accents, one character, marks alone, more than 25, doubled letters"""
FORMS = (("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"))
SIZES = (None, (1, 1), None, (3, 200), None, (200, 3), None)  # None: as drawn
PARTS = {"MJ": ("MJ_train", "MJ_valid", "MJ_test")}
TURNED = 6  # EXIF orientation: rotated by 90 degrees


def write_tiny(folder: Path | str) -> str:
    """Write all sets below a folder; returns the tree. FileExistsError if one already exists."""
    folder, lines = Path(folder), []
    for number, each in enumerate(SETS.values()):
        n = 20 if each in (*TRAINING, VALIDATION) else 10
        if each.name in UNION14M:
            _write_list(folder / each.folder, n, number)
            lines.append(f"{each.folder}/annotation.jsonl  imgs/  ({n} words)")
            continue
        for part, name in enumerate(PARTS.get(each.name, ("",))):
            place = folder / each.folder / name
            if name == "MJ_valid":  # parts are often links to another disk
                store = folder / "other disk" / name
                write_lmdb(_items(n, number + part), store)
                place.symlink_to(os.path.relpath(store, place.parent), target_is_directory=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_lmdb(_items(n, number + part), place)
            lines.append(f"{place.relative_to(folder)}/data.mdb  ({n} words)")
    for clutter in (folder / ".DS_Store", folder / "training" / ".ipynb_checkpoints" / "data.mdb"):
        clutter.parent.mkdir(exist_ok=True)
        clutter.write_bytes(b"not an LMDB")
    return f"{folder}\n" + "\n".join(f"  {line}" for line in lines)


def _write_list(folder: Path, n: int, seed: int) -> None:
    """A part of Union14M's benchmark: JSON lines, with paths from the folder above."""
    (folder / "imgs").mkdir(parents=True)
    lines = []
    for number, (image, label) in enumerate(_items(n, seed)):
        place = folder / "imgs" / f"{number}.jpg"  # whatever its format is
        place.write_bytes(image)
        filename = place.relative_to(folder.parent).as_posix()
        lines.append(json.dumps({"filename": filename, "text": label}, ensure_ascii=False))
    (folder / "annotation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _items(n: int, seed: int) -> Iterator[tuple[bytes, str]]:
    rng = np.random.default_rng(seed)
    labels = [LABELS[i] if i < len(LABELS) else random_words(1, "abc123", (2, 5), rng)[0] for i in range(n)]
    for i, (pixels, label) in enumerate(zip(*render_words(labels, seed, "sans"), strict=True)):
        picture, (mode, form), size = Image.fromarray(pixels), FORMS[i % len(FORMS)], SIZES[i % len(SIZES)]
        picture = (picture.resize(size) if size else picture).convert("RGB").convert(mode)
        options: dict = {"progressive": i % 2 == 0} if form == "JPEG" else {}
        if (mode, form) == ("RGB", "JPEG"):
            exif = Image.Exif()
            exif[0x0112] = TURNED
            options["exif"] = exif
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        yield buffer.getvalue(), label
