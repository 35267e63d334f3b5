"""The adversarial transformer network (ATN) in front of a frozen victim, and the bound common to all attacks.

A residual ATN (section 3 of the paper; the bounded form is ours): x' = clip(x + eps * tanh(f(x)), 0, 1) under L_inf,
x' = clip(x + f(x) * min(1, eps / ||f(x)||_2), 0, 1) under L2. The bound holds by construction, for any weights.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from rl_adv_reward.models import Centre, Victim, feature_size

NORMS = ("linf", "l2")
TOLERANCE = 1e-6
LEVEL_TOLERANCE = 2e-4  # in grey levels, within TOLERANCE of eps: .007843 means 2/255 and counts as two levels


def check_bound(eps: float, norm: str) -> None:
    """ValueError for an unknown norm, a negative or non-finite eps, or eps above 1 under L_inf; eps = 0 is allowed."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not math.isfinite(eps) or eps < 0 or (norm == "linf" and eps > 1):
        allowed = "[0, 1]" if norm == "linf" else "[0, inf)"
        raise ValueError(f"eps must lie in {allowed} (observations are in [0, 1]), got {eps}")


def check_observation(x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """TypeError unless x is floating point, ValueError unless it is (N, *shape) in [0, 1] up to 1e-6, without NaN."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point in [0, 1], got {x.dtype}: divide uint8 frames by 255")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"x must be (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if x.numel():
        low, high = x.aminmax()
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN fails both
            raise ValueError(f"x must lie in [0, 1] without NaN, got {float(low):.4g} .. {float(high):.4g}")


def project(
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    norm: str = "linf",
    low: float = 0.0,
    high: float = 1.0,
    quantize: bool = False,
) -> Tensor:
    """The nearest allowed observation: the eps ball around x, then the valid range, then (optionally) 8-bit values.

    Args:
        x_adv: (N, ...) proposed observation, any real values.
        x: (N, ...) clean observation in [low, high].
        eps: bound in units of x, on the norm of each sample.
        norm: linf or l2 (the difference is scaled, not clipped per pixel).
        low: smallest valid value.
        high: largest valid value.
        quantize: allow only multiples of 1/255 (x must be such): rounded half to even, within the ball. For [0, 1].

    Returns:
        (N, ...) of x's dtype, differentiable in x_adv unless quantized.

    Raises:
        ValueError: invalid eps or norm, or different shapes.
    """
    check_bound(eps, norm)
    if x_adv.shape != x.shape:
        raise ValueError(f"x_adv must have the shape of x {tuple(x.shape)}, got {tuple(x_adv.shape)}")
    delta = x_adv - x
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        delta = delta * (eps / length).clamp(max=1).reshape(-1, *[1] * (x.ndim - 1))
    bounded = (x + delta).clamp(low, high)
    if not quantize:
        return bounded
    pixels, clean = 255 * bounded, (255 * x).round()
    if norm == "linf":
        steps = math.floor(255 * eps + LEVEL_TOLERANCE)
        pixels = torch.minimum(torch.maximum(pixels.round(), clean - steps), clean + steps)
    else:
        pixels = clean + (pixels - clean).trunc()  # towards x: rounding must not leave the ball
    return pixels.clamp(0, 255) / 255


def perturbation_size(x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_inf (N,), L2 (N,) and the number of changed values (N,) int64 of x_adv - x, each (N, ...)."""
    delta = (x_adv - x).flatten(1)
    linf = delta.abs().amax(1) if delta.shape[1] else delta.new_zeros(len(delta))
    return linf, torch.linalg.vector_norm(delta, dim=1), (delta != 0).sum(1)


class ATN(nn.Module):
    """Adversarial transformer network: maps an observation to one of the same shape, within eps of it.

    Args:
        obs_shape: (C, H, W).
        eps: bound in units of [0, 1]; 0 is allowed and changes nothing.
        norm: linf or l2.
        width: channels of the convolutional bottleneck; the dense body has 3 times as many hidden units.
        background: value subtracted from x before the body; a constant offset stalls small networks.

    Small observations (H < 36) get a dense body, larger ones a convolutional branch for detail plus a bottleneck,
    because g must react to the whole scene (ball and paddle are far apart).

    Raises:
        ValueError: eps or norm out of range, or a shape that is not (C, H, W).
    """

    def __init__(
        self, obs_shape: tuple[int, int, int], eps: float, norm: str = "linf", width: int = 32, background: float = 0.0
    ):
        super().__init__()
        check_bound(eps, norm)
        if len(obs_shape) != 3:
            raise ValueError(f"obs_shape must be (C, H, W), got {tuple(obs_shape)}")
        channels, height, side = obs_shape
        self.obs_shape, self.eps, self.norm = (channels, height, side), float(eps), norm
        self.arguments = {"obs_shape": list(obs_shape), "eps": self.eps, "norm": norm}
        self.arguments |= {"width": width, "background": background}
        body = _DenseBody if height < 36 else _ConvBody
        self.body: nn.Module = body(self.obs_shape, width, background)

    def attacked(self, x: Tensor) -> Tensor:
        """`forward` without the check of x, for hot loops."""
        raw = self.body(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would violate a bound of 1/255
            step = self.eps * raw.tanh() if self.norm == "linf" else raw
            return project(x + step, x, self.eps, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) in [0, 1], of the network's dtype, to the same, within eps. Errors: `check_observation`."""
        check_observation(x, self.obs_shape)
        return self.attacked(x)

    def perturbation(self, x: Tensor) -> Tensor:
        """forward(x) - x."""
        return self(x) - x


class AttackedQ(nn.Module):
    """Q_theta(s, a) = Q_v(g_theta(s), a): the ATN's weights are the only parameters, the victim is frozen."""

    def __init__(self, atn: ATN, victim: Victim):
        super().__init__()
        self.atn = atn
        self._victim = [victim]  # in a list: not a submodule, so not in any optimizer or state dict

    def __deepcopy__(self, memo: dict) -> AttackedQ:
        """A copy (the target network) has its own ATN but shares the victim."""
        return AttackedQ(copy.deepcopy(self.atn, memo), self._victim[0])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) in [0, 1] to the victim's values (N, A) of the attacked observation."""
        return self._victim[0].q(self.atn.attacked(x))


def _start_small(layer: Any) -> nn.Module:
    """Small initial weights: an untrained ATN changes almost nothing."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


class _DenseBody(nn.Sequential):
    def __init__(self, shape: tuple[int, int, int], width: int, background: float):
        size = math.prod(shape)
        super().__init__(
            Centre(background),
            nn.Flatten(),
            nn.Linear(size, 3 * width),
            nn.ReLU(),
            nn.Linear(3 * width, 3 * width),
            nn.ReLU(),
            _start_small(nn.Linear(3 * width, size)),
            nn.Unflatten(1, shape),
        )


class _ConvBody(nn.Module):
    """Details at half resolution, plus the scene through a bottleneck; cheaper than a gradient through the victim."""

    def __init__(self, shape: tuple[int, int, int], width: int, background: float):
        super().__init__()
        channels, height, side = shape
        half = width // 2
        self.centre = Centre(background)
        self.detail = nn.Sequential(
            nn.Conv2d(channels, half, 5, stride=2, padding=2),  # 84 -> 42
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            _start_small(nn.ConvTranspose2d(half, channels, 4, stride=2, padding=1)),  # 42 -> 84
        )
        down = nn.Sequential(
            nn.Conv2d(channels, half, 8, stride=4), nn.ReLU(), nn.Conv2d(half, width, 4, stride=2), nn.ReLU()
        )  # 84 -> 20 -> 9
        coarse = (channels, height // 4, side // 4)
        self.scene = nn.Sequential(
            down,
            nn.Flatten(),
            nn.Linear(feature_size(down, shape), 8 * width),
            nn.ReLU(),
            _start_small(nn.Linear(8 * width, math.prod(coarse))),
            nn.Unflatten(1, coarse),
            nn.Upsample((height, side), mode="bilinear", align_corners=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.centre(x)
        height, side = x.shape[2:]
        return self.detail(x)[..., :height, :side] + self.scene(x)
