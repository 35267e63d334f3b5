"""Score maps: from a network's map to the evaluated one, the centre baseline, and maps on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    import lmdb

KINDS = {np.dtype(name).str: np.dtype(name) for name in ("uint8", "float16", "float32", "float64")}


def resize_normalize(maps: Tensor, size: int | tuple[int, int] = 224) -> Tensor:
    """Bicubic resize (a = -0.75, no antialiasing), then min-max per map: the order matters, bicubic overshoots.

    A map with NaN or infinity, and a constant one, becomes all zero.

    Args:
        maps: (N, h, w) floating; computed in float32 or float64.
        size: side or (height, width).

    Returns:
        (N, H, W) in [0, 1], on the same device.
    """
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()
    height, width = (size, size) if isinstance(size, int) else size
    varied = maps.flatten(1).amax(1) > maps.flatten(1).amin(1)  # bicubic makes rounding noise of a constant
    maps = interpolate(maps[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    usable = maps.isfinite().all(2, keepdim=True).all(1, keepdim=True) & varied[:, None, None] & (high > low)
    return torch.where(usable, (maps - low) / torch.where(usable, high - low, 1), 0).clamp(0, 1)


def center_gaussian(size: int | tuple[int, int] = 224, sigma: float = 0.5) -> np.ndarray:
    """The centre baseline: an isotropic Gaussian at the centre of the map, min-max normalised.

    Args:
        size: side or (height, width).
        sigma: in units of half the longer side; MaxBoxAcc and PxAP do not depend on it.

    Returns:
        (H, W) float64 in [0, 1].
    """
    height, width = (size, size) if isinstance(size, int) else size
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None] - (width - 1) / 2
    gaussian = np.exp(-(y**2 + x**2) / (2 * (sigma * max(height, width) / 2) ** 2))
    low, high = gaussian.min(), gaussian.max()
    return (gaussian - low) / (high - low) if high > low else np.zeros((height, width))


class ScoreMaps:
    """Score maps on disk: a folder of <image id>.npy, as the reference writes them, or an LMDB (a path on .lmdb).

    The LMDB holds one value per id: the dtype's name, the shape, the bytes; uint8 maps take 50 kB instead of 400.

    Args:
        path: folder or LMDB, created by the first `write`.
        dtype: of what `write` stores: uint8 (levels of 1/255, exact for box metrics), float16, float32 or float64.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, path: str | Path, dtype: str = "float64"):
        self.path = Path(path)
        if np.dtype(dtype).str not in KINDS:
            raise ValueError(f"dtype: uint8, float16, float32 or float64 was expected, got {dtype}")
        self.dtype = np.dtype(dtype)
        self._environment: lmdb.Environment | None = None

    def write(self, image_ids: list[str], maps: Tensor) -> None:
        """Store maps (N, H, W) in [0, 1]. OSError names the file when the disk is full; nothing half-written stays."""
        arrays = maps.double().cpu().numpy()
        arrays = (arrays * 255).astype(np.uint8) if self.dtype == np.uint8 else arrays.astype(self.dtype)
        if self._is_lmdb:
            self._put(image_ids, arrays)
        else:
            for name, each in zip(image_ids, arrays, strict=True):
                self._save(name, each)

    def read(self, image_id: str) -> np.ndarray:
        """One map (H, W). FileNotFoundError if there is none, ValueError naming the file if it is damaged."""
        found = self._get(image_id) if self._is_lmdb else self._load(image_id)
        if found.ndim != 2:
            raise ValueError(f"{self._where(image_id)}: a map of shape (H, W) was expected, got {found.shape}")
        return found

    @property
    def _is_lmdb(self) -> bool:
        return self.path.suffix == ".lmdb"

    def _where(self, image_id: str) -> str:
        return f"{self.path}, key {image_id!r}" if self._is_lmdb else str(self.path / f"{image_id}.npy")

    def _save(self, image_id: str, array: np.ndarray) -> None:
        target = self.path / f"{image_id}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            with open(partial, "wb") as file:
                np.save(file, array)
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, f"{target}: the map could not be written ({error.strerror})") from error

    def _load(self, image_id: str) -> np.ndarray:
        path = self.path / f"{image_id}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no score map of image {image_id!r}")
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: the score map is truncated or no .npy file ({error})") from error

    def _open(self, write: bool) -> lmdb.Environment:
        import lmdb

        if self._environment is None:
            if not write and not self.path.exists():
                raise FileNotFoundError(f"{self.path}: no such LMDB")
            options = {"readonly": False, "map_size": 1 << 40} if write else {"readonly": True, "lock": False}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._environment = lmdb.open(str(self.path), subdir=False, max_readers=512, **options)
            except lmdb.Error as error:
                raise ValueError(f"{self.path}: truncated or no LMDB ({error})") from error
            pages = self._environment.info()["last_pgno"] + 1
            wanted = pages * self._environment.stat()["psize"]
            if not write and self.path.stat().st_size < wanted:  # reading on would be a bus error
                size = self.path.stat().st_size
                raise ValueError(f"{self.path}: truncated LMDB, {wanted} bytes were expected, got {size}")
        return self._environment

    def _put(self, image_ids: list[str], arrays: np.ndarray) -> None:
        """All maps of a batch in one transaction: all are stored, or none."""
        import lmdb

        head = f"{arrays.dtype.str} {arrays.shape[1]} {arrays.shape[2]}\n".encode()
        try:
            with self._open(write=True).begin(write=True) as transaction:
                for name, array in zip(image_ids, arrays, strict=True):
                    transaction.put(name.encode(), head + array.tobytes())
        except lmdb.Error as error:
            raise OSError(f"{self.path}: the maps of a batch could not be written ({error})") from error

    def _get(self, image_id: str) -> np.ndarray:
        import lmdb

        try:
            with self._open(write=False).begin() as transaction:
                value = transaction.get(image_id.encode())
        except lmdb.Error as error:
            raise ValueError(f"{self.path}: the LMDB is truncated or damaged ({error})") from error
        if value is None:
            raise FileNotFoundError(f"{self.path}: no score map of image {image_id!r}")
        try:
            head, body = value.split(b"\n", 1)
            kind, height, width = head.decode().split()
            return np.frombuffer(body, KINDS[kind]).reshape(int(height), int(width)).copy()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self._where(image_id)}: the stored map is damaged ({error})") from error
