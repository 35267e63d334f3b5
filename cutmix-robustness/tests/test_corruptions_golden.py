"""The image corruptions against images from the two published generators.

corruptions_cifar.npz is from make_cifar_c of hendrycks/robustness, corruptions_imagenet.npz from imagecorruptions
1.1.2. Where those draw random numbers, the same numbers are drawn here from numpy (seed 7 + image, in their order of
calls) and handed to the pure function of the corruption.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState

from cutmix_robustness.corruptions import SEVERITIES, blur, corrupt, digital, noise, weather
from cutmix_robustness.corruptions.pixels import truncate

SCALES = ("cifar", "imagenet")
DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate") + (
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)
GOLDEN = {scale: np.load(Path(__file__).parent / "golden" / f"corruptions_{scale}.npz") for scale in SCALES}


def golden_inputs(scale):  # (N, 3, H, W) uint8
    keys = [key for key in GOLDEN[scale].files if key.startswith("input")]
    return torch.from_numpy(np.stack([GOLDEN[scale][key] for key in sorted(keys)])).permute(0, 3, 1, 2).contiguous()


def golden_cases(name):  # scale, severity and (N, 3, H, W) images of a corruption
    for scale in SCALES:
        for severity in range(1, 6):
            keys = sorted(k for k in GOLDEN[scale].files if f"{k}/".startswith(f"{name}/{severity}/"))
            if keys:
                images = np.stack([GOLDEN[scale][key] for key in keys]).transpose(0, 3, 1, 2)
                yield scale, severity, torch.from_numpy(images)


def difference(a, b):
    return (a.int() - b.int()).abs()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_corruptions_equal_the_golden_images(name):
    cases = list(golden_cases(name))
    assert len(cases) == 8
    for scale, severity, expected in cases:
        got = corrupt(golden_inputs(scale), name, severity, scale)
        assert difference(got, expected).max() <= (2 if name == "jpeg_compression" else 1), (scale, severity)


def as_float(array):
    return torch.from_numpy(np.ascontiguousarray(array)).float()


def normal_rgb(rng, image, constants):
    return as_float(rng.normal(size=(*image.shape[1:], 3)).transpose(2, 0, 1))


def normal_grey(rng, image, constants):
    return as_float(rng.normal(size=image.shape[1:]))


def poisson(rng, image, constants):
    return as_float(rng.poisson(image.permute(1, 2, 0).numpy() / 255.0 * constants).transpose(2, 0, 1))


def glass_moves(rng, image, constants):
    _, delta, passes = constants
    height, width = image.shape[1:]
    dx, dy = np.moveaxis(rng.randint(-delta, delta, size=(passes, height - 2 * delta, width - 2 * delta, 2)), -1, 0)
    return list(torch.from_numpy(dy * width + dx))


def plasma(rng, image, constants):
    levels = (max(image.shape[1:]) - 1).bit_length()
    return [as_float(rng.uniform(-1, 1, size=(3, 2**level, 2**level))) for level in range(levels)]


def angle(rng, image, constants):
    return torch.tensor(rng.uniform(-45, 45))


def snow(rng, image, constants):
    return [normal_grey(rng, image, constants), torch.tensor(rng.uniform(-135, -45))]


def elastic(rng, image, constants):
    jitter = as_float(rng.uniform(-1, 1, size=(3, 2))) if constants[2] else torch.zeros(3, 2)
    return [jitter, *(as_float(rng.uniform(-1, 1, size=image.shape[1:])) for _ in range(2))]


SEEDED = {
    "gaussian_noise": (noise.gaussian_noise, normal_rgb, 8),
    "shot_noise": (noise.shot_noise, poisson, 8),
    "speckle_noise": (noise.speckle_noise, normal_rgb, 8),
    "glass_blur": (blur.glass_blur, glass_moves, 8),
    "motion_blur": (blur.motion_blur, angle, 3),  # ImageMagick made those of CIFAR-C
    "snow": (weather.snow, snow, 3),
    "fog": (weather.fog, plasma, 8),
    "spatter": (weather.spatter, normal_grey, 8),
    "elastic_transform": (digital.elastic_transform, elastic, 8),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_corruptions_equal_the_golden_images_given_the_same_draws(name):
    apply, draw, count = SEEDED[name]
    cases = list(golden_cases(name))
    assert len(cases) == count
    for scale, severity, expected in cases:
        images, constants = golden_inputs(scale), SEVERITIES[scale][name][severity - 1]
        draws = [draw(RandomState(7 + i), image, constants) for i, image in enumerate(images)]
        if isinstance(draws[0], list):
            draws = [torch.stack(parts) for parts in zip(*draws, strict=True)]
        else:
            draws = torch.stack(draws)
        assert difference(truncate(apply(images, constants, draws)), expected).max() <= 1, (scale, severity)


def test_impulse_noise_has_the_golden_rates():
    for scale, severity, expected in golden_cases("impulse_noise"):
        amount = SEVERITIES[scale]["impulse_noise"][severity - 1]
        grey = torch.full((4, 3, 100, 100), 99, dtype=torch.uint8)
        ours = corrupt(grey, "impulse_noise", severity, scale, seeds=torch.arange(4))
        assert set(ours.unique().tolist()) == {0, 99, 255}
        changed = golden_inputs(scale) != expected  # a value that was 0 or 255 may hide a change: few here
        for rate, share, count in (
            ((ours == 0).double().mean(), amount / 2, ours.numel()),
            ((ours == 255).double().mean(), amount / 2, ours.numel()),
            (changed.double().mean(), amount, changed.numel()),
        ):
            assert abs(rate - share) < 5 * (share * (1 - share) / count) ** 0.5 + 0.03 * share


def test_frost_blends_as_in_the_golden_images():
    """The seed fixes the photograph and its crop, so severity 5 gives the texture away and the others must follow."""
    cases = {(scale, severity): images for scale, severity, images in golden_cases("frost")}
    for scale in SCALES:
        keep, strength = SEVERITIES[scale]["frost"][4]
        images = golden_inputs(scale).double()
        texture = (cases[scale, 5] + 0.5 - keep * images) / strength  # up to 0.5 / strength
        for (case_scale, severity), expected in cases.items():
            if case_scale == scale:
                keep_s, strength_s = SEVERITIES[scale]["frost"][severity - 1]
                guess = (keep_s * images + strength_s * texture).clamp(0, 255)
                error = (guess - expected - 0.5).abs()[cases[scale, 5] < 255]
                assert error.max() <= 0.5 + 0.5 * strength_s / strength + 0.01, (scale, severity)
