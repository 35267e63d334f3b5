"""Users made from digits: each has a drawing style and prefers some classes, on both devices.

The two devices, the background and the test images come from disjoint sets of base images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import Background, FederatedBundle, UserDataset
from fl_linkability.styles import apply_styles, random_styles, upsample

NUM_CLASSES = 10


@dataclass(frozen=True)
class Pools:
    """Base images by purpose: float (n, 1, side, side) in [0, 1], and int64 labels."""

    prior: tuple[Tensor, Tensor]
    anonymous: tuple[Tensor, Tensor]
    background: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class UserSettings:
    """How users differ."""

    n_users: int = 40
    n_per_device: int = 64
    n_prior: int = 0
    """images on the prior device; 0: n_per_device"""
    alpha: float = 0.5
    """of the Dirichlet prior over classes"""
    style: bool = True
    skew: bool = True
    drift: float = 0.0
    """0: both halves alike ("random" split); 1: the anonymous half has its own style and classes"""
    iid: bool = False
    """replace every device's images by draws from all devices of the same role"""
    background_size: int = 1188
    """1188: every base image in four styles; fewer: a class-balanced subset"""

    def __post_init__(self) -> None:
        if self.n_users < 2 or self.n_per_device < 1 or self.n_prior < 0:
            raise ValueError(f"need 2 or more users and 1 image per device, got {self.n_users} and {self.n_per_device}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift must lie in [0, 1], got {self.drift}")


def make_digits_users(seed: int = 0, side: int = 16, **settings: Any) -> FederatedBundle:
    """Users from scikit-learn's 1,797 digits, cut into 600, 600, 297 and 300; `settings` as in `UserSettings`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(10_000 + seed).permutation(len(digits.images))
    images = upsample(torch.from_numpy(digits.images[order] / 16).float(), side)
    labels = torch.from_numpy(digits.target[order]).long()
    pools = Pools(*zip(images.split([600, 600, 297, 300]), labels.split([600, 600, 297, 300]), strict=True))
    return make_users(pools, UserSettings(**settings), seed, "digits")


def make_mnist_users(root: Path, seed: int = 0, side: int = 28, **settings: Any) -> FederatedBundle:
    """Users from real MNIST (torchvision's layout below root): 20,000 images per kind of device, 2,000 as background.

    Raises:
        FileNotFoundError: MNIST is not below root.
    """
    (images, labels), test = (read_mnist(root, train) for train in (True, False))
    order = torch.from_numpy(np.random.default_rng(10_000 + seed).permutation(len(images)))
    third = len(order) // 3
    splits = {"prior": order[:third], "anonymous": order[third : 2 * third], "background": order[2 * third :][:2000]}
    pools = {name: (upsample(images[rows] / 255, side), labels[rows]) for name, rows in splits.items()}
    picked = torch.from_numpy(np.random.default_rng(20_000 + seed).permutation(len(test[0])))[:2000]
    pools["test"] = (upsample(test[0][picked] / 255, side), test[1][picked])
    return make_users(Pools(**pools), UserSettings(**settings), seed, "mnist")


def read_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 28, 28) and labels int64 (n,). FileNotFoundError if MNIST is not below root."""
    from torchvision.datasets import MNIST

    try:
        mnist = MNIST(str(root), train=train)
    except RuntimeError as error:
        message = f"{root} lacks MNIST/raw: fl-linkability data --download --data-root {root}"
        raise FileNotFoundError(message) from error
    return mnist.data, mnist.targets.long()


def make_users(pools: Pools, settings: UserSettings, seed: int, name: str) -> FederatedBundle:
    """Draw users, their devices and test images, the population test set and the background."""
    rng = np.random.default_rng([seed, 1])
    s, n = settings, settings.n_users
    styles, other_styles = random_styles(n, rng), random_styles(n, rng)
    priors, other_priors = (rng.dirichlet([s.alpha] * NUM_CLASSES, n) for _ in range(2))
    if not s.skew:
        priors, other_priors = (np.full((n, NUM_CLASSES), 1 / NUM_CLASSES),) * 2
    later = (1 - s.drift) * styles + s.drift * other_styles, (1 - s.drift) * priors + s.drift * other_priors
    prior = _draw(pools.prior, styles, priors, s.n_prior or s.n_per_device, s.style, rng)
    anonymous = _draw(pools.anonymous, *later, s.n_per_device, s.style, rng)
    user_test = _draw(pools.test, *later, 16, s.style, rng)
    if s.iid:
        prior, anonymous = _mixed(prior, rng), _mixed(anonymous, rng)
    x, y, user, device = (
        torch.cat([a, b]) for a, b in zip((*prior, 2 * prior[2]), (*anonymous, 2 * anonymous[2] + 1), strict=True)
    )
    order = torch.argsort(device, stable=True)  # a device's images are contiguous
    users = UserDataset(x[order], y[order], user[order], device[order], check_images=not s.iid)
    return FederatedBundle(
        name,
        users,
        user_test,
        _restyled(pools.test, 2, s.style, rng),
        Background(*_balanced(_restyled(pools.background, 4, s.style, rng), s.background_size, rng)),
        NUM_CLASSES,
    )


def _draw(
    pool: tuple[Tensor, Tensor], styles: np.ndarray, priors: np.ndarray, n: int, styled: bool, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw n images of every user with replacement: x, y, user. A class that the pool lacks cannot be drawn."""
    images, labels = pool
    labels_np = labels.numpy()
    by_class = [np.flatnonzero(labels_np == c) for c in range(NUM_CLASSES)]
    has = np.array([len(rows) > 0 for rows in by_class])
    picks = []
    for prior in priors:
        prior = np.where(has, prior, 0)
        classes = rng.choice(NUM_CLASSES, n, p=prior / prior.sum())
        picks.append([by_class[c][rng.integers(len(by_class[c]))] for c in classes])
    rows = torch.from_numpy(np.array(picks).ravel())
    user = torch.arange(len(priors)).repeat_interleave(n)
    x = apply_styles(images[rows], styles[user.numpy()], rng) if styled else images[rows].clone()
    return x, labels[rows], user


def _mixed(device: tuple[Tensor, Tensor, Tensor], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """IID replacement: every image of these devices is replaced by one drawn from all of them."""
    x, y, user = device
    rows = torch.from_numpy(rng.integers(0, len(x), len(x)))
    return x[rows], y[rows], user


def _restyled(
    pool: tuple[Tensor, Tensor], copies: int, styled: bool, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    images, labels = pool[0].repeat(copies, 1, 1, 1), pool[1].repeat(copies)
    return (apply_styles(images, random_styles(len(images), rng), rng) if styled else images), labels


def _balanced(pool: tuple[Tensor, Tensor], size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A class-balanced subset, or everything if the pool is not larger."""
    x, y = pool
    if size >= len(x):
        return x, y
    shuffled = torch.from_numpy(rng.permutation(len(x)))
    rows = torch.cat([shuffled[y[shuffled] == c][: size // NUM_CLASSES] for c in range(NUM_CLASSES)])
    return x[rows], y[rows]
