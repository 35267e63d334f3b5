"""Read images of all kinds that users have, in the same way in all projects."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

REMEDY = "replace the file, or pass --skip-broken where the command has it"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class BrokenFile(RuntimeError):
    """A file that cannot be read completely: one line with the file, the reason and what to do.

    A DataLoader wraps an error of its workers in their traceback; only the line is kept.
    """

    def __init__(self, message: str):
        mark = f"{type(self).__name__}: "
        super().__init__(message.rstrip().rsplit(mark, 1)[-1] if mark in message else message)


def read_image(source: Path | str | BinaryIO, mode: Literal["RGB", "L"] = "RGB", name: str = "") -> Image.Image:
    """Decode an image completely and convert it; see `as_shown`. Of an animation, the first frame is used.

    Args:
        source: a path or an open file.
        mode: "RGB" or "L".
        name: name in messages; default: the path.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFile: truncated, not an image, or floating-point values outside [0, 1].
    """
    name = name or str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image"))
    try:
        with Image.open(source) as file:
            file.load()
            return as_shown(file, mode, name)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise BrokenFile(f"{name}: this is not an image; {REMEDY}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenFile(f"{name}: {error}; {REMEDY}") from None


def as_shown(image: Image.Image, mode: Literal["RGB", "L"] = "RGB", name: str = "image") -> Image.Image:
    """Convert an image to 8-bit RGB or grey, as a viewer would show it.

    EXIF orientation is applied, 16-bit values are scaled to 8 bits, transparent pixels are put on white, palettes and
    CMYK are converted.

    Raises:
        BrokenFile: grey values of more than 16 bits, or floating-point values outside [0, 1]; begins with `name`.
    """
    return _eight_bit(ImageOps.exif_transpose(image), name).convert(mode)


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            found = f"grey values from {wide.min()} to {wide.max()}, expected at most 16 bits"
            raise BrokenFile(f"{name}: {found}; convert it, or {REMEDY}")
        return Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"floating-point values from {values.min()} to {values.max()}, expected [0, 1]"
            raise BrokenFile(f"{name}: {found}; scale them, or {REMEDY}")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque)
    return image


def image_files(folder: Path | str) -> tuple[list[Path], Counter[str]]:
    """Image files below a folder in sorted order, and the number of skipped files for each reason.

    Symbolic links are followed. Hidden files and folders (.DS_Store, .ipynb_checkpoints, ._cat.jpg) are skipped and
    counted as "hidden"; other files are counted by their suffix.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()  # a link to a parent folder must not be followed forever
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        left_out["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        folders[:] = [
            each
            for each in folders
            if not each.startswith(".") and os.path.realpath(os.path.join(here, each)) not in seen
        ]
        for name in names:
            path = Path(here, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                left_out[path.suffix.lower() or "no suffix"] += 1
    return sorted(found), +left_out
