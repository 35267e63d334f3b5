"""extract_features: every kind of source, settings that must not leak, and a cache that is never believed blindly."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prdc_metrics.arithmetic import full_float32
from prdc_metrics.data import Resize, as_rgb
from prdc_metrics.embeddings import FrozenEmbedding, Recipe
from prdc_metrics.features import extract_features
from shared_utils.images import BrokenFile


class Pool:
    """A cheap embedding: 4 x 4 means of each channel. Counts the images it has seen."""

    size = (8, 8)

    def __init__(self, tag="pool"):
        self.provenance, self.seen = {"name": tag}, 0

    def __call__(self, images):
        assert images.dtype == torch.float32 and images.shape[1] == 3
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def log(caplog, monkeypatch):
    logger = logging.getLogger("prdc_metrics")
    monkeypatch.setattr(logger, "propagate", False)  # a CLI test may have set this already
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "prdc_metrics")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def folder(tmp_path):
    """Ten images of random content, the odd ones of another size."""
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (12, 9 + i % 2, 3), np.uint8)
        path = tmp_path / "images" / f"{i // 5}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def first_image(folder):
    return folder / "0" / "0.png"


# ---- sources ----


def test_folder_rows_follow_the_sorted_names(folder):
    features = extract_features(folder, Pool(), batch_size=3)
    assert features.shape == (10, 48) and features.dtype == torch.float32
    assert not features.is_inference() and not features.requires_grad
    alone = extract_features(folder / "1", Pool())
    assert torch.equal(features[5:], alone)


def test_batch_size_and_workers_change_nothing(folder):
    one = extract_features(str(folder), Pool(), batch_size=1)
    assert torch.equal(extract_features(folder, Pool(), batch_size=4, num_workers=1), one)


def test_array_layouts_and_datasets_agree():
    images = np.random.default_rng(0).integers(0, 256, (5, 10, 10, 3), np.uint8)
    last = extract_features(images, Pool())
    first = torch.from_numpy(images).permute(0, 3, 1, 2)
    labelled = [(Image.fromarray(image), label) for label, image in enumerate(images)]
    for source in (first, first / 255, first.numpy(), labelled, list(first), first.double() / 255):
        torch.testing.assert_close(extract_features(source, Pool()), last)


def test_grey_is_repeated_over_channels():
    features = extract_features(torch.rand(3, 8, 8), lambda x: x.mean((2, 3)))
    assert features.shape == (3, 3) and torch.equal(features[:, 0], features[:, 2])


def test_dataset_of_different_sizes_needs_a_size():
    sizes = [torch.rand(3, 8, 8), torch.rand(3, 8, 9)]
    assert extract_features(sizes, Pool()).shape == (2, 48)
    with pytest.raises(ValueError, match=r"differ in size \[\(8, 8\), \(8, 9\)\]"):
        extract_features(sizes, lambda x: x.flatten(1))


def test_a_folder_is_resized_as_the_embedding_says(folder):
    """Already while loading: TensorFlow's resize and bilinear are not the same."""
    network = FrozenEmbedding(nn.Flatten(), {"name": "flat"}, Recipe(Resize((8, 8), "tensorflow")))
    alone = [network(as_rgb(Image.open(path))[None]) for path in sorted(folder.rglob("*.png"))]
    torch.testing.assert_close(extract_features(folder, network), torch.cat(alone))


def test_subset_is_a_part_of_the_whole(folder):
    whole, part = extract_features(folder, Pool()), extract_features(folder, Pool(), num_samples=4, sample_seed=1)
    assert len(part) == 4 and len(torch.cat([whole, part]).unique(dim=0)) == 10
    assert torch.equal(part, extract_features(folder, Pool(), num_samples=4, sample_seed=1))
    assert not torch.equal(part, extract_features(folder, Pool(), num_samples=4, sample_seed=2))
    assert torch.equal(whole, extract_features(folder, Pool(), num_samples=99))


@pytest.mark.parametrize("source", [torch.rand(3, 8) * 2, torch.rand(3, 8, 8) * 3, np.zeros((0, 8, 8)), [], 7])
def test_wrong_sources(source):
    with pytest.raises(ValueError):
        extract_features(source, Pool())


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: x.flatten(), lambda x: x[:1].flatten(1)])
def test_embedding_must_return_rows(wrong):
    with pytest.raises(ValueError, match=r"must return floating \(B, D\); for B = 3"):
        extract_features(torch.rand(3, 8, 8), wrong)


def test_embedding_in_training_mode_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Dropout())
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        extract_features(torch.rand(3, 8, 8), network)
    assert extract_features(torch.rand(3, 8, 8), network.eval()).shape == (3, 192)


# ---- unreadable files ----


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_file_fails_by_name(folder, num_workers):
    first_image(folder).write_bytes(first_image(folder).read_bytes()[:100])
    with pytest.raises(BrokenFile) as error:
        extract_features(folder, Pool(), num_workers=num_workers)
    assert str(error.value).startswith(f"{first_image(folder)}: ") and "\n" not in str(error.value)


def test_skip_broken_names_and_counts(folder, log, tmp_path):
    whole = extract_features(folder, Pool())
    first_image(folder).write_bytes(b"no png")
    (folder / "1" / "7.png").write_bytes(b"")
    keep = [i for i in range(10) if i not in (0, 7)]
    for _ in range(2):  # the second time from the cache: as loud as the first
        log.clear()
        features = extract_features(folder, Pool(), skip_broken=True, batch_size=1, cache=tmp_path / "cache")
        assert torch.equal(features, whole[keep])
        assert "0/0.png" in log.text and "1/7.png" in log.text
    with pytest.raises(BrokenFile, match=r"0\.png"):  # what was cached with skip_broken is no answer without it
        extract_features(folder, Pool(), cache=tmp_path / "cache")
    log.clear()
    extract_features(folder, Pool(), skip_broken=True)
    assert "skipped 2 of 10 images as unreadable" in log.text


def test_nothing_readable(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BrokenFile, match="all 10 images are unreadable"):
        extract_features(folder, Pool(), skip_broken=True)


# ---- precision and global state ----


def tf32_settings():
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        return [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
    return [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]


def test_tf32_is_off_inside_and_comes_back():
    torch.set_float32_matmul_precision("high")
    try:
        before, inside = tf32_settings(), []
        extract_features(torch.rand(1, 4, 4), lambda x: inside.append(tf32_settings()) or x.flatten(1))
        assert before in (["tf32", "tf32"], [True, True])
        assert inside in ([["ieee", "ieee"]], [[False, False]])
        assert tf32_settings() == before and torch.backends.cudnn.allow_tf32
        with pytest.raises(RuntimeError, match="inside"), full_float32():
            raise RuntimeError("inside")
        assert tf32_settings() == before and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bf16_changes_features_a_little_and_returns_float32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16)).eval()
    images = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    full, half = (extract_features(images, network, precision=p) for p in ("float32", "bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(half, full, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="'fp16' is neither"):
        extract_features(images, network, precision="fp16")


def test_global_rng_is_untouched(folder):
    before = torch.get_rng_state()
    extract_features(folder, Pool(), num_samples=5)
    assert torch.equal(torch.get_rng_state(), before)


# ---- cache ----


def cached(source, tmp_path, embedding=None, **settings):
    """Features through the cache, and whether the network had to run."""
    embedding = embedding or Pool()
    features = extract_features(source, embedding, cache=tmp_path / "cache", **settings)
    return features, embedding.seen > 0


def test_second_time_the_network_does_not_run(folder, tmp_path):
    features, ran = cached(folder, tmp_path)
    again, ran_again = cached(folder, tmp_path)
    assert ran and not ran_again and torch.equal(features, again)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary file left


def test_moved_folder_still_hits_and_arrays_are_cached(folder, tmp_path):
    cached(folder, tmp_path)
    assert not cached(folder.rename(tmp_path / "elsewhere"), tmp_path)[1]
    images = torch.rand(4, 8, 8)
    assert cached(images, tmp_path)[1] and not cached(images.clone(), tmp_path)[1]
    assert cached(images.half(), tmp_path)[1]


def test_what_changes_the_features_changes_the_key(folder, tmp_path):
    cached(folder, tmp_path)
    assert cached(folder, tmp_path, Pool("another"))[1]
    assert cached(folder, tmp_path, precision="bf16")[1]
    assert cached(folder, tmp_path, num_samples=4)[1]
    assert cached(folder, tmp_path, num_samples=4, sample_seed=1)[1]
    resized = Pool()
    resized.size = (16, 16)
    assert cached(folder, tmp_path, resized)[1]
    image = Image.open(first_image(folder))
    image.putpixel((0, 0), (1, 2, 3))
    image.save(first_image(folder))
    changed, ran = cached(folder, tmp_path)
    assert ran and torch.equal(changed, extract_features(folder, Pool()))
    first_image(folder).rename(folder / "0" / "00.png")
    assert cached(folder, tmp_path)[1]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2, 0.5, 0.9, 0.9995])
def test_truncated_cache_is_noticed_and_rebuilt(share, folder, tmp_path, log):
    features, _ = cached(folder, tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    rebuilt, ran = cached(folder, tmp_path)
    assert ran and torch.equal(rebuilt, features) and "computing the features again" in log.text
    assert path.stat().st_size == len(whole) and not cached(folder, tmp_path)[1]


def test_flipped_bit_and_swapped_file_are_noticed(folder, tmp_path, log):
    features, _ = cached(folder, tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cached(folder, tmp_path)[1] and "does not match its key" in log.text
    cached(folder, tmp_path, Pool("another"))
    (other,) = set((tmp_path / "cache").iterdir()) - {path}
    path.write_bytes(other.read_bytes())  # whole, but of another embedding
    assert cached(folder, tmp_path)[1]
    assert torch.equal(cached(folder, tmp_path)[0], features)


def test_failed_write_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shared_utils.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(folder, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_what_cannot_be_told_apart_is_not_cached(folder, tmp_path, log):
    extract_features(folder, lambda x: x.mean((2, 3)), cache=tmp_path / "cache", num_samples=1)
    assert "no .provenance" in log.text
    assert cached([torch.rand(3, 8, 8)], tmp_path)[1] and "Dataset" in log.text
    assert not (tmp_path / "cache").exists()


def test_named_embedding_is_built_with_its_recipe_and_only_when_needed(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("prdc_metrics.features.load_embedding", lambda *a, **k: built.append((a, k)) or Pool())
    images, recipe = torch.rand(2, 8, 8), dict(weights=None, seed=1, init="torchvision", side=64)
    for _ in range(2):
        assert extract_features(images, "random-vgg16-64", cache=tmp_path, **recipe).shape == (2, 48)
    assert built == [(("random-vgg16-64",), recipe)]
    extract_features(images, "random-vgg16-64", cache=tmp_path, **recipe | {"seed": 2})
    assert len(built) == 2
