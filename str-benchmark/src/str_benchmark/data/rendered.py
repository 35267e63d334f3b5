"""Rendered sets by name, written as LMDBs on first use: the embedded scale takes the path of the paper's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from str_benchmark.data.lmdb_store import write_lmdb
from str_benchmark.render import WARPS, random_words, render_words

ALNUM = string.digits + string.ascii_lowercase
CHUNK = 500
VERSION = 1


@dataclass(frozen=True)
class Rendered:
    """A recipe: n words, in equal parts of each (fonts, warp)."""

    n: int
    styles: tuple[tuple[str, str], ...]
    seed: int
    alphabet: str = string.digits
    lengths: tuple[int, int] = (3, 3)


RENDERED = {
    # the data claim: two generators, and tests like each, and across
    "A": Rendered(6000, (("sans", "none"),), 1),
    "B": Rendered(6000, (("serif", "rotate"),), 2),
    "test-sans-upright": Rendered(500, (("sans", "none"),), 11),
    "test-serif-rotated": Rendered(500, (("serif", "rotate"),), 12),
    "test-serif-upright": Rendered(500, (("serif", "none"),), 13),
    "test-sans-rotated": Rendered(500, (("sans", "rotate"),), 14),
    # one training set for all 24: letters and digits in every shape
    "words": Rendered(60_000, tuple(("all", warp) for warp in WARPS), 3, ALNUM, (2, 7)),
    "test-words-none": Rendered(1000, (("all", "none"),), 21, ALNUM, (2, 7)),
    "test-words-rotate": Rendered(1000, (("all", "rotate"),), 22, ALNUM, (2, 7)),
    "test-words-curve": Rendered(1000, (("all", "curve"),), 23, ALNUM, (2, 7)),
    "test-words-perspective": Rendered(1000, (("all", "perspective"),), 24, ALNUM, (2, 7)),
    # for the test-suite
    "tiny": Rendered(64, (("sans", "none"), ("serif", "curve")), 4),
    "test-tiny": Rendered(32, (("sans", "none"),), 31),
    "test-tiny-curve": Rendered(32, (("serif", "curve"),), 32),
}  # fmt: skip


def rendered_lmdb(name: str, folder: Path) -> Path:
    """The LMDB of a rendered set, written into the folder unless it is there. ValueError for an unknown name."""
    if name not in RENDERED:
        raise ValueError(f"rendered set: expected one of {', '.join(RENDERED)}, got {name!r}")
    recipe = RENDERED[name]
    key = json.dumps([VERSION, asdict(recipe)])
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of runs side by side one renders, the others wait
        if not path.exists():
            write_lmdb(_draw(recipe), path)
    return path


def _draw(recipe: Rendered) -> Iterator[tuple[Image.Image, str]]:
    """Images and words of a recipe, styles in turn, so that any first share of the set holds all of them."""
    for chunk in range(0, recipe.n, CHUNK):
        parts = []
        for number, (fonts, warp) in enumerate(recipe.styles):
            seed = [recipe.seed, chunk, number]
            n = len(range(chunk + number, min(chunk + CHUNK, recipe.n), len(recipe.styles)))
            words = random_words(n, recipe.alphabet, recipe.lengths, np.random.default_rng([*seed, 0]))
            parts.append(iter(zip(*render_words(words, [*seed, 1], fonts, warp), strict=True)))
        for position in range(min(CHUNK, recipe.n - chunk)):
            image, word = next(parts[position % len(parts)])
            yield Image.fromarray(image), word
