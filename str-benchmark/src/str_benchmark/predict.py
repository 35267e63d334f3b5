"""Reading a user's images: texts with confidences, and a sheet of words beside their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared_utils.logging import get_logger
from str_benchmark.data import images
from str_benchmark.decoding import ctc_beam_search
from str_benchmark.evaluate import read_pixels
from str_benchmark.models import Recognizer

logger = get_logger("str-benchmark")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


@dataclass
class Prediction:
    """What was read in one image."""

    path: Path
    text: str
    confidence: float
    characters: list[float]
    """confidence of each character of the greedy text"""
    beams: list[tuple[str, float]]
    """CTC with a beam: texts with log-probabilities, the best first"""


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The images named, and all images in the folders named, sorted.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES) if path.is_dir() else []
        if not inside:
            raise FileNotFoundError(f"{path}: " + ("no images in this folder" if path.is_dir() else "no such file"))
        found += inside
    return found


def predict(
    model: Recognizer, files: Sequence[Path], *, pad: bool = False, beam: int = 0, batch_size: int = 64,
    skip_broken: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Read image files, one word each.

    Args:
        model: a recognizer, best through `for_inference`.
        files: images.
        pad: as the model was trained.
        beam: CTC: prefixes of the beam search; the best one is the text, its probability the confidence. 0: greedy.
        batch_size: images at once.
        skip_broken: leave unreadable files out, named in the log.

    Raises:
        ValueError: an unreadable image; a beam with an attention model.
    """
    if beam and model.config.pred != "CTC":
        raise ValueError(f"beam: beam search is for CTC models, this one ends in {model.config.pred}")
    model.eval()
    found = []
    for start in range(0, len(files), batch_size):
        pictures, kept = [], []
        for path in files[start : start + batch_size]:
            try:
                pictures.append(images.decode(path.read_bytes(), model.config.in_channels))
                kept.append(path)
            except ValueError as error:
                if not skip_broken:
                    raise ValueError(f"{path}: {error}; --skip-broken goes on without such images") from error
                logger.warning("%s: %s, left out", path, error)
        if pictures:
            found += _read(model, images.stack(pictures, model.config.img_size, pad), kept, beam)
    return found


def _read(model: Recognizer, pixels: torch.Tensor, paths: list[Path], beam: int) -> list[Prediction]:
    texts, confidences, probs = read_pixels(model, pixels)
    characters = model.tokenizer.char_confidences(probs)
    beams: list[list] = [[] for _ in paths]
    if beam:
        beams = ctc_beam_search(probs.clamp_min(1e-30).log(), model.config.charset, beam)
        texts = [each[0][0] for each in beams]
        confidences = [float(torch.tensor(each[0][1]).exp()) for each in beams]
    return [Prediction(*each) for each in zip(paths, texts, confidences, characters, beams, strict=True)]
