"""The 19 image corruptions of CIFAR-C and ImageNet-C as batched torch code.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019);
section 4 of arXiv 2003.03879 evaluates on them. `severities` holds the constants, `noise`, `blur`, `weather`, `frost`
and `digital` the corruptions, each a function that draws and a pure function that computes the image from the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutmix_robustness.corruptions import blur, digital, frost, noise, weather
from cutmix_robustness.corruptions.pixels import to_unit, truncate
from cutmix_robustness.corruptions.severities import SEVERITIES
from cutmix_robustness.corruptions.streams import SampleStreams
from cutmix_robustness.draws import own_stream

__all__ = ["CORRUPTIONS", "EXTRA_CORRUPTIONS", "GROUPS", "SEVERITIES", "corrupt"]

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)  # in the order of mCE
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # never part of mCE

_CPU_CHUNK = 2**19  # values processed at once: about what a core's caches hold
_DEVICE_CHUNK = 2**25  # the same on an accelerator, for its memory: 222 images of 224 x 224


@dataclass(frozen=True)
class _Corruption:
    apply: Callable[..., Tensor]
    draw: Callable[[SampleStreams, Tensor, Any], Any] | None = None


_REGISTRY = {
    "gaussian_noise": _Corruption(noise.gaussian_noise, noise.draw_normal),
    "shot_noise": _Corruption(noise.shot_noise, noise.draw_photons),
    "impulse_noise": _Corruption(noise.impulse_noise, noise.draw_uniform),
    "defocus_blur": _Corruption(blur.defocus_blur),
    "glass_blur": _Corruption(blur.glass_blur, blur.draw_glass_moves),
    "motion_blur": _Corruption(blur.motion_blur, blur.draw_motion_angle),
    "zoom_blur": _Corruption(blur.zoom_blur),
    "snow": _Corruption(weather.snow, weather.draw_snow),
    "frost": _Corruption(frost.frost, frost.draw_frost),
    "fog": _Corruption(weather.fog, weather.draw_fog),
    "brightness": _Corruption(weather.brightness),
    "contrast": _Corruption(digital.contrast),
    "elastic_transform": _Corruption(digital.elastic_transform, digital.draw_elastic),
    "pixelate": _Corruption(digital.pixelate),
    "jpeg_compression": _Corruption(digital.jpeg_compression),
    "speckle_noise": _Corruption(noise.speckle_noise, noise.draw_normal),
    "gaussian_blur": _Corruption(blur.gaussian_blur),
    "spatter": _Corruption(weather.spatter, weather.draw_spatter),
    "saturate": _Corruption(digital.saturate),
}


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    scale: str = "cifar",
    *,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    frost_textures: Tensor | None = None,
) -> Tensor:
    """Corrupt a batch of images as in CIFAR-C and ImageNet-C.

    Randomness belongs to the image: each has a 64-bit seed, and the same image with the same seed is corrupted in the
    same way in any batch, worker and rank, and up to rounding on any device. Results are clipped and rounded down to 8
    bits.

    Four of the 19 differ from the published data: frost uses procedural textures unless given the photographs;
    motion_blur and snow blur as the package `imagecorruptions` does, not as ImageMagick; and elastic_transform at scale
    "imagenet" has that package's constants and no affine map, so that it is weaker than ImageNet-C's at severities 1
    and 2.

    Args:
        images: (N, 3, H, W) uint8, RGB, any size and device, contiguous or channels_last. Never modified.
        name: one of CORRUPTIONS or EXTRA_CORRUPTIONS.
        severity: 1 to 5.
        scale: whose constants to use, "cifar" or "imagenet"; they are meant for 32 x 32 and for 224 x 224 pixels.
        generator: source of the seeds where `seeds` is not given; the default generator of torch if None.
        seeds: (N,) int64, one seed per image, in place of `generator`.
        frost_textures: (T, 3, h, w) uint8 for frost, of which the first five are used; None for procedural ones.

    Returns:
        (N, 3, H, W) uint8 on the device of `images` and in its memory format.

    Raises:
        TypeError: if images, seeds or frost_textures is not a tensor of the right dtype.
        ValueError: if a shape, the name, the severity or the scale is not as described above, or N is 0.
    """
    _check_images(images)
    constants = _constants(name, severity, scale)
    seeds = _seeds(len(images), generator, seeds).to(images.device)
    corruption, extra = _REGISTRY[name], {}
    if name == "frost":
        extra["textures"] = _textures(frost_textures, scale, images)
    per_chunk = max(1, (_CPU_CHUNK if images.device.type == "cpu" else _DEVICE_CHUNK) // images[0].numel())
    out = torch.empty_like(images)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for part, part_seeds, result in zip(*(t.split(per_chunk) for t in (images, seeds, out)), strict=True):
            part = part.contiguous()
            draws = corruption.draw(SampleStreams(part_seeds), part, constants) if corruption.draw else None
            corrupted = corruption.apply(part, constants, draws, **extra)
            result.copy_(truncate(corrupted) if corrupted.is_floating_point() else corrupted)
    return out


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 in 0 .. 255, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: expected a non-empty (N, 3, H, W), got {tuple(images.shape)}")


def _constants(name: str, severity: int, scale: str) -> Any:
    if name not in _REGISTRY:
        raise ValueError(f"name: expected one of {', '.join(_REGISTRY)}, got {name!r}")
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity: expected 1, 2, 3, 4 or 5, got {severity!r}")
    if scale not in SEVERITIES:
        raise ValueError(f"scale: expected one of {', '.join(SEVERITIES)}, got {scale!r}")
    return SEVERITIES[scale][name][int(severity) - 1]


def _seeds(count: int, generator: torch.Generator | None, seeds: Tensor | None) -> Tensor:
    if seeds is None:
        device = generator.device if generator is not None else None
        return torch.randint(2**63 - 1, (count,), generator=own_stream(generator), device=device)
    if generator is not None:
        raise ValueError("pass seeds or a generator, not both")
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        raise TypeError(f"seeds: expected an int64 tensor, got {getattr(seeds, 'dtype', type(seeds).__name__)}")
    if seeds.shape != (count,):
        raise ValueError(f"seeds: expected shape ({count},), one per image, got {tuple(seeds.shape)}")
    return seeds


def _textures(textures: Tensor | None, scale: str, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    size = (height, width)
    if textures is None:
        return frost.fitted_procedural_textures(scale, size, images.device)
    if not isinstance(textures, Tensor) or textures.dtype != torch.uint8:
        got = getattr(textures, "dtype", type(textures).__name__)
        raise TypeError(f"frost_textures: expected a uint8 tensor, got {got}")
    if textures.ndim != 4 or textures.shape[1] != 3 or 0 in textures.shape:
        raise ValueError(f"frost_textures: expected a non-empty (T, 3, h, w), got {tuple(textures.shape)}")
    return frost.fit_textures(to_unit(textures[: frost.USED_TEXTURES].to(images.device)), scale, size)
