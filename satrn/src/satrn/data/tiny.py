"""Tiny archives in the layout of the real ones: an example of a data root, written in seconds.

They have the oddities of the released sets: MJSynth in three LMDBs, mixed case, punctuation, spaces, labels longer than
25 characters, gray, CMYK and turned JPEGs, a PNG, tall crops, a hidden folder.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import lmdb
from PIL import Image, ImageDraw, ImageFont

from satrn.data.inventory import NAMES, TEST_SIZES

WORDS = "Hello WORLD it's Slinking 50% BCD-12 Reverse x yzt 2019 naïve Café(R) abc".split()
ODD_LABELS = ("two words", "a" * 30, "")
MODES = ("RGB", "L", "CMYK")


def write(root: Path) -> None:
    """Write training sets (training/MJ in three LMDBs, ST, multi_line, scene) and the nine test sets.

    Raises:
        ValueError: the folder is not empty.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root}: is not empty; name a new folder")
    for number, name in enumerate(("MJ_train", "MJ_valid", "MJ_test")):
        _lmdb(root / "training" / "MJ" / name, WORDS, number)
    _lmdb(root / "training" / "ST", [*WORDS, *ODD_LABELS], 3)
    _lmdb(root / "training" / "multi_line", ["two\nlines", "EXIT\nonly", "4\n2"], 4)
    _lmdb(root / "training" / "scene", WORDS, 20)
    for number, name in enumerate((*TEST_SIZES, "MULTI_LINE", "IC03_train")):
        folder = NAMES.get(name, (name,))[0]
        words = ["SALE\n50%", "open\nnow", "No\n7"] if name == "MULTI_LINE" else WORDS
        _lmdb(root / "evaluation" / folder, words, 5 + number)
    (root / "training" / "ST" / ".ipynb_checkpoints").mkdir()
    (root / "training" / ".DS_Store").write_bytes(b"")


def _lmdb(folder: Path, texts: list[str], seed: int) -> None:
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for number, text in enumerate(texts, 1):
            transaction.put(f"image-{number:09d}".encode(), _picture(text, number, drawn))
            transaction.put(f"label-{number:09d}".encode(), text.replace("\n", "").encode())
        transaction.put(b"num-samples", str(len(texts)).encode())


def _picture(text: str, number: int, drawn: random.Random) -> bytes:
    """A JPEG, in turn RGB, gray and CMYK; every fifth is stored rotated with EXIF, every seventh is a PNG."""
    lines = text.split("\n")
    size = 12 * max(map(len, lines)) + 10, 30 * len(lines)
    image = Image.new("RGB", size, tuple(drawn.randrange(120, 256) for _ in range(3)))
    colour = tuple(drawn.randrange(100) for _ in range(3))
    ImageDraw.Draw(image).multiline_text((4, 2), text, fill=colour, font=ImageFont.load_default(20))
    content, exif = io.BytesIO(), Image.Exif()
    if number % 7 == 0:
        image.save(content, "PNG")
    elif number % 5 == 0:
        exif[0x0112] = 6  # viewers turn it by 90 degrees clockwise
        image.rotate(90, expand=True).save(content, "JPEG", exif=exif)
    else:
        image.convert(MODES[number % 3]).save(content, "JPEG", quality=85)
    return content.getvalue()
