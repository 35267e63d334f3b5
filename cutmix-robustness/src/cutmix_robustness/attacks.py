"""White-box attacks of the evaluation and of adversarial training: FGSM and PGD in the L-infinity ball."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, SLACK = 8 / 255, 1e-4


def input_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Gradient of each sample's own cross-entropy with respect to its pixels, shape of the images, float32 or better.

    The logits are divided by the temperature first.

    The sum over the batch is differentiated, so no sample's gradient shrinks with the batch size. Dtypes below float32
    are refused: a softmax saturated in half precision gives zero gradients, which looks like robustness.

    Raises:
        ValueError: a model in training mode.
        TypeError: logits in half precision.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode: attacks would change its batch norm; call model.eval()")
    images = images.detach().requires_grad_(True)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        logits = model(images)
        if logits.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"attacks need logits in float32 or float64, got {logits.dtype}")
        loss = F.cross_entropy(logits / temperature, labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]


def fgsm(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, epsilon: float = EPSILON, clip: bool = True
) -> Tensor:
    """X + epsilon * sign(gradient of the cross-entropy) (section 4.3 of 1905.04899), clipped to [0, 1] (ours).

    Args:
        model: images in [0, 1] to logits, normalisation inside, in evaluation mode.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64.
        epsilon: step in pixel units.
        clip: keep the result in [0, 1].

    Raises:
        ValueError: images outside [0, 1].
        TypeError: logits in half precision.
    """
    images = in_range(images)
    return fgsm_step(images, input_gradient(model, images, labels), epsilon, clip)


def fgsm_step(images: Tensor, gradient: Tensor, epsilon: float = EPSILON, clip: bool = True) -> Tensor:
    """`fgsm` from a precomputed gradient."""
    attacked = images + epsilon * gradient.sign()
    return attacked.clamp(0, 1) if clip else attacked


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    epsilon: float = EPSILON,
    steps: int = 10,
    step_size: float = 2 / 255,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Signed gradient steps, each projected to the epsilon ball and then to [0, 1].

    Args:
        model: as in `fgsm`.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64.
        epsilon: radius of the ball in pixel units.
        steps: number of steps.
        step_size: size of each step, in pixel units.
        random_start: start at a uniformly random point of the ball, clipped to [0, 1], instead of the image.
        generator: CPU generator of the start, one draw per pixel.

    Raises:
        ValueError: images outside [0, 1].
        TypeError: logits in half precision.
    """
    images = in_range(images)
    start = images
    if random_start:
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        start = (images + epsilon * (2 * noise - 1)).clamp(0, 1)
    return pgd_from(model, images, labels, start, epsilon, steps, step_size)


def pgd_from(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """`pgd` from a given start (N, C, H, W)."""
    attacked = start
    for _ in range(steps):
        attacked = attacked + step_size * input_gradient(model, attacked, labels).sign()
        attacked = torch.minimum(torch.maximum(attacked, images - epsilon), images + epsilon).clamp(0, 1)
    return attacked.detach()


def autoattack(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """The standard ensemble of Croce and Hein (2020), 8/255, by the package torchattacks."""
    from torchattacks import AutoAttack

    attack = AutoAttack(model, "Linf", EPSILON, n_classes=num_classes, seed=seed)
    return attack(in_range(images), labels)


def in_range(images: Tensor) -> Tensor:
    """The images clipped to [0, 1]; resizing and undoing a normalisation leave values slightly outside.

    Raises:
        ValueError: values outside by more than 1e-4, or NaN.
    """
    low, high = images.aminmax()
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(f"images must lie in [0, 1], got {low.item():.6g} .. {high.item():.6g}")
    return images.clamp(0, 1)
