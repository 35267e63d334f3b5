"""Users with two devices each, and what goes with them: held-out images, a population test set, background images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PRIOR, ANONYMOUS = 0, 1


@dataclass(frozen=True)
class UserDataset:
    """Images of users, each image on one device.

    Args:
        x: float32 in any range, or uint8 (divided by 255 where it is used), (M, C, H, W) or features (M, D).
        y: int64 (M,) classes, or float32 (M, K) of zeros and ones.
        user: int64 (M,), 0 .. n_users - 1.
        device: int64 (M,), 0 .. n_devices - 1. The first device of a user (by number) holds the prior half, which the
            adversary knows; the second is anonymous.
        check_images: refuse images that two devices of one user share (hashes every image).

    Raises:
        ValueError: lengths that differ, non-finite x, a device without images or of two users, shared images.
    """

    x: Tensor
    y: Tensor
    user: Tensor
    device: Tensor
    check_images: bool = True
    device_user: np.ndarray = field(init=False)
    device_role: np.ndarray = field(init=False)
    _rows: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_pair(self.x, self.y, "users")
        lengths = {len(self.x), len(self.user), len(self.device)}
        if lengths != {len(self.x)}:
            raise ValueError(f"x, user and device must be of one length, got {sorted(lengths)}")
        device, user = self.device.numpy(), self.user.numpy()
        count = np.bincount(device)
        if not count.all():
            raise ValueError(f"device {int(np.argmin(count))} has no images")
        owner = np.zeros(len(count), dtype=np.int64)
        owner[device] = user
        if (owner[device] != user).any():
            raise ValueError(f"device {int(device[(owner[device] != user)][0])} has images of two users")
        role = np.array([int((owner[:number] == who).sum()) for number, who in enumerate(owner)])
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
        if rows[-1] - rows[0] == len(rows) - 1:  # contiguous: a view, also of a memory map
            return self.x[rows[0] : rows[-1] + 1], self.y[rows[0] : rows[-1] + 1]
        return self.x[rows], self.y[rows]

    def _refuse_shared_images(self) -> None:
        images = self.x.numpy()
        seen: dict[tuple[int, bytes], int] = {}
        for device, rows in enumerate(self._rows):
            for row in rows:
                digest = hashlib.blake2b(images[row].tobytes(), digest_size=8).digest()
                other = seen.setdefault((int(self.device_user[device]), digest), device)
                if other != device:
                    raise ValueError(f"devices {other} and {device} of user {self.device_user[device]} share an image")


@dataclass(frozen=True)
class Background:
    """Labelled images that belong to no user; `features` (n, d) where a network has embedded them for clustering."""

    x: Tensor
    y: Tensor
    features: Tensor | None = None

    def __post_init__(self) -> None:
        _check_pair(self.x, self.y, "background")


@dataclass(frozen=True)
class FederatedBundle:
    """All that an experiment needs of a data set."""

    name: str
    users: UserDataset
    user_test: tuple[Tensor, Tensor, Tensor]
    """held-out images of the users: x, y, user"""
    test: tuple[Tensor, Tensor]
    """population test set"""
    background: Background
    n_classes: int

    @property
    def multi_label(self) -> bool:
        """Several classes per image (float targets)."""
        return self.users.y.is_floating_point()

    def record(self) -> dict:
        """For the run record: sizes and a checksum of the users' images."""
        users = self.users
        part = users.x if len(users.x) <= 100_000 else users.x[:1000]
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


def _check_pair(x: Tensor, y: Tensor, what: str) -> None:
    if len(x) != len(y):
        raise ValueError(f"{what}: x and y must be of one length, got {len(x)} and {len(y)}")
    if x.dtype not in (torch.float32, torch.float64, torch.uint8):
        raise TypeError(f"{what}: x must be float32, float64 or uint8, got {x.dtype}")
    if y.dtype not in (torch.int64, torch.float32):
        raise TypeError(f"{what}: y must be int64 classes or float32 zeros and ones, got {y.dtype}")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise ValueError(f"{what}: x holds NaN or infinity")
