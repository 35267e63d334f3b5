"""Small sets in the layout of everything that the tables read, to show what a folder must look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PSI = [f"psi-{tenths / 10:.1f}" for tenths in range(1, 11)]
FOLDERS = {
    **{
        name: ["real", "fake"]
        for name in ("ffhq", "celeba-stylegan", "lsun-bedroom-stylegan", "mnist-dcgan", "sc09-wavegan")
    },
    "ffhq-stylegan": ["real", *PSI],
}
IMAGES, PER_DIGIT = 40, 60


def write_tiny(root: Path) -> None:
    """Write every set below `root` in seconds, with what occurs in real archives: grey and CMYK JPEG, hidden files."""
    rng = np.random.default_rng(0)
    for name, parts in FOLDERS.items():
        for part in parts:
            for number in range(IMAGES):
                _write_image(root / name / part / f"{number // 20:02d}000" / f"{number:05d}", number, rng)
            (root / name / part / ".DS_Store").write_bytes(b"\0")
    _write_mnist(root / "MNIST" / "raw", rng)


def _write_image(stem: Path, number: int, rng: np.random.Generator) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(rng.integers(0, 256, (32 + number % 3, 32, 3), np.uint8))
    match number % 8:
        case 0:
            image.convert("L").save(stem.with_suffix(".jpg"))
        case 1:
            image.convert("CMYK").save(stem.with_suffix(".JPEG"))
        case 2:
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by 90 degrees
            image.save(stem.with_suffix(".jpg"), exif=exif)
        case 3:
            image.save(stem.with_suffix(".jpg"), format="PNG")  # a PNG named as another format
        case _:
            image.save(stem.with_suffix(".png"))


def _write_mnist(raw: Path, rng: np.random.Generator) -> None:
    """The four idx files as torchvision unpacks them: big-endian magic and sizes, then bytes."""
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        labels = np.repeat(np.arange(10, dtype=np.uint8), PER_DIGIT)
        images = rng.integers(0, 256, (len(labels), 28, 28), np.uint8) // 2 + labels[:, None, None] * 12
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x0800 + array.ndim, *array.shape], ">i4")
            (raw / f"{part}-{kind}-ubyte").write_bytes(head.tobytes() + array.tobytes())
