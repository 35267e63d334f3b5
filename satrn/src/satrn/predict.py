"""What the command line does with your images: read them, rotate them, measure their gates, render new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from satrn.data.render import random_words, render_words
from satrn.data.streams import normalise
from satrn.data.words_lmdb import LmdbWords, decode_image, write_lmdb
from satrn.evaluate import aspect_ratios, evaluate_rotation
from satrn.export import OnnxReader
from satrn.measure import load_model
from satrn.models import SATRN
from satrn.train import make_fabric
from shared_utils.logging import progress

RENDERED_AT_ONCE = 1000
CASES = (str.lower, str.capitalize, str.upper)


def load_images(paths: Sequence[Path], model: SATRN | OnnxReader) -> Tensor:
    """Image files as uint8 [N, C, H, W] in the model's size.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: no file was given.
        BrokenFile: a file is not a readable image.
    """
    if not paths:
        raise ValueError("no image given")
    images = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: image not found")
        images.append(decode_image(path, model.cfg.img_size, model.cfg.in_channels))
    return torch.stack(images)


def read_images(
    paths: Sequence[Path],
    checkpoint: Path,
    beam: int = 1,
    attention: Path | None = None,
    device: str = "auto",
    dictionary: str | None = None,
) -> list[tuple[str, float]]:
    """Text and confidence of every image file.

    Args:
        paths: image files.
        checkpoint: checkpoint of `satrn train` or of MMOCR, or a folder of `satrn export` (read by ONNX Runtime).
        beam: width of the beam.
        attention: PNG to write attention maps to.
        device: auto, cpu or cuda.
        dictionary: characters of an MMOCR checkpoint, if their number does not identify them.
    """
    if checkpoint.is_dir():
        if beam > 1 or attention is not None:
            raise ValueError(f"{checkpoint}: an exported network reads greedily and without attention maps")
        reader = OnnxReader(checkpoint)
        read = reader.generate(normalise(load_images(paths, reader), reader.cfg))
        return list(zip(read.texts, read.confidence, strict=True))
    fabric = make_fabric(device)
    model = load_model(checkpoint, fabric, dictionary)
    images = load_images(paths, model)
    pixels = normalise(images.to(fabric.device), model.cfg)
    read = model.generate(pixels, beam=beam, attention=attention is not None)
    if attention is not None:
        from satrn.figures import draw_attention

        draw_attention(images, read, attention)
    return list(zip(read.texts, read.confidence, strict=True))


def rotation_frame(
    checkpoint: Path, words: Path, angles: Sequence[float], device: str, dictionary: str | None = None
) -> pd.DataFrame:
    """Accuracy by angle of a checkpoint on an LMDB; see `evaluate_rotation`."""
    model = load_model(checkpoint, make_fabric(device), dictionary)
    return evaluate_rotation(model, LmdbWords(words, model.cfg.img_size, model.cfg.in_channels), angles)


def image_ratios(paths: Sequence[Path], checkpoint: Path, dictionary: str | None = None) -> list[float]:
    """Ratio r of every image file; see `aspect_ratios`."""
    model = load_model(checkpoint, make_fabric("cpu"), dictionary)
    return aspect_ratios(model, load_images(paths, model)).tolist()


def render_lmdb(
    folder: Path,
    count: int,
    warp: str,
    words: Path | None,
    charset: str,
    lengths: tuple[int, int],
    size: tuple[int, int],
    seed: int,
) -> int:
    """Write an LMDB of `count` rendered words: the lines of a file in turn, or random strings; returns the count.

    multi_line may break a line of the file at a space; the label has no spaces. scene draws a line of the file in lower
    case, capitalised or in capitals.

    Raises:
        ValueError: a file without words, or a line with a space for another warp.
    """
    if words is not None:
        lines = [line.strip() for line in words.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        spaced = [line for line in lines if " " in line] if warp != "multi_line" else []
        if not lines or spaced:
            what = f"{spaced[0]!r} has a space; write one word per line, or take --warp multi_line" if spaced else ""
            raise ValueError(f"{words}: {what or 'contains no words'}")
        texts = [lines[i % len(lines)] for i in range(count)]
        if warp == "scene":
            styles = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
            texts = [CASES[style](text) for style, text in zip(styles, texts, strict=True)]
    else:
        texts = random_words(count, charset, lengths, torch.Generator().manual_seed(seed))
    return write_lmdb(folder, _drawn(texts, seed, warp, size))


def _drawn(texts: Sequence[str], seed: int, warp: str, size: tuple[int, int]) -> Iterator[tuple[Tensor, str]]:
    """Images and labels, RENDERED_AT_ONCE at a time: glyphs of 100,000 words would fill the memory."""
    with progress() as bar:
        for first in bar.track(range(0, len(texts), RENDERED_AT_ONCE), description="batches of words"):
            part = texts[first : first + RENDERED_AT_ONCE]
            of_batch = (seed * 0x9E3779B1 + first) % 2**32  # an odd factor: every seed has a stretch of its own
            images, _ = render_words(part, of_batch, warp, size, font_pixels=float(max(size)))
            yield from zip(images, [text.replace(" ", "") for text in part], strict=True)
