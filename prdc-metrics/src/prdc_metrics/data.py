"""What may be scored: feature files, image folders, image arrays; and the experiments' two small data sets.

Every image becomes RGB, float32, channels first, in [0, 1]. No pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import MNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from shared_utils.images import SUFFIXES, BrokenFile, image_files, read_image

logger = logging.getLogger(__name__)

FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors", ".csv", ".parquet")
NAMES = ("features", "reps")  # ours, and dgm-eval's


# ---- features ----------------------------------------------------------------------------------------------


def load_features(path: str | Path) -> Tensor:
    """Read an (n, D) feature matrix, dtype as stored, on the CPU.

    Args:
        path: .npy, .pt (a tensor, loaded with weights_only), .npz or .safetensors, where of several arrays the one
            called "features" or "reps" is taken and a single one may have any name; .csv (with a header or without) or
            .parquet, all of whose columns are numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown suffix, damaged file, pickled objects, no numeric (n, D) matrix with n, D >= 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such feature file")
    if path.suffix.lower() not in FEATURE_SUFFIXES:
        raise ValueError(f"{path}: a feature file ends in one of {', '.join(FEATURE_SUFFIXES)}")
    try:
        features = _as_tensor(_only_array(_parse_features(path)))
    except Exception as error:  # four parsers, each with its own exceptions for a damaged file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as features ({type(error).__name__}: {reason})") from error
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{path}: features are (n, D) with n, D >= 1, this is {tuple(features.shape)}")
    return features


def _parse_features(path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if suffix in (".csv", ".parquet"):
        return _parse_frame(path)
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        return loaded
    with loaded:  # members are read when asked for
        return _only_array(loaded)


def _parse_frame(path: Path) -> np.ndarray:
    import pandas as pd

    if path.suffix.lower() == ".parquet":
        frame = pd.read_parquet(path)
    else:
        first = pd.read_csv(path, header=None, nrows=1)
        headless = all(pd.api.types.is_numeric_dtype(kind) for kind in first.dtypes)
        frame = pd.read_csv(path, header=None if headless else "infer")
    words = frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]
    if len(words):
        raise ValueError(f"column {words[0]!r} holds no numbers; leave it out")
    return frame.to_numpy()


def _only_array(loaded: object) -> object:
    if not isinstance(loaded, Mapping):
        return loaded
    for name in NAMES:
        if name in loaded:
            return loaded[name]
    if {"mu", "sigma"} <= set(loaded):
        raise ValueError("holds the mean and covariance that FID needs; these metrics need the samples themselves")
    if len(loaded) != 1:
        raise ValueError(f"holds {sorted(loaded) or 'nothing'}, expected 'features', 'reps' or a single array")
    return next(iter(loaded.values()))


def _as_tensor(array: object) -> Tensor:
    """A tensor or array of real numbers as a tensor on the CPU, dtype kept."""
    if not isinstance(array, Tensor | np.ndarray):
        raise ValueError(f"expected a tensor or an array, found {type(array).__name__}")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "iuf":
            raise ValueError(f"expected real numbers, found {array.dtype}")
        array = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if array.dtype == torch.bool or array.is_complex():
        raise ValueError(f"expected real numbers, found {array.dtype}")
    return array.detach().cpu()


# ---- images ------------------------------------------------------------------------------------------------


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., 3, h, w) -> (..., 3, H, W) with `size` = (H, W): bilinear, antialias, aspect ratio not kept."""
    return F.resize(images, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def as_rgb(image: Image.Image | Tensor | np.ndarray) -> Tensor:
    """One image -> (3, H, W) float32 in [0, 1].

    PIL modes: 16-bit grey keeps its 16 bits (value / 65535); palettes are looked up; CMYK is converted; alpha
    is dropped, not composited, as pytorch-fid and torch-fidelity do; EXIF orientation is ignored.

    Args:
        image: a PIL image, or a tensor or array (H, W), (1, H, W), (3, H, W), or (H, W, 3) when uint8;
            uint8 or floating in [0, 1].

    Raises:
        ValueError: another shape or dtype, or floats outside [0, 1].
    """
    if not isinstance(image, Image.Image):
        return _rgb_stack(_as_tensor(image)[None])[0]
    if image.mode.startswith("I"):  # 16-bit PNG: "I;16" or, in older Pillow, "I"
        grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
        return grey.clamp(0, 1).expand(3, -1, -1)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette with transparency warns when converted to RGB in one step
    return F.to_dtype(F.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)


def _rgb_stack(images: Tensor) -> Tensor:
    """(n, H, W), (n, 1, H, W), (n, 3, H, W) or uint8 (n, H, W, 3) -> (n, 3, H, W) float32 in [0, 1]."""
    found = f"{tuple(images.shape)} {images.dtype}"
    if images.ndim == 3:
        images = images[:, None]  # (n, 1, H, W)
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2)  # (n, 3, H, W)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        layouts = "(n, H, W), (n, 1, H, W), (n, 3, H, W) or uint8 (n, H, W, 3)"
        raise ValueError(f"images are {layouts}, these are {found}")
    if images.dtype == torch.uint8:
        images = F.to_dtype(images, torch.float32, scale=True)  # as for PIL images, to the last bit
    elif images.is_floating_point():
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # NaN fails as well
            raise ValueError(f"floating images lie in [0, 1], these are {found} in [{low:g}, {high:g}]")
    else:
        raise ValueError(f"images are uint8 or floating in [0, 1], these are {found}")
    return images.float().expand(-1, 3, -1, -1)


class ImageFiles(Dataset):
    """The images of a folder and its subfolders, sorted by relative POSIX path: (3, H, W) float32 in [0, 1].

    What counts as an image, and how it becomes 8-bit RGB, is `shared_utils.images`' to say; files that are left out are
    counted in the log.

    Args:
        folder: searched through links; hidden files and folders are passed over.
        size: (H, W) to resize to while loading, so that images of different sizes batch; None keeps the size.
        skip_broken: an unreadable image comes back as the BrokenFile that names it instead of being raised,
            so that a loader's main process can count, log and leave it out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file instead of a folder, a folder without images.
        BrokenFile: on access: an unreadable image.
    """

    def __init__(self, folder: str | Path, *, size: tuple[int, int] | None = None, skip_broken: bool = False):
        self.folder, self.size, self.skip_broken = Path(folder), size, skip_broken
        if self.folder.is_file():
            raise ValueError(f"{self.folder}: is a file, an image folder was expected")
        files, left_out = image_files(self.folder)
        self.names = sorted(path.relative_to(self.folder).as_posix() for path in files)
        if left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            logger.info("%s: %d images; left out: %s", self.folder, len(self.names), counts)
        if not self.names:
            raise ValueError(f"{self.folder}: holds no images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor | BrokenFile:
        try:
            rgb = as_rgb(read_image(self.folder / self.names[index]))
        except BrokenFile as error:
            if self.skip_broken:
                return error
            raise
        return rgb if self.size is None else resize(rgb, self.size)

    def content_digest(self, indices: Tensor) -> str:
        """sha256 over the names and bytes of the files at `indices`: the content half of a cache key."""
        digest = hashlib.sha256()
        for index in indices.tolist():
            content = (self.folder / self.names[index]).read_bytes()
            digest.update(self.names[index].encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()


def load_sample_archive(path: str | Path) -> np.ndarray | None:
    """Images (n, H, W, 3) uint8 of a sample archive as guided-diffusion writes them; None for any other file.

    There the images are the first array of an .npz, named arr_0, and labels may follow.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with np.load(path, allow_pickle=False) as loaded:
        if "arr_0" not in loaded or set(loaded) & set(NAMES):
            return None
        images = loaded["arr_0"]
    return images if images.ndim == 4 and images.dtype == np.uint8 else None


class ImageArray(Dataset):
    """Images in memory: a tensor or array (n, H, W), (n, 1, H, W), (n, 3, H, W), or (n, H, W, 3) when uint8.

    Args:
        images: uint8, or floating in [0, 1]; kept as they are, an item is (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: anything else; the message holds shape, dtype and range.
    """

    def __init__(self, images: Tensor | np.ndarray):
        self.images = _as_tensor(images)
        bounded = self.images.dtype == torch.uint8  # no range to check: one image shows all that can be wrong
        _rgb_stack(self.images[:1] if bounded else self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return as_rgb(self.images[index])

    def content_digest(self, indices: Tensor) -> str:
        """sha256 over shape, dtype and bytes of the images at `indices`."""
        chosen = self.images[indices].contiguous()
        digest = hashlib.sha256(f"{tuple(chosen.shape)} {chosen.dtype}".encode())
        digest.update(chosen.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def subset(n_items: int, num_samples: int | None, seed: int) -> Tensor:
    """Ascending int64 indices of min(n_items, num_samples) different items, the same for the same seed.

    Args:
        n_items: size of the set.
        num_samples: how many to keep; None, or at least n_items, keeps all.
        seed: of the draw without replacement.

    Raises:
        ValueError: num_samples < 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if num_samples is None or num_samples >= n_items:
        return torch.arange(n_items)
    chosen = torch.randperm(n_items, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return chosen.sort().values


# ---- data sets of the experiments --------------------------------------------------------------------------


class LabelledImages(NamedTuple):
    """Images (n, H, W) and their classes (n,) int64."""

    images: Tensor
    labels: Tensor


def load_mnist(data_root: str | Path, train: bool) -> LabelledImages:
    """MNIST as (n, 28, 28) uint8 and (n,) int64 labels; n is 60000 (train) or 10000.

    Raises:
        FileNotFoundError: the idx files are not under data_root/MNIST/raw; nothing is downloaded.
        ValueError: they are damaged.
    """
    raw = Path(data_root) / "MNIST" / "raw"
    files = [raw / Path(url).stem for url, _ in MNIST.resources]
    fetch = f"python -c \"from torchvision.datasets import MNIST; MNIST(r'{data_root}', download=True)\""
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{raw}: MNIST lacks {', '.join(missing)}; fetch it with: {fetch}")
    try:
        mnist = MNIST(data_root, train=train, download=False)
    except Exception as error:  # torchvision's parser asserts, or fails in reshaping
        raise ValueError(f"{raw}: MNIST is damaged ({error}); delete the folder and run: {fetch}") from error
    return LabelledImages(mnist.data, mnist.targets)


def load_digits() -> LabelledImages:
    """scikit-learn's digits: (1797, 8, 8) float32, value / 16 in [0, 1], and (1797,) int64 labels."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    return LabelledImages(images.float() / 16, labels.long())


def dataset_record(name: str, array: Tensor | np.ndarray) -> dict:
    """What a run record says of its data: name, shape, and the first 16 hex digits of the bytes' sha256."""
    array = np.ascontiguousarray(array.detach().cpu().numpy() if isinstance(array, Tensor) else array)
    return {"name": name, "shape": list(array.shape), "sha256": hashlib.sha256(array.data).hexdigest()[:16]}
