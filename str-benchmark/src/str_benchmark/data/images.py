"""Encoded image to the pixels a network sees: decode, gray or RGB, resize, pad, normalise. Bit-equal to Pillow."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_utils.images import read_image

try:
    from torchvision.io import decode_jpeg
except ImportError:  # deprecated in torchvision; Pillow alone is slower and gives the same pixels
    decode_jpeg = None

warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)

JPEG_MAGIC = b"\xff\xd8\xff"
MODES = {1: "L", 3: "RGB"}


def decode(data: bytes | memoryview, channels: int = 1, name: str = "image") -> Image.Image:
    """A gray (1) or RGB (3) image, rotated according to EXIF, transparent parts on white.

    JPEGs without EXIF take torchvision's decoder, which saves Pillow's reading of their headers in Python; gray from
    colour is Pillow's own conversion, so the pixels are the same.

    Raises:
        BrokenFile: not an image, or a truncated one; the message contains `name`.
    """
    if decode_jpeg is not None and data[:3] == JPEG_MAGIC and b"Exif" not in bytes(data[:4096]):
        try:
            return _decode_jpeg(data, channels)
        except RuntimeError:  # CMYK and other forms that Pillow knows, and broken ones, whose reason it gives
            pass
    return read_image(io.BytesIO(data), MODES[channels], name)  # type: ignore[arg-type]  # "L" or "RGB"


def _decode_jpeg(data: bytes | memoryview, channels: int) -> Image.Image:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_jpeg(buffer).numpy()  # (1 or 3, H, W)
    if len(pixels) not in MODES:
        raise RuntimeError(f"{len(pixels)} channels")
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def fit(image: Image.Image, size: tuple[int, int], pad: bool = False) -> np.ndarray:
    """Bicubic to (H, W), uint8: (H, W) gray or (H, W, 3).

    With `pad` the ratio is kept up to the full width, and the last column is repeated to the right.
    """
    height, width = size
    new = min(width, math.ceil(height * image.width / image.height)) if pad else width
    pixels = np.asarray(image.resize((new, height), Image.Resampling.BICUBIC))
    if new < width:
        pixels = np.pad(pixels, [(0, 0), (0, width - new)] + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    return pixels


def own_width(image: Image.Image, height: int) -> int:
    """Width for an image that keeps its ratio: whole multiples of the height, as in EasyOCR.

    The longer side counts, so that an upright image gets a margin on its right.
    """
    return height * math.ceil(max(image.width / image.height, image.height / image.width))


def stack(images: list[Image.Image], size: tuple[int, int], pad: bool = False) -> Tensor:
    """Images of one mode to (B, C, H, W) uint8, in one allocation."""
    batch = np.stack([fit(image, size, pad) for image in images])
    return torch.from_numpy(batch).unsqueeze(1) if batch.ndim == 3 else torch.from_numpy(batch.transpose(0, 3, 1, 2))


def to_input(pixels: Tensor) -> Tensor:
    """Pixels uint8 to the network's float32 in [-1, 1]: (v / 255 - 0.5) / 0.5, on their device."""
    return pixels.float().div_(255).sub_(0.5).div_(0.5)
