"""The image corruptions: slow definitions, laws of the random draws, invariances, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cutmix_robustness import corruptions
from cutmix_robustness.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GROUPS,
    SEVERITIES,
    blur,
    corrupt,
    digital,
    frost,
    noise,
)
from cutmix_robustness.corruptions.pixels import truncate
from cutmix_robustness.corruptions.streams import SampleStreams

ALL = CORRUPTIONS + EXTRA_CORRUPTIONS
SCALES = ("cifar", "imagenet")
DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate") + (
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)


def difference(a, b):
    return (a.int() - b.int()).abs()


def photo(n, height, width, seed=0):  # smooth coloured images with flat parts
    small = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return (large * 300).clamp(0, 255).byte()


# ---- slow definitions


def scanned_glass(image, moves, delta):  # as the generator does, literally: both sides are views
    image = image.copy()
    height, width = image.shape[:2]
    for moves_of_pass in moves:
        look = iter(moves_of_pass.flatten())
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                dy, dx = divmod(int(next(look)) + delta * width + delta, width)
                h_other, w_other = h + dy - delta, w + dx - delta
                image[h, w], image[h_other, w_other] = image[h_other, w_other], image[h, w]
    return image


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 26), st.integers(9, 26), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**62))
def test_glass_scan_by_pointer_doubling_equals_the_scan(height, width, delta, passes, seed):
    blank = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    moves = blur.draw_glass_moves(SampleStreams(torch.tensor([seed, 1])), blank, (1.0, delta, passes))
    assert all(m.shape == (2, max(height - 2 * delta, 0), max(width - 2 * delta, 0)) for m in moves)
    sources = blur.glass_sources(moves, (height, width), delta)
    for i in range(2):
        names = np.arange(height * width).reshape(height, width, 1).repeat(3, 2)
        expected = scanned_glass(names, [m[i].numpy() for m in moves], delta)
        np.testing.assert_array_equal(sources[i].view(height, width), expected[..., 0])


@pytest.mark.parametrize("radius, sigma", [(6, 1), (9, 2.5), (20, 15)])
def test_motion_blur_is_the_sum_of_shifted_images(radius, sigma):
    images = photo(3, 24, 33)
    angles = torch.tensor([-45.0, 12.3, 100.0], dtype=torch.float64)
    got = blur.motion_blur(images, (radius, sigma), angles)
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    for image, degrees, blurred in zip(images.double() / 255, angles.tolist(), got, strict=True):
        expected = np.zeros(image.shape)
        for i, weight in enumerate(weights / weights.sum()):
            dy, dx = (-int(np.ceil(i * f(np.deg2rad(degrees)) - 0.5)) for f in (np.sin, np.cos))
            if abs(dy) >= 24 or abs(dx) >= 33:
                break
            rows, columns = np.clip(np.arange(24) - dy, 0, 23), np.clip(np.arange(33) - dx, 0, 32)
            expected += weight * image.numpy()[:, rows][..., columns]
        np.testing.assert_allclose(blurred, expected, atol=2e-6)


@pytest.mark.parametrize("photons", [3, 60, 500])
def test_poisson_tables_hold_the_poisson_law(photons):
    accept, alias = (table.double() for table in noise._poisson_tables(photons))
    columns = accept.shape[1]
    law = accept.scatter_add(1, alias.long(), 1 - accept) / columns
    expected = stats.poisson.pmf(np.arange(columns), np.arange(256)[:, None] / 255 * photons)
    np.testing.assert_allclose(law, expected, atol=2e-7)


def test_shot_noise_has_mean_and_variance_of_poisson():
    images = torch.full((20, 3, 100, 100), 153, dtype=torch.uint8)
    counts = noise.draw_photons(SampleStreams(torch.arange(20)), images, 60).double()
    assert abs(counts.mean() - 36) < 5 * (36 / counts.numel()) ** 0.5
    assert abs(counts.var() / 36 - 1) < 5 * (2 / counts.numel()) ** 0.5


def test_elastic_transform_without_displacement_is_the_affine_map():
    image = torch.arange(21).repeat(21, 1).mul(10).byte().expand(1, 3, -1, -1)
    draws = torch.tensor([[[2.0, -1.0]] * 3]), torch.zeros(1, 21, 21), torch.zeros(1, 21, 21)
    moved = truncate(digital.elastic_transform(image, (0.0, 0.0, 1.0, False), draws))
    assert torch.equal(moved[..., 2:], image[..., :-2])  # all corners move by (2, -1): so does the image
    assert torch.equal(moved[..., :2], image[..., [2, 1]])


# ---- random numbers


def test_streams_have_the_laws_they_claim():
    streams = SampleStreams(torch.arange(50))
    uniform, normal, integers = streams.uniform(2001), streams.normal(2001), streams.integers(6, 2001)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(integers.flatten(), minlength=6)).pvalue > 1e-3
    for numbers in (uniform - 0.5, normal):
        correlation = torch.corrcoef(numbers)[~torch.eye(50, dtype=torch.bool)]
        assert correlation.abs().max() < 6 * 2001**-0.5
        assert abs(torch.corrcoef(torch.stack((numbers[:, 1:].flatten(), numbers[:, :-1].flatten())))[0, 1]) < 0.02


def test_streams_repeat_and_move_on():
    first = SampleStreams(torch.tensor([3, 2**63 - 1, -5]))
    again = SampleStreams(torch.tensor([-5, 3]))
    a, b = first.normal(4, 5), first.normal(4, 5)
    assert not torch.equal(a, b)
    assert torch.equal(again.normal(4, 5), a[[2, 0]]) and torch.equal(again.normal(4, 5), b[[2, 0]])


# ---- invariances


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ALL)
def test_an_image_is_corrupted_alike_in_any_batch(name, scale, monkeypatch):
    images = photo(7, 33, 46)
    seeds = torch.randint(2**63 - 1, (7,), generator=torch.Generator().manual_seed(1))
    whole = corrupt(images, name, 3, scale, seeds=seeds)
    for split in (1, 3):
        parts = [
            corrupt(x, name, 3, scale, seeds=s) for x, s in zip(images.split(split), seeds.split(split), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(corruptions, "_CPU_CHUNK", 2 * images[0].numel())
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(corrupt(images[order], name, 3, scale, seeds=seeds[order]), whole[order])


@pytest.mark.parametrize("name", ALL)
def test_layout_autocast_and_generator(name):
    images = photo(3, 40, 32)
    before = images.clone()
    expected = corrupt(images, name, 4, "imagenet", generator=torch.Generator().manual_seed(5))
    assert expected.dtype == torch.uint8 and expected.shape == images.shape and expected.is_contiguous()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = corrupt(channels_last, name, 4, "imagenet", generator=torch.Generator().manual_seed(5))
    assert torch.equal(got, expected) and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before) and torch.equal(channels_last, before)
    other = corrupt(images, name, 4, "imagenet", generator=torch.Generator().manual_seed(6))
    assert torch.equal(other, expected) == (name in DETERMINISTIC)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (31, 64), (224, 224)])
@pytest.mark.parametrize("scale", SCALES)
def test_any_size_works(scale, size):
    images = photo(1, *size)
    for name in ALL:
        got = corrupt(images, name, 5, scale, seeds=torch.tensor([1]))
        assert got.shape == images.shape and got.dtype == torch.uint8, name
        assert min(size) == 1 or not torch.equal(got, images), name


def test_black_white_and_grey_images_survive():
    flat = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    for name in ("defocus_blur", "zoom_blur", "contrast", "pixelate", "glass_blur", "elastic_transform"):
        for scale in SCALES:
            got = corrupt(flat, name, 3, scale, seeds=torch.arange(3))
            assert difference(got, flat).max() <= 2, (name, scale)  # two roundings down at most
    assert corrupt(flat, "brightness", 5, "imagenet")[:, 0, 0, 0].tolist() == [127, 255, 255]
    assert corrupt(flat, "saturate", 4, "imagenet")[:, :, 0, 0].tolist() == [[0] * 3, [255, 229, 229], [128, 115, 115]]


def test_frost_takes_the_users_textures():
    images = photo(40, 32, 32)
    textures = torch.stack([torch.full((3, 300, 250), 40 * i, dtype=torch.uint8) for i in range(6)])
    got = corrupt(images, "frost", 2, "cifar", seeds=torch.arange(40), frost_textures=textures)
    added = difference(got, images)[got < 255].unique()  # 0.3 of 0, 40, .., 160: never the sixth
    assert added.tolist() == [0, 12, 24, 36, 48]
    assert frost.fit_textures(textures / 255, "cifar", (32, 32)).shape == (6, 3, 60, 50)
    assert frost.fit_textures(textures / 255, "imagenet", (600, 100)).shape == (6, 3, 660, 550)


def test_names_are_in_the_order_of_mce():
    assert len(CORRUPTIONS) == 15 and len(EXTRA_CORRUPTIONS) == 4 and len(set(ALL)) == 19
    assert CORRUPTIONS[0] == "gaussian_noise" and CORRUPTIONS[-1] == "jpeg_compression"
    assert [len(names) for names in GROUPS.values()] == [3, 4, 4, 4]
    assert all(set(SEVERITIES[scale]) == set(ALL) for scale in SCALES)
    assert all(len(levels) == 5 for scale in SCALES for levels in SEVERITIES[scale].values())


# ---- bad input

X = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
BAD = {
    "unknown name": ((X, "gausian_noise", 1), {}, ValueError, "name.*gaussian_noise.*saturate.*gausian_noise"),
    "severity 0": ((X, "fog", 0), {}, ValueError, "severity.*got 0"),
    "severity 6": ((X, "fog", 6), {}, ValueError, "severity.*got 6"),
    "severity 1.5": ((X, "fog", 1.5), {}, ValueError, "severity.*got 1.5"),
    "severity True": ((X, "fog", True), {}, ValueError, "severity.*got True"),
    "severity text": ((X, "fog", "3"), {}, ValueError, "severity.*got '3'"),
    "scale": ((X, "fog", 1, "cifar10"), {}, ValueError, "scale.*cifar, imagenet.*'cifar10'"),
    "float images": ((X.float(), "fog", 1), {}, TypeError, "images.*uint8.*float32"),
    "numpy images": ((X.numpy(), "fog", 1), {}, TypeError, "images.*Tensor.*ndarray"),
    "3-D": ((X[0], "fog", 1), {}, ValueError, r"images.*\(3, 8, 8\)"),
    "one channel": ((X[:, :1], "fog", 1), {}, ValueError, r"images.*\(2, 1, 8, 8\)"),
    "empty batch": ((X[:0], "fog", 1), {}, ValueError, r"images.*\(0, 3, 8, 8\)"),
    "seeds of wrong length": ((X, "fog", 1), {"seeds": torch.arange(3)}, ValueError, r"seeds.*\(2,\).*\(3,\)"),
    "float seeds": ((X, "fog", 1), {"seeds": torch.rand(2)}, TypeError, "seeds.*int64.*float32"),
    "seeds and generator": (
        (X, "fog", 1),
        {"seeds": torch.arange(2), "generator": torch.Generator()},
        ValueError,
        "seeds.*both",
    ),
    "float textures": ((X, "frost", 1), {"frost_textures": torch.rand(1, 3, 9, 9)}, TypeError, "frost_textures"),
    "3-D textures": ((X, "frost", 1), {"frost_textures": X[0]}, ValueError, r"frost_textures.*\(3, 8, 8\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    args, kwargs, error, message = BAD[case]
    with pytest.raises(error, match=message):
        corrupt(*args, **kwargs)
