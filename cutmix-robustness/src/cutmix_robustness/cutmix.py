"""CutMix (arXiv 1905.04899): paste a box of one training image into another and mix the labels by area.

    x~ = M * x_A + (1 - M) * x_B        M is 0 inside the box, 1 outside           (equation 1)
    y~ = lam * y_A + (1 - lam) * y_B    lam ~ Beta(alpha, alpha), then 1 - area / (W * H) of the clipped box
    r_w = W * sqrt(1 - lam), r_h = H * sqrt(1 - lam), centre uniform over the image (equation 2)

Every decision takes one row of four uniform numbers from the generator, so a sample's box does not depend on how the
stream of samples is divided into batches.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from cutmix_robustness.draws import own_stream

VARIANTS = ("standard", "center_gaussian", "fixed", "scheduled", "one_hot", "complete")
ROUNDINGS = ("reference", "exact")
MODES = ("batch", "sample")
PARTNERS = ("permute", "roll", "flip")


@dataclass(frozen=True)
class MixedBatch:
    """Mixed images and the two targets of each.

    Attributes:
        images: (N, C, H, W), dtype and memory format of the input.
        target_a: (N,) int64 or (N, K) float, targets of the images themselves.
        target_b: the same of their partners.
        lam: (N,) float32, weight of target_a.
        boxes: (N, 4) int64 as (y1, x1, y2, x2), end exclusive; empty where nothing was pasted.
        perm: (N,) int64, index of each image's partner.
    """

    images: Tensor
    target_a: Tensor
    target_b: Tensor
    lam: Tensor
    boxes: Tensor
    perm: Tensor

    def soft_targets(self, num_classes: int) -> Tensor:
        """Mixed targets lam * y_A + (1 - lam) * y_B: (N, num_classes) float32."""
        a, b = (
            (F.one_hot(target, num_classes) if target.ndim == 1 else target).float()
            for target in (self.target_a, self.target_b)
        )
        lam = self.lam[:, None]
        return lam * a + (1 - lam) * b

    def shard(self, rank: int, world: int) -> MixedBatch:
        """Every world-th sample from rank on: one process's share of a global batch."""
        parts = (self.images, self.target_a, self.target_b, self.lam, self.boxes, self.perm)
        return MixedBatch(*(part[rank::world] for part in parts))


def unmixed(images: Tensor, labels: Tensor) -> MixedBatch:
    """The unchanged batch in the form of a mixed one."""
    n, device = len(images), images.device
    boxes = torch.zeros(n, 4, dtype=torch.int64, device=device)
    return MixedBatch(images, labels, labels, torch.ones(n, device=device), boxes, torch.arange(n, device=device))


def mixed_cross_entropy(logits: Tensor, batch: MixedBatch, label_smoothing: float = 0.0) -> Tensor:
    """Mean of lam * CE(logits, y_A) + (1 - lam) * CE(logits, y_B), in float32 or better.

    Args:
        logits: (N, K).
        batch: the mixed batch.
        label_smoothing: eps; each target becomes (1 - eps) * y + eps / K (the same before or after mixing).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lam = batch.lam.to(logits.dtype)
    a, b = (
        F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        for target in (batch.target_a, batch.target_b)
    )
    return (lam * a + (1 - lam) * b).mean()


def cutmix_box(height: int, width: int, lam: Tensor, center: Tensor, rounding: str = "reference") -> Tensor:
    """Clipped box of equation 2 for a mixing ratio and a centre.

    Args:
        height: height of the image, in pixels.
        width: width of the image.
        lam: (n,) float64 in [0, 1], share of the image to keep.
        center: (n, 2) as (y, x): pixel indices for "reference", positions in [0, size] for "exact".
        rounding: "reference" truncates the side and halves it (sides are even), like the authors' code; "exact" rounds
            the clipped edges.

    Returns:
        (n, 4) int64 as (y1, x1, y2, x2), end exclusive.

    Raises:
        ValueError: an unknown rounding.
    """
    _one_of("rounding", rounding, ROUNDINGS)
    size = torch.tensor([height, width], dtype=torch.float64)
    return _box(size, size * (1 - lam.double()).sqrt()[:, None], center, rounding)


def _box(size: Tensor, side: Tensor, center: Tensor, rounding: str) -> Tensor:
    """Size (2,), side (n, 2) or (2,), center (n, 2), all as (y, x)."""
    half = side.trunc().div(2, rounding_mode="floor") if rounding == "reference" else side / 2
    edges = torch.stack([center - half, center + half], 1)  # (n, 2, 2)
    return edges.clamp(torch.zeros_like(size), size).round().long().flatten(1)


def box_lam(boxes: Tensor, height: int, width: int) -> Tensor:
    """(n,) float64: the share of the image outside each box."""
    y1, x1, y2, x2 = boxes.double().unbind(1)
    return 1 - (y2 - y1) * (x2 - x1) / (height * width)


def sample_lam(uniform: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) through its inverse distribution function: (n,) float64 uniform to (n,) float64."""
    return uniform if alpha == 1 else torch.from_numpy(np.asarray(betaincinv(alpha, alpha, uniform.numpy())))


def sample_boxes(
    n: int,
    height: int,
    width: int,
    alpha: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    rounding: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Draw n boxes of plain CutMix.

    Returns:
        Boxes (n, 4) int64 as (y1, x1, y2, x2), and lam (n,) float64, the exact share outside of each.

    Raises:
        ValueError: alpha is not above 0, or an unknown rounding.
    """
    mix = CutMix(alpha, rounding=rounding, generator=generator)
    boxes = mix.boxes(mix.draw(n), height, width)
    return boxes, box_lam(boxes, height, width)


class CutMix:
    """Mix a batch; works on normalised or unnormalised images, in training only.

    Args:
        alpha: parameter of Beta(alpha, alpha).
        prob: probability of mixing the whole batch, or each sample.
        mode: "batch" (one lam, one box, as the paper) or "sample" (one of each per image).
        partner: "permute" (random permutation), "roll" (the previous image) or "flip" (the batch backwards).
        rounding: see `cutmix_box`.
        correct_lam: take the label weight from the clipped box, else the drawn lam.
        variant: variant of Table 8. "center_gaussian" draws the centre around the middle (sigma a quarter of the side,
            ours), "fixed" keeps the box at fixed_size, "scheduled" multiplies prob by `progress`, "one_hot" gives the
            label of the larger part, "complete" half of both labels.
        fixed_size: side of the box of "fixed", in pixels.
        generator: CPU generator of all draws; None: torch's default. Each worker of a DataLoader has its own stream,
            see `own_stream`.

    Attributes:
        progress: share of the training done, 0 .. 1; read only by "scheduled".

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        mode: str = "batch",
        partner: str = "permute",
        rounding: str = "reference",
        correct_lam: bool = True,
        variant: str = "standard",
        fixed_size: int = 16,
        generator: torch.Generator | None = None,
    ):
        check_mixing(alpha, prob, mode, partner)
        _one_of("rounding", rounding, ROUNDINGS)
        _one_of("variant", variant, VARIANTS)
        if fixed_size < 1:
            raise ValueError(f"fixed_size must be at least 1, got {fixed_size}")
        self.alpha, self.prob, self.mode, self.partner = alpha, prob, mode, partner
        self.rounding, self.correct_lam, self.variant, self.fixed_size = rounding, correct_lam, variant, fixed_size
        self.generator, self.progress = generator, 0.0

    def __call__(self, images: Tensor, labels: Tensor) -> MixedBatch:
        """Mix (N, C, H, W) images of any dtype and (N,) int64 or (N, K) float labels; the input is not modified.

        Raises:
            ValueError: images that are not 4-D, an empty batch, labels of another length.
        """
        check_batch(images, labels)
        n, (height, width) = len(images), images.shape[2:]
        draws = self.draw(n if self.mode == "sample" else 1)
        perm = partners(n, self.partner, self.generator)
        prob = self.prob * (self.progress if self.variant == "scheduled" else 1)
        mixes = draws[:, 0] < prob
        boxes = self.boxes(draws, height, width) * mixes[:, None]
        lam = box_lam(boxes, height, width) if self.correct_lam else self._drawn_lam(draws, height, width)
        lam = torch.where(mixes, self._label_weight(lam), 1.0)
        mixed = _paste(images, perm, boxes, mixes)
        device = images.device
        lam, boxes = lam.float().expand(n), boxes.expand(n, 4)
        lam, boxes, perm = (part.to(device, non_blocking=True) for part in (lam, boxes, perm))
        return MixedBatch(mixed, labels, labels[perm], lam, boxes, perm)

    def draw(self, n: int) -> Tensor:
        """(n, 4) float64 uniform numbers: whether to mix, lam, centre y, centre x."""
        return torch.rand(n, 4, dtype=torch.float64, generator=own_stream(self.generator))

    def boxes(self, draws: Tensor, height: int, width: int) -> Tensor:
        """Boxes (n, 4) from (n, 4) draws, whether or not their sample will be mixed."""
        size = torch.tensor([height, width], dtype=torch.float64)
        center = draws[:, 2:]
        if self.variant == "center_gaussian":
            center = (0.5 + torch.special.ndtri(center) / 4).clamp(0, 1 - 1e-9)
        center = center * size
        if self.rounding == "reference":
            center = center.floor()
        if self.variant == "fixed":
            return _box(size, torch.full((2,), float(self.fixed_size)), center, self.rounding)
        return cutmix_box(height, width, sample_lam(draws[:, 1], self.alpha), center, self.rounding)

    def _drawn_lam(self, draws: Tensor, height: int, width: int) -> Tensor:
        if self.variant == "fixed":
            return torch.full((len(draws),), 1 - min(1.0, self.fixed_size**2 / (height * width)), dtype=torch.float64)
        return sample_lam(draws[:, 1], self.alpha)

    def _label_weight(self, lam: Tensor) -> Tensor:
        if self.variant == "one_hot":
            return (lam >= 0.5).double()
        return torch.full_like(lam, 0.5) if self.variant == "complete" else lam


SMALL_IMAGE = 64 * 64  # up to this many pixels one masked copy of the batch is faster than a copy per box


def _paste(images: Tensor, perm: Tensor, boxes: Tensor, mixes: Tensor) -> Tensor:
    """Copy the box of image perm[i] into image i, reading from the unmixed batch."""
    if not mixes.any():
        return images.clone()
    if len(boxes) == 1:
        y1, x1, y2, x2 = boxes[0].tolist()
        mixed = images.clone()
        mixed[:, :, y1:y2, x1:x2] = images[:, :, y1:y2, x1:x2].index_select(
            0, perm.to(images.device, non_blocking=True)
        )
        return mixed
    height, width = images.shape[2:]
    if images.device.type == "cpu" and height * width > SMALL_IMAGE:
        mixed = images.clone()
        for i, (j, (y1, x1, y2, x2)) in enumerate(zip(perm.tolist(), boxes.tolist(), strict=True)):
            mixed[i, :, y1:y2, x1:x2] = images[j, :, y1:y2, x1:x2]
        return mixed
    boxes, perm = boxes.to(images.device, non_blocking=True), perm.to(images.device, non_blocking=True)
    y1, x1, y2, x2 = boxes[:, :, None].unbind(1)  # (N, 1) each
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((y >= y1) & (y < y2))[:, None, :, None] & ((x >= x1) & (x < x2))[:, None, None, :]  # (N, 1, H, W)
    return torch.where(inside, images[perm], images)


def partners(n: int, kind: str, generator: torch.Generator | None) -> Tensor:
    """(n,) index of each sample's partner; a single sample is its own (with a warning)."""
    if n == 1:
        warnings.warn("a batch of one sample is mixed with itself", stacklevel=3)
    if kind == "permute":
        return torch.randperm(n, generator=own_stream(generator))
    return torch.arange(n).roll(1) if kind == "roll" else torch.arange(n).flip(0)


def check_mixing(alpha: float, prob: float, mode: str, partner: str) -> None:
    """ValueError for a value out of its range."""
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must lie in [0, 1], got {prob}")
    _one_of("mode", mode, MODES)
    _one_of("partner", partner, PARTNERS)


def check_batch(images: Tensor, labels: Tensor) -> None:
    """ValueError for images that are not a batch, or labels of another length."""
    if images.ndim != 4:
        raise ValueError(f"images must be 4-D (N, C, H, W), got shape {tuple(images.shape)}")
    if len(images) == 0:
        raise ValueError("images are empty, expected at least one")
    if len(labels) != len(images) or labels.ndim not in (1, 2):
        raise ValueError(f"labels must be ({len(images)},) or ({len(images)}, K), got shape {tuple(labels.shape)}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
