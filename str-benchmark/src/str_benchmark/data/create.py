"""Contents of new LMDBs: listed image files, words cut from ICDAR 2003's photographs, or rendered words."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger
from str_benchmark.data import images
from str_benchmark.render import random_words, render_words

T = TypeVar("T")
logger = get_logger("str-benchmark")


def listed_images(gt: Path, folder: Path, skip_broken: bool = False) -> Iterator[tuple[bytes, str]]:
    """Encoded images and labels of a list with lines `path<TAB>label`.

    Raises:
        FileNotFoundError: no list, or an image that is missing.
        ValueError: a line without a tab, or an empty label; with list and line number.
        BrokenFile: an image that cannot be read completely.
    """
    for number, line in enumerate(Path(gt).read_text(encoding="utf-8-sig").split("\n"), 1):  # a label may hold U+2028
        if not line.strip():
            continue
        path, tab, label = line.partition("\t")
        if not tab or not label.strip():
            raise ValueError(f"{gt}, line {number}: expected path<TAB>label, got {line!r}")
        name = f"{gt}, line {number}: {folder / path}"
        data = _unless_broken(partial(_whole_file, folder / path, name), name, skip_broken)
        if data is not None:
            yield data, label.strip()


def _whole_file(path: Path, name: str) -> bytes:
    data = path.read_bytes()
    images.decode(data, name=name)
    return data


def _unless_broken(read: Callable[[], T], name: str, skip_broken: bool) -> T | None:
    """What `read` returns; with skip_broken, None and a warning for a file that is missing or broken."""
    try:
        return read()
    except FileNotFoundError:
        if not skip_broken:
            raise FileNotFoundError(f"{name}: file not found") from None
        logger.warning("skipped: %s: file not found", name)
    except BrokenFile as error:
        if not skip_broken:
            raise
        logger.warning("skipped: %s", error)
    return None


def icdar2003_words(xml: Path, skip_broken: bool = False) -> Iterator[tuple[Image.Image, str]]:
    """Gray crops and labels of the words in ICDAR 2003's photographs, in the order of its words.xml.

    A word is its rectangle, cut at the photograph's edges. Photographs are next to the file; skip_broken leaves out
    the words of one that is missing or broken.

    Raises:
        FileNotFoundError: no such file, or a photograph that is missing.
        ValueError: not such a file; a rectangle that is incomplete or outside its photograph; an empty label.
        BrokenFile: a photograph that cannot be read completely.
    """
    try:
        root = ElementTree.parse(xml).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{xml}: expected ICDAR 2003's words.xml: {error}") from None
    for image in root.iter("image"):
        name = image.findtext("imageName", "").strip()
        path = Path(xml).parent / name
        photo = _unless_broken(partial(read_image, path, "L"), f"{xml}: {path}", skip_broken)
        if photo is None:
            continue
        for word in image.iter("taggedRectangle"):
            label = word.findtext("tag", "").strip()
            try:
                left, top, width, height = (float(word.attrib[side]) for side in ("x", "y", "width", "height"))
            except (KeyError, ValueError):
                raise ValueError(
                    f"{xml}: {name}: word {label!r}: expected a rectangle of numbers x, y, width and height, "
                    f"got {dict(word.attrib)}"
                ) from None
            right, bottom = min(photo.width, round(left + width)), min(photo.height, round(top + height))
            left, top = max(0, round(left)), max(0, round(top))
            if not label or left >= right or top >= bottom:
                where = f"{left}, {top} to {right}, {bottom}"
                raise ValueError(f"{xml}: {name}: word {label!r} at {where}: empty, or outside its photograph")
            yield photo.crop((left, top, right, bottom)), label


def rendered_items(
    words: Sequence[str] | None, n: int, alphabet: str, fonts: str, warp: str, seed: int
) -> Iterator[tuple[Image.Image, str]]:
    """Rendered words, or n random ones of 2 to 8 characters."""
    if words is None:
        words = random_words(n, alphabet, (2, 8), np.random.default_rng([seed, 0]))
    for image, word in zip(*render_words(words, [seed, 1], fonts, warp), strict=True):
        yield Image.fromarray(image), word
