"""Reading a user's images: texts with confidences, and a sheet of images with the words read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from shared_utils.images import BrokenFile, image_files
from shared_utils.logging import get_logger
from str_benchmark.data import images
from str_benchmark.decoding import ctc_beam_search
from str_benchmark.models import Recognizer

logger = get_logger("str-benchmark")


@dataclass
class Prediction:
    """The reading of one image."""

    path: Path
    text: str
    confidence: float
    characters: list[float]
    """confidence of each character of the greedy text"""
    beams: list[tuple[str, float]]
    """CTC with a beam: texts with log-probabilities, the best first"""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The given images and all images in the given folders, sorted.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
        ValueError: no path.
    """
    if not paths:
        raise ValueError("images: expected one or more files or folders")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: file or folder not found")
        inside, left_out = image_files(path)
        if not inside:
            raise FileNotFoundError(f"{path}: no images in this folder")
        if left_out:
            logger.info("%s: skipped %s", path, ", ".join(f"{n} ({why})" for why, n in sorted(left_out.items())))
        found += inside
    return found


def grouped(model: Recognizer, pictures: Sequence[Image.Image], pad: bool = False) -> list[tuple[list[int], Tensor]]:
    """Pictures as batches of one size each: their positions, and pixels (B, C, H, W) uint8.

    A network of variable width gets each picture at its own aspect ratio, so a reading does not depend on the other
    pictures of its batch.
    """
    height, width = model.config.img_size
    if not model.config.variable_width:
        return [(list(range(len(pictures))), images.stack(list(pictures), (height, width), pad))] if pictures else []
    widths = [images.own_width(picture, height) for picture in pictures]
    order = sorted(range(len(pictures)), key=widths.__getitem__)
    batches = []
    for width, group in itertools.groupby(order, key=widths.__getitem__):
        positions = list(group)
        batches.append((positions, images.stack([pictures[i] for i in positions], (height, width), pad=True)))
    return batches


@torch.inference_mode()
def read_pixels(model: Recognizer, pixels: Tensor) -> tuple[list[str], list[float], Tensor]:
    """Texts, confidences and probabilities (B, T, K) float32 on the CPU, of pixels (B, C, H, W) uint8."""
    logits = model(images.to_input(pixels.to(model.device)), early_stop=True)
    probs = logits.float().softmax(-1).cpu()
    return *model.tokenizer.decode(probs), probs


def predict(
    model: Recognizer, files: Sequence[Path], *, pad: bool = False, beam: int = 0, batch_size: int = 64,
    skip_broken: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Read image files, one word each.

    Args:
        model: a recognizer, best through `for_inference`.
        files: images.
        pad: as in the model's training.
        beam: CTC: prefixes of the beam search; the best one is the text, its probability the confidence. 0: greedy.
        batch_size: images at once.
        skip_broken: skip unreadable files; the log names them.

    Raises:
        ValueError: a beam with an attention model.
        BrokenFile: an unreadable image, or with skip_broken no readable one.
    """
    if beam and model.config.pred != "CTC":
        raise ValueError(f"beam: beam search is for CTC models, this model uses {model.config.pred}")
    model.eval()
    found = []
    for start in range(0, len(files), batch_size):
        pictures, kept = [], []
        for path in map(Path, files[start : start + batch_size]):
            try:
                pictures.append(images.decode(path.read_bytes(), model.config.in_channels, str(path)))
                kept.append(path)
            except BrokenFile as error:
                if not skip_broken:
                    raise
                logger.warning("skipped: %s", error)
        read: dict[int, Prediction] = {}
        for positions, pixels in grouped(model, pictures, pad):
            read |= zip(positions, _read(model, pixels, [kept[i] for i in positions], beam), strict=True)
        found += [read[i] for i in range(len(kept))]
    if files and not found:
        raise BrokenFile(f"none of the {len(files)} images can be read")
    return found


def _read(model: Recognizer, pixels: Tensor, paths: list[Path], beam: int) -> list[Prediction]:
    texts, confidences, probs = read_pixels(model, pixels)
    characters = model.tokenizer.char_confidences(probs)
    beams: list[list] = [[] for _ in paths]
    if beam:
        beams = ctc_beam_search(probs.clamp_min(1e-30).log(), model.config.charset, beam)
        texts = [each[0][0] for each in beams]
        confidences = [float(torch.tensor(each[0][1]).exp()) for each in beams]
    return [Prediction(*each) for each in zip(paths, texts, confidences, characters, beams, strict=True)]
