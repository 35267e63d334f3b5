"""Small archives in the layout of the real ones, with their quirks: for rehearsals, and as an example."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from hib_ndigit_mnist.data import IDX_FILES, read_digits

SIDE = 28
PER_CLASS = 6  # images of a class in the folder of photographs; the last class has one


def write_tiny(folder: Path) -> list[Path]:
    """MNIST's four IDX files with scikit-learn's digits, and class folders of coloured shapes with a CSV file.

    Returns:
        The files written.
    """
    return [*_mnist(folder / "MNIST" / "raw"), *_photographs(folder / "photos")]


def _mnist(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    written = []
    for (name, pattern), values in zip(IDX_FILES.items(), read_digits(), strict=True):
        array = values.numpy()
        if array.ndim == 3:
            array = np.stack([_like_mnist(image) for image in array])
        header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
        packed = name != "test_labels"  # one of the four is unpacked, as users may do
        path = folder / (pattern.format("-") + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(header + array.tobytes(), 1) if packed else header + array.tobytes())
        written.append(path)
    return written


def _like_mnist(digit: np.ndarray) -> np.ndarray:
    """8 x 8 -> 28 x 28, with the digit in the central 20 x 20 pixels."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[4:24, 4:24] = np.asarray(Image.fromarray(digit).resize((20, 20), Image.Resampling.BILINEAR))
    return canvas


def _photographs(folder: Path) -> list[Path]:
    """All kinds of files that users have: rotated by EXIF, CMYK, grey, 16 bits, palette, transparent, odd names."""
    rng = np.random.default_rng(0)
    written = []
    for number, name in enumerate(("001.Größe", "002.jay", "003.owl", "004.rare")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for each in range(PER_CLASS if number < 3 else 1):
            noise = rng.integers(0, 60, (40, 52, 3))
            noise[8:32, 10:40, number % 3] += 150
            image = Image.fromarray(noise.astype(np.uint8))
            path = folder / name / f"{each}.jpg"
            if each == 0:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
            elif each == 1:
                image.convert("CMYK").save(path)
            elif each == 2:
                image.save(path, format="PNG")  # a PNG named .jpg
            elif each == 3:
                path = path.with_name("grau_ü.tif")
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
            elif each == 4:
                path = path.with_suffix(".GIF")
                image.quantize(32).save(path, format="GIF")
            else:
                path = path.with_suffix(".png")
                image.putalpha(200)
                image.save(path)
            written.append(path)
    hidden = folder / "002.jay" / ".ipynb_checkpoints"
    hidden.mkdir(exist_ok=True)
    (hidden / "0-checkpoint.jpg").write_bytes(b"no image")
    (folder / "readme.txt").write_text("left out\n")
    with (folder.parent / "photos.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["image", "label"])
        table.writerows([path.relative_to(folder.parent).as_posix(), path.parent.name] for path in written)
    return written
