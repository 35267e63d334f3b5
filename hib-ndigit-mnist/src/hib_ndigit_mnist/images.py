"""A user's own images: single files, folders of any depth, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shared_utils.images import BrokenFile, image_files, read_image
from shared_utils.logging import get_logger

logger = get_logger("hib-ndigit-mnist")


class NamedImages(NamedTuple):
    """Images in the format of the N-digit MNIST encoders, and where they come from."""

    images: Tensor  # (n, 1, H, W) uint8
    names: list[str]  # files relative to the given folder; for an array, its name and the row


def files_of(path: Path) -> list[Path]:
    """An image, or all images below a folder; skipped files are logged.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such image or folder")
    if not path.is_dir():
        return [path]
    files, left_out = image_files(path)
    if not files:
        raise ValueError(f"{path}: holds no images; skipped: {dict(left_out) or 'nothing, it is empty'}")
    if left_out:
        logger.info("%s: skipped %s", path, ", ".join(f"{count} {kind}" for kind, count in left_out.items()))
    return files


def read_digit_images(path: Path, shape: Sequence[int], invert: bool = False, skip_broken: bool = False) -> NamedImages:
    """Grey images of a file, a folder or an array, fitted into (1, H, W) on black, keeping their aspect ratio.

    Args:
        path: an image, a folder with images at any depth, or .npy / .npz with uint8 images (n, H, W).
        shape: (1, H, W).
        invert: invert the images, for dark digits on white.
        skip_broken: skip and log files that cannot be read.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no images, or an array of another shape or type.
        BrokenFile: an image that cannot be read completely.
    """
    if path.suffix in (".npy", ".npz") and path.is_file():
        return _read_array(path, shape)
    images, names = [], []
    for file in files_of(path):
        try:
            grey = read_image(file, "L")
        except BrokenFile as error:
            if not skip_broken:
                raise
            logger.warning("skipped: %s", error)
            continue
        grey = ImageOps.invert(grey) if invert else grey
        if grey.getextrema()[0] == grey.getextrema()[1]:
            logger.warning(
                "%s: all pixels are equal; transparent images are put on white, where white ink is invisible", file
            )
        fitted = ImageOps.pad(grey, (shape[2], shape[1]), Image.Resampling.BILINEAR, color=0)
        images.append(np.asarray(fitted))
        names.append(str(file.relative_to(path)) if path.is_dir() else file.name)
    if not images:
        raise ValueError(f"{path}: none of the images can be read")
    return NamedImages(torch.from_numpy(np.stack(images)[:, None]), names)


def _read_array(path: Path, shape: Sequence[int]) -> NamedImages:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded["images"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as an array of images ({error})") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[1:] != tuple(shape[1:]) or not len(array):
        found = f"{array.shape} {array.dtype}"
        raise ValueError(f"{path}: expected uint8 (n, {shape[1]}, {shape[2]}) with n >= 1, got {found}")
    names = [f"{path.name}[{row}]" for row in range(len(array))]
    return NamedImages(torch.from_numpy(np.ascontiguousarray(array)[:, None]), names)
