"""MNIST from local files, scikit-learn's digits, and N-digit images assembled from them on the device."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hib_ndigit_mnist.ndigit import SEED, SPLITS, STANDARD_DIGITS, SplitIndex, build_ndigit_indices, standard_indices
from hib_ndigit_mnist.occlusion import join_tiles
from shared_utils.images import BrokenFile, read_image

MNIST_SHA256 = {
    "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
IDX_FILES = {
    "train_images": "train-images{}idx3-ubyte",
    "train_labels": "train-labels{}idx1-ubyte",
    "test_images": "t10k-images{}idx3-ubyte",
    "test_labels": "t10k-labels{}idx1-ubyte",
}
PNG_FOLDERS = (("train", "training"), ("test", "testing"))
MEND = "replace the file, or download MNIST to another folder: hib-ndigit-mnist data --download --data-root NEW"
DIGITS_TRAIN = 1200  # of scikit-learn's 1797 digits; the other 597 are for testing


class Digits(NamedTuple):
    """Single digits, uint8: images (n, h, h), labels (n,) in 0 .. 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


# ---- single digits ----


def read_mnist(root: str | Path, *, verify: bool = True) -> Digits:
    """MNIST from a local folder; nothing is downloaded.

    Args:
        root: folder with the four IDX files, raw or .gz, directly or in raw/ or MNIST/raw/ (torchvision's layout); or
            with PNG folders train/<digit>/<index>.png and test/<digit>/<index>.png (also named training and testing),
            where the number in the file name gives the original order.
        verify: compare the arrays' SHA-256 with the original's; the standard tables are only valid for the original.

    Raises:
        FileNotFoundError: none of these exists; lists the places searched.
        BrokenFile: a damaged file.
        ValueError: the content is not MNIST's.
    """
    root = Path(root).expanduser()
    found = find_mnist(root)
    if found is None:
        folders = ", ".join(str(folder) for folder in _idx_folders(root))
        names = ", ".join(pattern.format("-") for pattern in IDX_FILES.values())
        where = f"{names} (or .gz) in {folders}; {root}/{{train,test}}/<digit>/<index>.png"
        raise FileNotFoundError(f"MNIST was not found; searched {where}")
    if len(found) == len(IDX_FILES):
        digits = Digits(*(torch.from_numpy(read_idx(path)) for path in found))
    else:
        digits = Digits(*_read_png_folder(found[0]), *_read_png_folder(found[1]))
    if verify and (others := not_mnist(digits)):
        raise ValueError(f"{root}: {', '.join(others)} differ from MNIST's (by SHA-256)")
    return digits


def find_mnist(root: str | Path) -> list[Path] | None:
    """The four IDX files below a folder, or the two PNG folders; None if neither exists."""
    root = Path(root).expanduser()
    for folder in _idx_folders(root):
        files = [path for pattern in IDX_FILES.values() if (path := _idx_path(folder, pattern))]
        if len(files) == len(IDX_FILES):
            return files
    folders = [root / name for names in PNG_FOLDERS for name in names if (root / name).is_dir()][:2]
    return folders if len(folders) == 2 else None


def not_mnist(digits: Digits) -> list[str]:
    """Names of the arrays whose content is not the original's."""
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in digits._asdict().items()}
    return [name for name, digest in digests.items() if digest != MNIST_SHA256[name]]


def read_idx(path: str | Path) -> np.ndarray:
    """A uint8 array of an IDX file, raw or gzipped; BrokenFile if it is damaged."""
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BrokenFile(f"{path}: damaged gzip file ({error}); {MEND}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise BrokenFile(f"{path}: not an IDX file of unsigned bytes; {MEND}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], offset=4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(body) != np.prod(shape):
        raise BrokenFile(f"{path}: expected {np.prod(shape)} bytes for shape {shape}, got {len(body)}; {MEND}")
    return body.reshape(shape).copy()


def _idx_folders(root: Path) -> tuple[Path, ...]:
    return root, root / "raw", root / "MNIST" / "raw"


def _idx_path(folder: Path, pattern: str) -> Path | None:
    names = [pattern.format(dot) + suffix for dot in "-." for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_png_folder(folder: Path) -> tuple[Tensor, Tensor]:
    files = [path for digit in range(10) for path in (folder / str(digit)).glob("[!.]*.png")]
    if not files:
        raise FileNotFoundError(f"{folder}: holds no <digit>/<index>.png")
    try:
        files.sort(key=lambda path: int(path.stem))
    except ValueError as error:
        raise ValueError(f"{folder}: file names must be the index of the image ({error})") from error
    images = np.stack([np.asarray(read_image(path, "L")) for path in files])
    return torch.from_numpy(images), torch.tensor([int(path.parent.name) for path in files], dtype=torch.uint8)


def read_digits() -> Digits:
    """scikit-learn's 8 x 8 digits as uint8, in a fixed random order: 1200 for training, 597 for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(bunch.target.astype(np.uint8))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return Digits(images[train], labels[train], images[test], labels[test])


# ---- N-digit images ----


@dataclass(frozen=True)
class NDigitSet:
    """N-digit images as an index table over single digits; uses no more memory than the digits.

    Args:
        digits: (n, h, h) uint8.
        image_ids: (rows, N) int64.
        labels: (rows,) int64, the number.
    """

    digits: Tensor
    image_ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, digits: Digits, index: SplitIndex) -> NDigitSet:
        """A split and the part of the digits it indexes."""
        images = digits.train_images if index.source == "train" else digits.test_images
        return cls(images, torch.from_numpy(index.rows), torch.from_numpy(index.labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_digits(self) -> int:
        """N."""
        return self.image_ids.shape[1]

    @property
    def tile(self) -> int:
        """Side of a digit in pixels."""
        return self.digits.shape[-1]

    def to(self, device: torch.device | str) -> NDigitSet:
        """A copy with all tensors on the device."""
        return NDigitSet(*(part.to(device) for part in (self.digits, self.image_ids, self.labels)))

    def fingerprint(self) -> str:
        """SHA-256 of digits, table and labels."""
        digest = hashlib.sha256()
        for tensor in (self.digits, self.image_ids, self.labels):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def images(self, rows: Tensor) -> Tensor:
        """Assemble rows (...) into (..., 1, h, N h) uint8."""
        return join_tiles(self.digits[self.image_ids[rows]])


def ndigit_sets(
    name: str, num_digits: int, gap: str, root: str | Path, *, standard: bool = True, seed: int = SEED, **sizes: Any
) -> dict[str, NDigitSet]:
    """All splits of "mnist" (from `root`) or "digits" (scikit-learn's).

    `sizes` go to `build_ndigit_indices`; with them, and with standard=False, `root` may hold any data in MNIST's
    format. ValueError for another name.
    """
    if name not in ("mnist", "digits"):
        raise ValueError(f"dataset: expected mnist or digits, got {name!r}")
    digits = read_digits() if name == "digits" else read_mnist(root, verify=standard and not sizes)
    if name == "mnist" and standard and gap == "number" and num_digits in STANDARD_DIGITS and not sizes:
        tables = standard_indices(num_digits)
    else:
        labels = (digits.train_labels.numpy(), digits.test_labels.numpy())
        tables = build_ndigit_indices(labels, num_digits, gap, seed=seed, **sizes)
    return {split: NDigitSet.of(digits, table) for split, table in tables.items()}


def is_mnist(sets: dict[str, NDigitSet]) -> bool:
    """Whether the digits of these splits are MNIST's."""
    expected = {"train": "train_images"}
    return all(
        hashlib.sha256(data.digits.cpu().numpy().tobytes()).hexdigest()
        == MNIST_SHA256[expected.get(split, "test_images")]
        for split, data in sets.items()
    )


class NDigitMNIST(Dataset):
    """N-digit MNIST as a map-style data set: (uint8 image (1, 28, 28 N), int label).

    Args:
        root: folder that holds MNIST, see `read_mnist`.
        num_digits: N in 1 .. 6.
        gap: "number" or "instance".
        split: train, test_seen or test_unseen; train or test for gap instance.
        standard: use the published tables (N = 2 and 3; for others, draw with the generator's defaults and seed 714)
            and verify the content of MNIST. False draws new tables, from any data in MNIST's format.
        seed: seed of that draw; only with standard=False.
        transform: applied to the image.

    Raises:
        ValueError: an unknown split, a seed together with standard=True, or as in `build_ndigit_indices`.
        FileNotFoundError: MNIST was not found.
    """

    def __init__(
        self,
        root: str | Path,
        num_digits: int = 2,
        gap: str = "number",
        split: str = "train",
        standard: bool = True,
        seed: int = SEED,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        if gap in SPLITS and split not in SPLITS[gap]:
            raise ValueError(f"split: expected one of {', '.join(SPLITS[gap])} for gap {gap}, got {split!r}")
        if standard and seed != SEED:
            raise ValueError(f"seed: the standard tables have seed {SEED}; pass standard=False to draw with {seed}")
        self.data = ndigit_sets("mnist", num_digits, gap, root, standard=standard, seed=seed)[split]
        self.transform = transform
        self.image_ids, self.labels = self.data.image_ids, self.data.labels
        self.numbers = list(dict.fromkeys(self.labels.tolist()))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image = self.data.images(torch.tensor(index))
        return (self.transform(image) if self.transform else image), int(self.labels[index])
