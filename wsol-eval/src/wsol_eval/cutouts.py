"""Handwritten digits on photographs: real objects on real texture, with exact masks and boxes, and no download.

32 x 32 images of 10 classes. A white digit lies anywhere on a patch of a photograph. The photograph is drawn
without regard to the digit, or it tells the class (the paper's duck on water, section 3): then it agrees with the digit
in 90 % of the images, and the background is a cue as good as the object. No patch and no digit is in two splits.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_utils.images import read_image

SIDE, CLASSES = 32, 10


@dataclass(frozen=True)
class Kind:
    """What digits are pasted on, and how many images the splits have."""

    telling: bool
    """the photograph agrees with the digit in 90 % of the images"""
    downloaded: bool = False
    """MNIST's digits on CIFAR-10's photographs, under the data root; else what scikit-learn and scikit-image ship"""
    train: int = 1000
    test: int = 300


DATASETS = {
    "photographs": Kind(telling=False),
    "photographs-telling": Kind(telling=True),
    "cifar10-jpeg": Kind(telling=False, downloaded=True, train=5000, test=1000),
    "cifar10-jpeg-telling": Kind(telling=True, downloaded=True, train=5000, test=1000),
}
PHOTOGRAPHS = (  # one per class where the background tells the class
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/brick.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
TILE = 64  # pixels; a photograph is cut into tiles, and each tile belongs to one split
TILES = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # number of the tile modulo 5
WRITTEN = {"train": (0, 1200), "val": (1200, 1400), "test": (1400, 1797)}  # scikit-learn's digits, in writers' order
DIGIT = (16, 24)  # side in pixels, of the digit's own square
SHIFT, SPREAD = 0.45, 0.25  # of the pixels: the network sees (pixel - 0.45) / 0.25
CUE = 0.9  # probability that the photograph agrees with the digit, where it tells the class
PARTS = {"train": 1, "val": 2, "test": 3}
MNIST_REMEDY = "torchvision.datasets.MNIST(DATA_ROOT, download=True) puts it there"
CIFAR_REMEDY = "an archive of train/<class>/*.jpg and test/<class>/*.jpg is expected"
ARCHIVE = "cifar10-imagefolder.zip"
KEPT = 0.8  # of the training digits and photographs; the others are val's


@dataclass(frozen=True)
class Cutouts:
    """N images with everything that can be known about them."""

    images: Tensor
    """(N, 3, 32, 32) float32, about zero mean"""
    labels: Tensor
    """(N,) int64"""
    masks: np.ndarray
    """(N, 32, 32) uint8, 1 on the digit"""
    boxes: list[np.ndarray]
    """N arrays (1, 4): x0, y0, x1, y1, both ends on the digit"""

    def __getitem__(self, chosen: slice | np.ndarray) -> Cutouts:
        index = np.arange(len(self.boxes))[chosen]
        return Cutouts(self.images[index], self.labels[index], self.masks[index], [self.boxes[i] for i in index])


def make_split(name: str, count: int, seed: int, dataset: str = "photographs", data_root: Path = Path()) -> Cutouts:
    """The first `count` images of a split, the classes taking turns; the same for the same seed.

    Args:
        name: train (train-weaksup), val (train-fullsup) or test.
        count: images.
        seed: of every draw.
        dataset: of `DATASETS`.
        data_root: of the downloaded ones.

    Raises:
        FileNotFoundError: MNIST or the archive of CIFAR-10 is not there.
    """
    kind, rng = DATASETS[dataset], np.random.default_rng(1000 * seed + PARTS[name])
    digits, values = _mnist(data_root, name) if kind.downloaded else _written(name)
    drawn = []
    for label in np.arange(count) % CLASSES:
        shown = int(label) if kind.telling and rng.random() < CUE else int(rng.integers(CLASSES))
        background = _cifar(data_root, name, shown, rng) if kind.downloaded else _patch(name, shown, rng)
        drawn.append(_paste(background, digits[rng.choice(np.flatnonzero(values == label))], rng))
    masks = np.stack([mask for _, mask in drawn])
    boxes = [np.array([[x.min(), y.min(), x.max(), y.max()]]) for y, x in map(np.nonzero, masks)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]).astype(np.float32)).permute(0, 3, 1, 2)
    return Cutouts((images.contiguous() - SHIFT) / SPREAD, torch.arange(count) % CLASSES, masks, boxes)


def _paste(background: np.ndarray, digit: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (32, 32, 3) in [0, 1] and mask (32, 32)."""
    side = int(rng.integers(*DIGIT, endpoint=True))
    ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    top, left = rng.integers(0, SIDE - side + 1, 2)
    alpha = np.zeros((SIDE, SIDE))
    alpha[top : top + side, left : left + side] = ink
    colour = rng.uniform(0.8, 1.0, 3)
    image = background * (1 - alpha[..., None]) + colour * alpha[..., None]
    return image, (alpha > 0.5).astype(np.uint8)


@cache
def _photograph(number: int) -> np.ndarray:
    package, path = PHOTOGRAPHS[number]
    with Image.open(io.BytesIO(files(package).joinpath(path).read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


def _patch(split: str, number: int, rng: np.random.Generator) -> np.ndarray:
    """(32, 32, 3) in [0, 1]: a square of a tile of this split, mirrored half of the time."""
    photograph = _photograph(number)
    rows, columns = photograph.shape[0] // TILE, photograph.shape[1] // TILE
    mine = [tile for tile in range(rows * columns) if tile % 5 in TILES[split]]
    tile, side = int(rng.choice(mine)), int(rng.integers(SIDE, TILE, endpoint=True))
    top = TILE * (tile // columns) + int(rng.integers(0, TILE - side + 1))
    left = TILE * (tile % columns) + int(rng.integers(0, TILE - side + 1))
    crop = Image.fromarray(photograph[top : top + side, left : left + side]).resize((SIDE, SIDE))
    return np.asarray(crop, np.float64)[:, :: 1 if rng.random() < 0.5 else -1] / 255


@cache
def _written(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch, (begin, end) = load_digits(), WRITTEN[split]
    return (bunch.images[begin:end] * 255 / 16).astype(np.uint8), bunch.target[begin:end]


def _part(count: int, split: str) -> slice:
    """Train and val share the training files of a set, test has its own."""
    kept = round(KEPT * count)
    return {"train": slice(0, kept), "val": slice(kept, count), "test": slice(0, count)}[split]


@cache
def _mnist(data_root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import MNIST

    try:
        stored = MNIST(data_root, train=split != "test")
    except RuntimeError as error:
        raise FileNotFoundError(f"{data_root / 'MNIST' / 'raw'}: no MNIST; {MNIST_REMEDY}") from error
    part = _part(len(stored.data), split)
    return stored.data[part].numpy(), stored.targets[part].numpy()


@cache
def _cifar_names(archive: Path, split: str) -> list[list[str]]:
    """Names of the photographs of each class, the classes in alphabetical order."""
    if not archive.is_file():
        raise FileNotFoundError(f"{archive}: no such archive; {CIFAR_REMEDY}")
    with zipfile.ZipFile(archive) as opened:
        folder = "test/" if split == "test" else "train/"
        names = sorted(n for n in opened.namelist() if n.startswith(folder) and n.lower().endswith((".jpg", ".jpeg")))
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(name.split("/")[1], []).append(name)
    return [each[_part(len(each), split)] for _, each in sorted(grouped.items())]


def _cifar(data_root: Path, split: str, number: int, rng: np.random.Generator) -> np.ndarray:
    """(32, 32, 3) in [0, 1]: a photograph of a class of CIFAR-10."""
    archive = data_root / ARCHIVE
    name = str(rng.choice(_cifar_names(archive, split)[number]))
    with read_image(io.BytesIO(_opened(archive).read(name)), name=f"{archive}/{name}") as image:
        return np.asarray(image.resize((SIDE, SIDE)), np.float64) / 255


@lru_cache(maxsize=1)
def _opened(archive: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)
