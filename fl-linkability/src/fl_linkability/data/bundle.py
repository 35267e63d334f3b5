"""Users with two devices each, and what goes with them: held-out images, a population test set, background images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PRIOR, ANONYMOUS = 0, 1
NOTHING = 0  # among words: padding, or a target that is neither learnt nor counted
CHECKED_BYTES = 2**28
Task = Literal["class", "words", "labels", "number"]


def task_of(y: Tensor) -> Task:
    """The task that targets define: int64 (n,) a class, (n, length) words; float32 (n, K) labels, (n,) a number."""
    if y.is_floating_point():
        return "labels" if y.ndim == 2 else "number"
    return "words" if y.ndim == 2 else "class"


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that may be on disk; only what is indexed is read.

    Args:
        whole: (N, ...), such as a memory map.
        rows: int64 (n,).
    """

    whole: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | int | np.ndarray | Tensor) -> Tensor:
        return self.whole[self.rows[index]]

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        return (len(self.rows), *self.whole.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""
        return self.whole.dtype

    def split(self, size: int) -> Iterator[Tensor]:
        """One part after the other, as a tensor's `split`."""
        return (self.whole[part] for part in self.rows.split(size))


@dataclass(frozen=True)
class UserDataset:
    """Samples of users, each sample on one device.

    Args:
        x: images float32 in any range or uint8 (divided by 255 on use), (M, C, H, W); features (M, D); or
            tokens int64 (M, length). `Rows` if they are on disk.
        y: int64 (M,) classes, float32 (M, K) of zeros and ones, float32 (M,) numbers, or int64 (M, length): the word to
            predict at each position of a text, NOTHING if there is none.
        user: int64 (M,), 0 .. n_users - 1.
        device: int64 (M,), 0 .. n_devices - 1.
        role: int64 (M,), PRIOR if the adversary knows the owner of the sample's device, else ANONYMOUS. By default a
            user's first device (by number) is the prior one and all others are anonymous.
        check_images: refuse samples that two devices of one user share (hashes every sample).

    Raises:
        ValueError: different lengths, non-finite x, a user or device without samples, a device with two users
            or roles, shared samples.
    """

    x: Tensor | Rows
    y: Tensor
    user: Tensor
    device: Tensor
    role: Tensor | None = None
    check_images: bool = True
    device_user: np.ndarray = field(init=False)
    device_role: np.ndarray = field(init=False)
    _rows: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_pair(self.x, self.y, "users")
        parts = [self.user, self.device, *([] if self.role is None else [self.role])]
        lengths = {len(self.x), *map(len, parts)}
        if lengths != {len(self.x)}:
            raise ValueError(f"x, user, device and role must have the same length, got {sorted(lengths)}")
        device, user = self.device.numpy(), self.user.numpy()
        count = np.bincount(device)
        if not count.all():
            raise ValueError(f"device {int(np.argmin(count))} has no images")
        owner = _of_device(user, device, "users")
        per_user = np.bincount(owner)
        if not per_user.all():
            raise ValueError(f"user {int(np.argmin(per_user))} has no images: number the users 0 .. n_users - 1")
        if self.role is None:
            first = np.array([int(np.argmax(owner == who)) for who in range(len(per_user))])
            role = np.where(np.arange(len(owner)) == first[owner], PRIOR, ANONYMOUS)
        else:
            role = _of_device(self.role.numpy(), device, "roles")
            if not np.isin(role, (PRIOR, ANONYMOUS)).all():
                raise ValueError(f"role must be {PRIOR} (prior) or {ANONYMOUS} (anonymous), got {sorted(set(role))}")
        order = np.argsort(device, kind="stable")
        start = np.concatenate([[0], np.cumsum(count)])
        object.__setattr__(self, "device_user", owner)
        object.__setattr__(self, "device_role", role)
        object.__setattr__(self, "_rows", [order[a:b] for a, b in zip(start[:-1], start[1:], strict=True)])
        if self.check_images:
            self._refuse_shared_images()

    @property
    def n_devices(self) -> int:
        """All devices of all users."""
        return len(self.device_user)

    @property
    def n_users(self) -> int:
        """Users."""
        return int(self.device_user.max()) + 1

    def rows(self, device: int) -> np.ndarray:
        """Indices of a device's images."""
        return self._rows[device]

    def of_device(self, device: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a device."""
        rows = self._rows[device]
        if rows[-1] - rows[0] == len(rows) - 1:  # contiguous: a view, even of a memory map
            return self.x[rows[0] : rows[-1] + 1], self.y[rows[0] : rows[-1] + 1]
        return self.x[rows], self.y[rows]

    def _refuse_shared_images(self) -> None:
        images = self.x[:].numpy()
        seen: dict[tuple[int, bytes], int] = {}
        for device, rows in enumerate(self._rows):
            for row in rows:
                digest = hashlib.blake2b(images[row].tobytes(), digest_size=8).digest()
                other = seen.setdefault((int(self.device_user[device]), digest), device)
                if other != device:
                    raise ValueError(f"devices {other} and {device} of user {self.device_user[device]} share an image")


@dataclass(frozen=True)
class Background:
    """Labelled images that belong to no user; `features` (n, d) if a network has embedded them for clustering."""

    x: Tensor | Rows
    y: Tensor
    features: Tensor | None = None

    def __post_init__(self) -> None:
        _check_pair(self.x, self.y, "background")


@dataclass(frozen=True)
class FederatedBundle:
    """Everything that an experiment needs from a data set."""

    name: str
    users: UserDataset
    user_test: tuple[Tensor | Rows, Tensor, Tensor]
    """held-out images of the users: x, y, user"""
    test: tuple[Tensor | Rows, Tensor]
    """population test set"""
    background: Background
    n_classes: int
    """classes, labels, words, or the largest number"""
    skipped: int = 0
    """broken files that were skipped"""
    vocabulary: int = 0
    """texts: tokens are smaller than this"""

    @property
    def task(self) -> Task:
        """What the network learns."""
        return task_of(self.users.y)

    def record(self) -> dict:
        """For the run record: sizes and a checksum of the users' images (of 1,000 of them if there are many)."""
        users = self.users
        few = len(users.x) * users.x[0].nbytes <= CHECKED_BYTES
        part = users.x[:] if few else users.x[np.linspace(0, len(users.x) - 1, 1000).astype(np.int64)]
        digest = hashlib.sha256(np.ascontiguousarray(part.numpy()).tobytes()).hexdigest()[:16]
        return {
            "name": self.name,
            "users": users.n_users,
            "devices": users.n_devices,
            "images": len(users.x),
            "user_test": len(self.user_test[0]),
            "test": len(self.test[0]),
            "background": len(self.background.x),
            "sha256": digest,
        }


def _of_device(values: np.ndarray, device: np.ndarray, what: str) -> np.ndarray:
    """What all samples of each device have in common."""
    common = np.zeros(device.max() + 1, dtype=np.int64)
    common[device] = values
    if (common[device] != values).any():
        raise ValueError(f"device {int(device[(common[device] != values)][0])} has images of two {what}")
    return common


def _check_pair(x: Tensor | Rows, y: Tensor, what: str) -> None:
    if not isinstance(x, Tensor | Rows) or not isinstance(y, Tensor):
        raise TypeError(f"{what}: x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    if len(x) != len(y):
        raise ValueError(f"{what}: x and y must have the same length, got {len(x)} and {len(y)}")
    if x.dtype not in (torch.float32, torch.uint8, torch.int64):
        raise TypeError(f"{what}: x must be float32, uint8 or int64 (tokens), got {x.dtype}")
    if y.dtype not in (torch.int64, torch.float32):
        raise TypeError(f"{what}: y must be int64 classes or words, or float32 labels or numbers, got {y.dtype}")
    if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
        raise ValueError(f"{what}: x holds NaN or infinity")
