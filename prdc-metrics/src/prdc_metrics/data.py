"""Images to be embedded, from folders, archives and arrays; and the experiments' two small data sets.

Every image becomes RGB, float32, channels first, in [0, 1].
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import MNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from prdc_metrics.feature_files import as_tensor
from prdc_metrics.inception import resize_as_tensorflow
from shared_utils.images import SUFFIXES, BrokenFile, as_shown, image_files, read_image

logger = logging.getLogger(__name__)

# ---- images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resize:
    """(..., 3, h, w) floating in [0, 1] -> (..., 3, H, W) in [0, 1]; the aspect ratio is not kept."""

    size: tuple[int, int]
    """(H, W)"""
    method: str = "bilinear"
    """bilinear or bicubic, both with antialias, or tensorflow: as FID's graph resizes"""

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == self.size:
            return images
        if self.method == "tensorflow":
            return resize_as_tensorflow(images, self.size)
        return F.resize(images, list(self.size), InterpolationMode(self.method), antialias=True).clamp(0, 1)

    def __str__(self) -> str:
        how = "bilinear as TensorFlow 1" if self.method == "tensorflow" else f"{self.method} antialias"
        return f"{self.size[0]}x{self.size[1]} {how}"


def as_rgb(image: Image.Image | Tensor | np.ndarray) -> Tensor:
    """One image -> (3, H, W) float32 in [0, 1]; a PIL image as `shared_utils.images.as_shown` converts it.

    Args:
        image: a PIL image, or a tensor or array (H, W), (1, H, W), (3, H, W), or (H, W, 3) when uint8;
            uint8 or floating in [0, 1].

    Raises:
        ValueError: another shape or dtype, or floats outside [0, 1].
    """
    if not isinstance(image, Image.Image):
        return _rgb_stack(as_tensor(image)[None])[0]
    return F.to_dtype(F.pil_to_tensor(as_shown(image)), torch.float32, scale=True)


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
    """The images of a folder or zip archive, sorted by relative POSIX path: (3, H, W) float32 in [0, 1].

    `shared_utils.images` decides what counts as an image and how it becomes 8-bit RGB; the log counts files that are
    left out.

    Args:
        folder: searched through links, or a .zip; hidden files and folders are skipped.
        resize: what to do while loading, so that images of different sizes batch; None keeps the size.
        skip_broken: an unreadable image comes back as the BrokenFile that names it instead of being raised,
            so that a loader's main process can count, log and leave it out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another file instead of a folder, a damaged archive, no images.
        BrokenFile: on access: an unreadable image.
    """

    def __init__(self, folder: str | Path, *, resize: Resize | None = None, skip_broken: bool = False):
        self.folder, self.resize, self.skip_broken = Path(folder), resize, skip_broken
        self.zipped = self.folder.is_file() and self.folder.suffix.lower() == ".zip"
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        if self.folder.is_file() and not self.zipped:
            raise ValueError(f"{self.folder}: is a file; expected an image folder or a .zip")
        if self.zipped:
            names, left_out = _sorted_out(self._archive().namelist())
        else:
            files, left_out = image_files(self.folder)
            names = [path.relative_to(self.folder).as_posix() for path in files]
        self.names = sorted(names)
        if left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            logger.info("%s: %d images; left out: %s", self.folder, len(self.names), counts)
        if not self.names:
            raise ValueError(f"{self.folder}: contains no images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor | BrokenFile:
        try:
            path = self.folder / self.names[index]
            rgb = as_rgb(read_image(io.BytesIO(self._content(index)) if self.zipped else path, name=str(path)))
        except BrokenFile as error:
            if self.skip_broken:
                return error
            raise
        return rgb if self.resize is None else self.resize(rgb)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def _archive(self) -> zipfile.ZipFile:
        """Opened once per process: forked workers share a file's position."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.folder)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.folder}: is not a complete zip archive ({error}); copy it again") from None
        return self._opened[1]

    def _content(self, index: int) -> bytes:
        name = self.names[index]
        if not self.zipped:
            return (self.folder / name).read_bytes()
        try:
            return self._archive().read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted, foreign method
            raise BrokenFile(f"{self.folder / name}: {error}; replace the file, or pass --skip-broken") from None

    def content_digest(self, indices: Tensor) -> str:
        """sha256 over the names and bytes of the files at `indices`: the content half of a cache key."""
        digest = hashlib.sha256()
        for index in indices.tolist():
            content = hashlib.sha256(self._content(index)).digest()
            digest.update(self.names[index].encode() + b"\0" + content)
        return digest.hexdigest()


def _sorted_out(names: list[str]) -> tuple[list[str], Counter[str]]:
    """The images among an archive's entries, and the number of other entries of each kind."""
    images, left_out = [], Counter[str]()
    for path in map(PurePosixPath, (name for name in names if not name.endswith("/"))):
        if any(part.startswith((".", "__MACOSX")) for part in path.parts):
            left_out["hidden"] += 1
        elif path.suffix.lower() in SUFFIXES:
            images.append(str(path))
        else:
            left_out[path.suffix.lower() or "no suffix"] += 1
    return images, left_out


class ImageArray(Dataset):
    """Images in memory: a tensor or array (n, H, W), (n, 1, H, W), (n, 3, H, W), or (n, H, W, 3) when uint8.

    Args:
        images: uint8, or floating in [0, 1]; kept as they are, an item is (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: anything else; the message holds shape, dtype and range.
    """

    def __init__(self, images: Tensor | np.ndarray):
        self.images = as_tensor(images)
        bounded = self.images.dtype == torch.uint8  # no range to check: one image is enough to check shape and dtype
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
    except Exception as error:  # torchvision's parser fails an assertion or a reshape
        raise ValueError(f"{raw}: MNIST is damaged ({error}); delete the folder and run: {fetch}") from error
    return LabelledImages(mnist.data, mnist.targets)


def load_digits() -> LabelledImages:
    """scikit-learn's digits: (1797, 8, 8) float32, value / 16 in [0, 1], and (1797,) int64 labels."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    return LabelledImages(images.float() / 16, labels.long())


def dataset_record(name: str, array: Tensor | np.ndarray) -> dict:
    """What a run record says about its data: name, shape, and the first 16 hex digits of the bytes' sha256."""
    array = np.ascontiguousarray(array.detach().cpu().numpy() if isinstance(array, Tensor) else array)
    return {"name": name, "shape": list(array.shape), "sha256": hashlib.sha256(array.data).hexdigest()[:16]}
