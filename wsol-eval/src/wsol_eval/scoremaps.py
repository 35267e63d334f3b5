"""Score maps: from a network's map to the evaluated one, the centre baseline, and maps on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from shared_utils.files import whole_file
from wsol_eval.sweep import as_tensor, check_range

if TYPE_CHECKING:
    import lmdb

Maps = np.ndarray | Tensor | Sequence[np.ndarray | Tensor]
KINDS = {np.dtype(name).str: np.dtype(name) for name in ("uint8", "float16", "float32", "float64")}


def as_maps(maps: Maps) -> Tensor | list[Tensor]:
    """Score maps as tools give them, as one tensor (N, H, W), or as N tensors (H, W) where their sizes differ.

    Taken are arrays and tensors (H, W), (N, H, W) and (N, 1, H, W) (pytorch-grad-cam, Captum), and sequences of maps
    (H, W) or (1, H, W).

    Raises:
        TypeError: anything else than floating or uint8 arrays and tensors.
        ValueError: another shape.
    """
    if isinstance(maps, np.ndarray | Tensor):
        tensor = as_tensor(maps, "score_maps")
        if tensor.ndim == 4 and tensor.shape[1] == 1:
            tensor = tensor[:, 0]
        if tensor.ndim == 2:
            tensor = tensor[None]
        if tensor.ndim != 3 or 0 in tensor.shape[1:]:
            shapes = "(H, W), (N, H, W) or (N, 1, H, W)"
            raise ValueError(f"score_maps: expected shape {shapes}, got {tuple(tensor.shape)}")
        return tensor
    if isinstance(maps, str) or not isinstance(maps, Sequence):
        raise TypeError(f"score_maps: expected an array, a tensor or a sequence of them, got {type(maps).__name__}")
    single = [as_maps(each) for each in maps]
    for each in single:
        if not isinstance(each, Tensor) or len(each) != 1:
            raise ValueError("score_maps: in a sequence, each map has the shape (H, W) or (1, H, W)")
    tensors = [each[0] for each in single]
    same = len({(each.shape, each.dtype, each.device) for each in tensors}) == 1
    return torch.stack(tensors) if same else tensors


def resize_normalize(maps: Maps, size: int | tuple[int, int] = 224) -> Tensor:
    """Bicubic resize (a = -0.75, no antialiasing), then min-max per map: the order matters, bicubic overshoots.

    A map with NaN or infinity, and a constant one, becomes all zero.

    Args:
        maps: (N, h, w) floating, or as `as_maps` takes them; computed in float32 or float64.
        size: side or (height, width).

    Returns:
        (N, H, W) in [0, 1], on the same device.
    """
    maps = as_maps(maps)
    if not isinstance(maps, Tensor):
        return torch.cat([resize_normalize(each, size) for each in maps])
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
            raise ValueError(f"dtype: expected uint8, float16, float32 or float64, got {dtype}")
        self.dtype = np.dtype(dtype)
        self._environment: lmdb.Environment | None = None

    def write(self, image_ids: list[str], maps: Tensor) -> None:
        """Store maps (N, H, W) in [0, 1]. OSError names the file when the disk is full; nothing half-written stays.

        Raises:
            ValueError: NaN or values outside [0, 1].
        """
        check_range(maps, "maps")
        arrays = maps.double().cpu().numpy()
        arrays = (arrays * 255).astype(np.uint8) if self.dtype == np.uint8 else arrays.astype(self.dtype)
        if self._is_lmdb:
            self._put(image_ids, arrays)
        else:
            for name, each in zip(image_ids, arrays, strict=True):
                self._save(name, each)

    def read(self, image_id: str) -> np.ndarray:
        """One map (H, W), without axes of length 1 before it.

        FileNotFoundError if there is none, ValueError naming the file if it is damaged.
        """
        found = self._get(image_id) if self._is_lmdb else self._load(image_id)
        while found.ndim > 2 and len(found) == 1:
            found = found[0]
        if found.ndim != 2:
            raise ValueError(f"{self._where(image_id)}: expected a map of shape (H, W), got {found.shape}")
        return found

    @property
    def _is_lmdb(self) -> bool:
        return self.path.suffix == ".lmdb"

    def _where(self, image_id: str) -> str:
        return f"{self.path}, key {image_id!r}" if self._is_lmdb else str(self.path / f"{image_id}.npy")

    def _save(self, image_id: str, array: np.ndarray) -> None:
        target = self.path / f"{image_id}.npy"
        with whole_file(target) as temporary, open(temporary, "wb") as file:
            np.save(file, array)

    def _load(self, image_id: str) -> np.ndarray:
        """<id>.npy as `write` names it, or without the id's suffix as in the reference's README; or the same as .pt."""
        stem = Path(image_id).with_suffix("")
        places = [self.path / f"{name}{suffix}" for suffix in (".npy", ".pt") for name in (image_id, stem)]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{places[0]}: no score map of image {image_id!r}, nor {stem}.npy or .pt")
        try:
            if path.suffix == ".pt":
                return torch.load(path, map_location="cpu", weights_only=True).detach().float().numpy()
            return np.load(path, allow_pickle=False)
        except Exception as error:  # zip, pickle and header errors of a damaged or foreign file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: the score map is truncated or no map ({reason})") from error

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
                raise ValueError(f"{self.path}: truncated LMDB, expected {wanted} bytes, got {size}")
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
