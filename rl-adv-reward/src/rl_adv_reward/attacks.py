"""Attacks for comparison: each maps clean observations (N, C, H, W) in [0, 1] and a victim to attacked ones.

All go through `project` with the same eps, so all have the same budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rl_adv_reward.atn import ATN, check_observation, project


class HasValues(Protocol):
    """What an attack needs from a victim, such as `models.Victim`."""

    def q(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to action values or logits (N, A)."""
        ...


Attack = Callable[[Tensor, HasValues], Tensor]


def none(x: Tensor, victim: HasValues) -> Tensor:
    """No attack: x itself."""
    return x


def random_uniform(
    x: Tensor, victim: HasValues, *, eps: float, norm: str = "linf", quantize: bool = False, generator: torch.Generator
) -> Tensor:
    """Uniform noise in [-eps, eps]; under L2, a random direction of length eps."""
    if norm == "l2":
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return _moved(x, noise, eps, norm, quantize)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return project(x + eps * (2 * noise - 1), x, eps, norm, quantize=quantize)


def random_sign(
    x: Tensor, victim: HasValues, *, eps: float, norm: str = "linf", quantize: bool = False, generator: torch.Generator
) -> Tensor:
    """Every value moved by eps, randomly up or down: the strong random baseline."""
    noise = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
    return _moved(x, (2 * noise - 1).to(x.dtype), eps, norm, quantize)


def fgsm(x: Tensor, victim: HasValues, *, eps: float, norm: str = "linf", quantize: bool = False) -> Tensor:
    """Untargeted (Huang et al. 2017): increases the cross-entropy of the victim's greedy action."""
    return _moved(x, gradient(x, victim, greedy(x, victim)), eps, norm, quantize)


def targeted_fgsm(
    x: Tensor,
    victim: HasValues,
    *,
    target: Callable[[Tensor], Tensor],
    eps: float,
    norm: str = "linf",
    quantize: bool = False,
) -> Tensor:
    """Decreases the cross-entropy of the action (N,) that `target` returns for the clean x."""
    return _moved(x, -gradient(x, victim, target(x)), eps, norm, quantize)


def pgd(
    x: Tensor,
    victim: HasValues,
    *,
    eps: float,
    norm: str = "linf",
    quantize: bool = False,
    steps: int = 10,
    target: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Projected gradient steps of 2.5 eps / steps from x; untargeted, or towards the actions of `target`."""
    action = greedy(x, victim) if target is None else target(x)
    sign = 1 if target is None else -1
    x_adv = x
    for _ in range(steps):
        step = sign * gradient(x_adv, victim, action)
        x_adv = project(_step(x_adv, step, 2.5 * eps / steps, norm), x, eps, norm)
    return project(x_adv, x, eps, norm, quantize=quantize)


def mad(
    x: Tensor,
    victim: HasValues,
    *,
    eps: float,
    norm: str = "linf",
    quantize: bool = False,
    steps: int = 10,
    generator: torch.Generator,
) -> Tensor:
    """Maximal action difference (Zhang et al. 2020): increases the KL divergence from the victim's clean softmax(Q).

    Starts from a random point, because the gradient is zero at x itself.
    """
    with torch.no_grad():
        clean = victim.q(x).log_softmax(1)
    x_adv = random_uniform(x, victim, eps=eps, norm=norm, generator=generator)
    for _ in range(steps):
        with torch.enable_grad():
            moving = x_adv.detach().requires_grad_()
            divergence = kl_div(victim.q(moving).log_softmax(1), clean, log_target=True, reduction="sum")
            step = torch.autograd.grad(divergence, moving)[0]
        x_adv = project(_step(x_adv, step, 2.5 * eps / steps, norm), x, eps, norm)
    return project(x_adv, x, eps, norm, quantize=quantize)


def strategically_timed(
    x: Tensor, victim: HasValues, *, attack: Attack, threshold: float, temperature: float = 1.0
) -> Tensor:
    """`attack`, but only if the victim's preference, max - min of softmax(Q / temperature), exceeds the threshold.

    Lin et al. 2017: attack rarely, when the choice of action matters.
    """
    chosen = preference(x, victim, temperature) > threshold
    return torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), attack(x, victim), x)


@torch.no_grad()
def preference(x: Tensor, victim: HasValues, temperature: float = 1.0) -> Tensor:
    """Max - min of softmax(Q / temperature), (N,): how much the choice of action matters (Lin et al. 2017)."""
    chances = (victim.q(x) / temperature).softmax(1)
    return chances.amax(1) - chances.amin(1)


class ATNAttack:
    """One forward pass of a trained ATN per step."""

    def __init__(self, atn: ATN, quantize: bool = False):
        self.atn, self.quantize = atn, quantize

    @torch.no_grad()
    def __call__(self, x: Tensor, victim: HasValues) -> Tensor:
        return project(self.atn(x), x, self.atn.eps, self.atn.norm, quantize=self.quantize)


def greedy(x: Tensor, victim: HasValues) -> Tensor:
    """The victim's actions (N,) on x; the first one wins ties."""
    with torch.no_grad():
        return victim.q(x).argmax(1)


def gradient(x: Tensor, victim: HasValues, action: Tensor) -> Tensor:
    """Gradient in x of the summed cross-entropy between the victim's values (as logits) and actions (N,).

    Values within rounding error of zero are set to zero: the sign of a rounding error must not become an attack.
    """
    check_observation(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        grad = torch.autograd.grad(cross_entropy(victim.q(x), action, reduction="sum"), x)[0]
    rounding = 64 * torch.finfo(grad.dtype).eps * grad.abs().flatten(1).amax(1).reshape(-1, *[1] * (x.ndim - 1))
    return grad.masked_fill(grad.abs() <= rounding, 0)


def _step(x: Tensor, direction: Tensor, size: float, norm: str) -> Tensor:
    """A step of steepest ascent: size in every value (linf) or in length (l2)."""
    if norm == "linf":
        return x + size * direction.sign()
    length = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x + size * direction / length.reshape(-1, *[1] * (x.ndim - 1))


def _moved(x: Tensor, direction: Tensor, eps: float, norm: str, quantize: bool) -> Tensor:
    return project(_step(x, direction, eps, norm), x, eps, norm, quantize=quantize)


NOISE = {"random-uniform": random_uniform, "random-sign": random_sign}
UNTARGETED = ("none", "random-uniform", "random-sign", "fgsm", "pgd", "mad", "timed")


def make_attack(
    name: str,
    *,
    eps: float,
    norm: str = "linf",
    quantize: bool = False,
    generator: torch.Generator | None = None,
    target: Callable[[Tensor], Tensor] | None = None,
    atn: ATN | None = None,
    threshold: float = 0.05,
    steps: int = 10,
) -> Attack:
    """An attack by its name in the tables.

    Args:
        name: none, random-uniform, random-sign, fgsm, pgd, mad, timed (fgsm, strategically timed), targeted-fgsm,
            targeted-pgd or atn.
        eps: bound.
        norm: linf or l2.
        quantize: 8-bit values only.
        generator: draws the noise and the start of mad.
        target: actions (N,) for clean observations, for targeted attacks.
        atn: the network, for "atn".
        threshold: threshold of "timed".
        steps: number of gradients for pgd and mad.

    Raises:
        ValueError: an unknown name, or a missing argument.
    """
    needs: dict[str, tuple[str, object]] = {
        "atn": ("atn", atn), "targeted-fgsm": ("target", target), "targeted-pgd": ("target", target)
    }  # fmt: skip
    needs |= {noise: ("generator", generator) for noise in (*NOISE, "mad")}
    if name in needs and needs[name][1] is None:
        raise ValueError(f"attack {name!r} needs {needs[name][0]}")
    bound: dict[str, Any] = {"eps": eps, "norm": norm, "quantize": quantize}
    makers: dict[str, Callable[[], Attack]] = {
        "none": lambda: none,
        "random-uniform": lambda: partial(random_uniform, **bound, generator=cast(torch.Generator, generator)),
        "random-sign": lambda: partial(random_sign, **bound, generator=cast(torch.Generator, generator)),
        "fgsm": lambda: partial(fgsm, **bound),
        "pgd": lambda: partial(pgd, **bound, steps=steps),
        "mad": lambda: partial(mad, **bound, steps=steps, generator=cast(torch.Generator, generator)),
        "timed": lambda: partial(strategically_timed, attack=partial(fgsm, **bound), threshold=threshold),
        "targeted-fgsm": lambda: partial(targeted_fgsm, **bound, target=cast(Callable[[Tensor], Tensor], target)),
        "targeted-pgd": lambda: partial(pgd, **bound, steps=steps, target=target),
        "atn": lambda: ATNAttack(cast(ATN, atn), quantize),
    }
    if name not in makers:
        raise ValueError(f"attack must be one of {', '.join(makers)}, got {name!r}")
    return makers[name]()
