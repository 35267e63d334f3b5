"""Mixup, and mixing inside the network: Manifold Mixup and Feature CutMix (baselines in 1905.04899, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cutmix_robustness.cutmix import CutMix, MixedBatch, check_batch, check_mixing, partners, sample_lam
from cutmix_robustness.draws import own_stream


class Mixup:
    """x~ = lam * x_A + (1 - lam) * x_B with lam ~ Beta(alpha, alpha), the same for the labels.

    Args:
        alpha: parameter of the Beta distribution.
        prob: probability of mixing the whole batch, or each sample.
        mode: "batch" (one lam) or "sample".
        partner: "permute", "roll" or "flip", as in `CutMix`.
        generator: generator of all draws, as in `CutMix`.

    Raises:
        ValueError: a value out of its range; on calling, integer images.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        mode: str = "batch",
        partner: str = "permute",
        generator: torch.Generator | None = None,
    ):
        check_mixing(alpha, prob, mode, partner)
        self.alpha, self.prob, self.mode, self.partner, self.generator = alpha, prob, mode, partner, generator

    def __call__(self, images: Tensor, labels: Tensor) -> MixedBatch:
        """Mix (N, C, H, W) float images and (N,) or (N, K) labels; the input is not modified."""
        check_batch(images, labels)
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point to be averaged, got {images.dtype}")
        n = len(images)
        count = n if self.mode == "sample" else 1
        draws = torch.rand(count, 2, dtype=torch.float64, generator=own_stream(self.generator))
        perm = partners(n, self.partner, self.generator).to(images.device, non_blocking=True)
        lam = torch.where(draws[:, 0] < self.prob, sample_lam(draws[:, 1], self.alpha), 1.0)
        lam = lam.float().expand(n).to(images.device, non_blocking=True)
        mixed = torch.lerp(images[perm], images, lam.to(images.dtype)[:, None, None, None])
        boxes = torch.zeros(n, 4, dtype=torch.int64, device=images.device)
        return MixedBatch(mixed, labels, labels[perm], lam, boxes, perm)


class ManifoldMix:
    """Mix the batch at one point of the network, drawn for every batch from the input and the given modules.

    Point 0 is the image; the others are the outputs of submodules, for the networks of this package those named by
    `network.points` (after the first convolution, layer1, layer2 and layer3). Feature CutMix draws its box at that
    point's resolution.

    Args:
        network: the network whose submodules' outputs are mixed.
        points: names of submodules; `only` counts them from 1.
        mix: a `Mixup` (Manifold Mixup) or a `CutMix` (Feature CutMix); its generator draws the point as well.
        only: always mix at this point instead of a random one (figure 3 of the paper).
        forward: images to logits, if the network is called through a wrapper; None: the network itself.

    Raises:
        ValueError: the network has no such point.
    """

    def __init__(
        self,
        network: nn.Module,
        points: tuple[str, ...],
        mix: Mixup | CutMix | MixupCutMix,
        only: int | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ):
        known = dict(network.named_modules())
        for name in points:
            if name not in known:
                raise ValueError(f"the network has no submodule {name!r} to mix at")
        if only is not None and not 0 <= only <= len(points):
            raise ValueError(f"only must lie in 0 .. {len(points)}, got {only}")
        self.mix, self.n_points, self.only, self.forward = mix, len(points) + 1, only, forward or network
        self._point = 0
        self._labels: Tensor | None = None
        self._mixed: MixedBatch | None = None
        for number, name in enumerate(points, 1):
            known[name].register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Callable:
        def replace_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if self._labels is None or self._point != number:
                return None
            self._mixed = self.mix(output, self._labels)
            return self._mixed.images

        return replace_output

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, MixedBatch]:
        """Logits (N, K) of the mixed pass, and the mixed batch; its `images` are the values at that point."""
        if self.only is None:
            self._point = int(torch.randint(self.n_points, (), generator=own_stream(self.mix.generator)))
        else:
            self._point = self.only
        if self._point == 0:
            batch = self.mix(images, labels)
            return self.forward(batch.images), batch
        self._labels = labels
        try:
            logits = self.forward(images)
            if self._mixed is None:
                raise RuntimeError(f"the network ran without the submodule of point {self._point}")
            return logits, self._mixed
        finally:
            self._labels = self._mixed = None


class MixupCutMix:
    """Mixup or CutMix, chosen for each batch.

    Args:
        mixup: used with probability 1 - switch_prob.
        cutmix: used with probability switch_prob; its generator makes the choice.
        switch_prob: see above.
    """

    def __init__(self, mixup: Mixup, cutmix: CutMix, switch_prob: float = 0.5):
        if not 0 <= switch_prob <= 1:
            raise ValueError(f"switch_prob must lie in [0, 1], got {switch_prob}")
        self.mixup, self.cutmix, self.switch_prob, self.generator = mixup, cutmix, switch_prob, cutmix.generator

    def __call__(self, images: Tensor, labels: Tensor) -> MixedBatch:
        """Mix (N, C, H, W) float images and their labels."""
        cut = torch.rand((), dtype=torch.float64, generator=own_stream(self.generator)) < self.switch_prob
        return (self.cutmix if cut else self.mixup)(images, labels)
