"""Biased MNIST (section 4.2): digits on a colour that correlates with the label; also from scikit-learn's digits.

Images are coloured on demand: a set keeps its digits as masks and one colour index per image on the training
device, and colours whole batches by indexing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

COLOURS = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (225, 225, 0),  # 225, not 255, as in the released code
    (225, 0, 225),
    (0, 255, 255),
    (255, 128, 0),
    (255, 0, 128),
    (128, 0, 255),
    (128, 128, 128),
)
NUM_CLASSES = len(COLOURS)


def assign_bias(labels: Tensor, rho: float, n_confusing: int = 9, generator: torch.Generator | None = None) -> Tensor:
    """Draw the colour of every image (appendix: construction of Biased MNIST).

    Per class c: the images are shuffled, the first int(n_c * rho) get colour c, and the rest is cut into consecutive
    chunks of ceil(rest / n_confusing) for the colours c+1 .. c+n_confusing (mod 10) in shuffled order.

    Args:
        labels: (n,) integers in 0 .. 9.
        rho: share of images whose colour is their class's; 0.1 makes label and colour independent.
        n_confusing: how many other colours a class may take, 1 .. 9.
        generator: CPU generator of the shuffles.

    Returns:
        (n,) int64 colour indices.

    Raises:
        ValueError: rho outside [0, 1], n_confusing outside 1 .. 9, labels that are not (n,) integers in 0 .. 9.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must lie in [0, 1], got {rho}")
    if n_confusing not in range(1, NUM_CLASSES):
        raise ValueError(f"n_confusing must be 1 .. 9, got {n_confusing}")
    _check_labels(labels)
    bias = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        n_aligned = int(len(members) * rho)
        bias[members[:n_aligned]] = label
        conflicting = members[n_aligned:]
        others = (label + 1 + torch.randperm(n_confusing, generator=generator)) % NUM_CLASSES
        chunk = -(-len(conflicting) // n_confusing) or 1
        bias[conflicting] = others[torch.arange(len(conflicting)) // chunk]
    return bias


def colourise(grey: Tensor, bias: Tensor) -> Tensor:
    """White digits on a coloured background: every non-zero pixel becomes white, every zero pixel takes the colour.

    Args:
        grey: (n, H, W) uint8 or bool.
        bias: (n,) integer colour indices.

    Returns:
        (n, H, W, 3) uint8.

    Raises:
        ValueError: other shapes, or indices outside 0 .. 9.
    """
    if grey.ndim != 3 or bias.shape != grey.shape[:1]:
        raise ValueError(f"grey is (n, H, W) and bias (n,), got {tuple(grey.shape)} and {tuple(bias.shape)}")
    _check_labels(bias)
    colours = torch.tensor(COLOURS, dtype=torch.uint8, device=grey.device)[bias.long()][:, None, None]  # (n, 1, 1, 3)
    return torch.where((grey != 0)[..., None], torch.full_like(colours, 255), colours)


class BiasedDigits:
    """A coloured set on one device; batches are coloured and normalised to (x / 255 - .5) / .5 on the fly.

    Args:
        grey: (n, H, W) uint8 or bool; non-zero is foreground.
        labels: (n,) integers in 0 .. 9.
        bias: (n,) colour indices in 0 .. 9.
        name: name in the run record.

    Raises:
        ValueError: other shapes or values.
    """

    def __init__(self, grey: Tensor, labels: Tensor, bias: Tensor, name: str):
        if grey.ndim != 3 or not len(grey) == len(labels) == len(bias):
            shapes = ", ".join(str(tuple(each.shape)) for each in (grey, labels, bias))
            raise ValueError(f"grey is (n, H, W), labels and bias are (n,), got {shapes}")
        _check_labels(labels)
        _check_labels(bias)
        self.mask, self.labels, self.bias, self.name = grey != 0, labels.long(), bias.long(), name
        self._colours = (torch.tensor(COLOURS) / 255 - 0.5) / 0.5  # (10, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One image (3, H, W) float32 in [-1, 1], its label and its colour."""
        ground = self._colours[self.bias[index]]  # (3,)
        image = torch.where(self.mask[index][..., None], 1.0, ground).permute(2, 0, 1)
        return image, int(self.labels[index]), int(self.bias[index])

    def to(self, device: torch.device | str) -> BiasedDigits:
        """Move masks, labels and colours; returns itself."""
        for name in ("mask", "labels", "bias", "_colours"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: images (B, 3, H, W) float32 channels-last in [-1, 1], targets (B,)."""
        for index in index_batches:
            index = index.to(self.labels.device, non_blocking=True)
            ground = self._colours[self.bias[index]][:, None, None]  # (B, 1, 1, 3)
            images = torch.where(self.mask[index][..., None], 1.0, ground)  # (B, H, W, 3)
            yield images.permute(0, 3, 1, 2), self.labels[index]

    def in_all_colours(self) -> BiasedDigits:
        """Every digit once in each of the ten colours, (10 n) images: colour says nothing, without sampling noise."""
        repeat = torch.arange(len(self), device=self.labels.device).repeat_interleave(NUM_CLASSES)
        bias = torch.arange(NUM_CLASSES, device=self.labels.device).repeat(len(self))
        return BiasedDigits(self.mask[repeat], self.labels[repeat], bias, f"{self.name}, all colours").to(bias.device)

    def record(self) -> dict:
        """Name, sizes, share of aligned images and checksum, for the run record."""
        digest = hashlib.sha256()
        for part in (self.mask, self.labels, self.bias):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        aligned = (self.labels == self.bias).float().mean().item()
        shape = list(self.mask.shape)
        return {"name": self.name, "shape": shape, "aligned": round(aligned, 6), "sha256": digest.hexdigest()[:16]}


def biased_mnist(
    root: str | Path,
    train: bool,
    rho: float,
    n_confusing: int = 9,
    seed: int = 0,
    *,
    side: int = 28,
    n_images: int | None = None,
) -> BiasedDigits:
    """Biased MNIST from MNIST in torchvision's layout; nothing is downloaded.

    Args:
        root: folder that holds MNIST/raw.
        train: the 60,000 training images, or the 10,000 test images.
        rho: see `assign_bias`; the paper's test sets have 1 (biased), 0 (no aligned image) and 0.1 (unbiased).
        n_confusing: see `assign_bias`.
        seed: seed of the colours.
        side: 28, or 14: the mean of 2x2 pixels, foreground above 50 of 255 (a small variant for CPUs).
        n_images: use only this many, from the start.

    Raises:
        FileNotFoundError: the idx files are missing.
        ValueError: they are damaged, or `side` is invalid.
    """
    grey, labels = load_mnist(root, train)
    grey, labels = grey[:n_images], labels[:n_images]
    if side == 14:
        grey = torch.nn.functional.avg_pool2d(grey[:, None].float(), 2)[:, 0] > 50
    elif side != 28:
        raise ValueError(f"side must be 28 or 14, got {side}")
    bias = assign_bias(labels, rho, n_confusing, torch.Generator().manual_seed(seed))
    return BiasedDigits(grey, labels, bias, f"Biased MNIST {'train' if train else 'test'}, rho {rho:g}")


def biased_sklearn_digits(train: bool, rho: float, n_confusing: int = 9, seed: int = 0) -> BiasedDigits:
    """Biased digits from scikit-learn's 8x8 ones: nothing to download.

    A fixed permutation splits them into 1,200 for training and 597 for testing; foreground is a grey value of 6 or
    more of 16; every training digit comes four times, rolled by -1, 0 or 1 pixels along each axis.

    Args:
        train: 4,800 training images, or 597 test images.
        rho: see `assign_bias`.
        n_confusing: see `assign_bias`.
        seed: of the rolls and the colours; the split is always the same.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    chosen = order[:1200] if train else order[1200:]
    mask = torch.from_numpy(digits.images).ge(6)[chosen]
    labels = torch.from_numpy(digits.target).long()[chosen]
    generator = torch.Generator().manual_seed(seed)
    if train:
        mask, labels = mask.repeat_interleave(4, 0), labels.repeat_interleave(4)
        shifts = torch.randint(-1, 2, (len(mask), 2), generator=generator)
        mask = _roll(mask, shifts)
    bias = assign_bias(labels, rho, n_confusing, generator)
    return BiasedDigits(mask, labels, bias, f"biased digits {'train' if train else 'test'}, rho {rho:g}")


def load_mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST as (n, 28, 28) uint8 and (n,) int64. FileNotFoundError or ValueError with the command that fixes it."""
    from torchvision.datasets import MNIST

    raw = Path(root) / "MNIST" / "raw"
    fetch = f"python -c \"from torchvision.datasets import MNIST; MNIST(r'{root}', download=True)\""
    missing = [name for url, _ in MNIST.resources if not (raw / (name := Path(url).stem)).is_file()]
    if missing:
        raise FileNotFoundError(f"{raw}: MNIST lacks {', '.join(missing)}; fetch it with: {fetch}")
    try:
        mnist = MNIST(root, train=train)
    except Exception as error:  # the parser fails an assertion or a reshape
        raise ValueError(f"{raw}: MNIST is damaged ({error}); move the folder away and run: {fetch}") from error
    return mnist.data, mnist.targets


def _roll(mask: Tensor, shifts: Tensor) -> Tensor:
    """Roll each (H, W) image by its own (rows, columns)."""
    height, width = mask.shape[1:]
    rows = (torch.arange(height) - shifts[:, :1]) % height  # (n, H)
    columns = (torch.arange(width) - shifts[:, 1:]) % width  # (n, W)
    return mask[torch.arange(len(mask))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels and colours are (n,) integers, got {tuple(labels.shape)} {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
        raise ValueError(f"labels and colours lie in 0 .. 9, got {int(labels.min())} .. {int(labels.max())}")
