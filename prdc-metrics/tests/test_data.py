"""Feature files, image folders, subsets and the two small data sets."""

import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from prdc_metrics.data import (
    ImageArray,
    ImageFiles,
    Resize,
    as_rgb,
    dataset_record,
    load_digits,
    load_mnist,
)
from prdc_metrics.feature_files import load_features, load_sample_archive, subset
from shared_utils.images import BrokenFile

FEATURES = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)


def write_features(path, array=FEATURES, key="features"):
    tensor = torch.from_numpy(array)
    match path.suffix.lower():
        case ".npy":
            np.save(path, array)
        case ".npz":
            np.savez(path, **{key: array})
        case ".pt":
            torch.save(tensor, path)
        case ".safetensors":
            safetensors.torch.save_file({key: tensor}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_features_come_back_from_every_format(suffix, tmp_path):
    assert torch.equal(load_features(write_features(tmp_path / f"f{suffix}")), torch.from_numpy(FEATURES))
    doubles = load_features(str(write_features(tmp_path / f"d{suffix}", FEATURES.astype(np.float64), "x")))
    assert doubles.dtype == torch.float64


def test_features_are_taken_by_name_among_several(tmp_path):
    np.savez(tmp_path / "two.npz", labels=np.arange(50), features=FEATURES)
    assert load_features(tmp_path / "two.npz").shape == (50, 7)
    np.savez(tmp_path / "which.npz", a=FEATURES, b=FEATURES)
    with pytest.raises(ValueError, match=r"which\.npz.*\['a', 'b'\], expected 'features'"):
        load_features(tmp_path / "which.npz")


def test_foreign_byte_order(tmp_path):
    np.save(tmp_path / "big.npy", FEATURES.astype(">f8"))
    assert torch.equal(load_features(tmp_path / "big.npy"), torch.from_numpy(FEATURES).double())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
def test_truncated_feature_files_are_named(suffix, share, tmp_path):
    path = write_features(tmp_path / f"cut{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"cut\{suffix}: cannot be read as features"):
        load_features(path)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_pickles_are_refused_unopened(suffix, tmp_path):
    path, sprung = tmp_path / f"evil{suffix}", tmp_path / "sprung"
    if suffix == ".pt":
        torch.save(Trap(sprung), path)
    elif suffix == ".npz":
        np.savez(path, features=np.array([Trap(sprung)], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="evil"):
        load_features(path)
    assert not sprung.exists()


def test_what_is_no_feature_matrix(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npy: no such feature file"):
        load_features(tmp_path / "none.npy")
    (tmp_path / "f.txt").write_text("1,2")
    with pytest.raises(ValueError, match=r"f\.txt: a feature file must end in one of \.npy"):
        load_features(tmp_path / "f.txt")
    for array, reason in [
        (FEATURES[0], r"\(7,\)"),
        (FEATURES[None], r"\(1, 50, 7\)"),
        (FEATURES[:0], r"\(0, 7\)"),
        (FEATURES > 0, "real numbers, found bool"),
        (FEATURES.astype(complex), "real numbers, found complex"),
        (np.array([["a"]]), "real numbers"),
    ]:
        np.save(tmp_path / "wrong.npy", array)
        with pytest.raises(ValueError, match=rf"wrong\.npy.*{reason}"):
            load_features(tmp_path / "wrong.npy")


# ---- images ----


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)


RED = np.zeros((4, 6, 3), np.uint8) + np.array([200, 30, 10], np.uint8)


def test_folder_is_recursive_sorted_and_keeps_to_image_suffixes(tmp_path):
    for name in ["b/2.png", "b/10.JPG", "a.webp", "Z.bmp", "c/d/e.JpEg"]:
        save(tmp_path / name, RED)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    files = ImageFiles(tmp_path)
    assert files.names == ["Z.bmp", "a.webp", "b/10.JPG", "b/2.png", "c/d/e.JpEg"]
    assert len(files) == 5 and files[3].shape == (3, 4, 6)
    torch.testing.assert_close(files[3], torch.from_numpy(RED).permute(2, 0, 1) / 255)
    assert torch.equal(files[3], as_rgb(RED))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_modes_become_rgb(mode):
    grey = np.full((4, 6, 3), 255, np.uint8)
    rgb = as_rgb(Image.fromarray(RED if mode in ("RGB", "RGBA", "CMYK") else grey).convert(mode))
    assert rgb.shape == (3, 4, 6) and rgb.dtype == torch.float32
    expected = torch.tensor([200, 30, 10]) / 255 if mode in ("RGB", "RGBA", "CMYK") else torch.ones(3)
    torch.testing.assert_close(rgb[:, 0, 0], expected, atol=0.01, rtol=0)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    save(tmp_path / "deep.png", np.array([[0, 256, 32768, 65535]], np.uint16))
    rgb = ImageFiles(tmp_path)[0]
    torch.testing.assert_close(rgb[1, 0], torch.tensor([0, 256, 32768, 65535]) / 65535, atol=1 / 510, rtol=0)
    assert torch.equal(rgb[0], rgb[2])


def test_folder_images_look_as_in_a_viewer(tmp_path):
    """Transparent pixels on white, turned as EXIF says."""
    save(tmp_path / "a.png", np.concatenate([RED, np.zeros((4, 6, 1), np.uint8)], axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    save(tmp_path / "turned.jpg", RED, exif=exif)
    files = ImageFiles(tmp_path)
    assert (files[0] == 1).all() and files[1].shape == (3, 6, 4)
    for item, name in zip(files, ("a.png", "turned.jpg"), strict=True):  # also an image of the user's own Dataset
        with Image.open(tmp_path / name) as image:
            assert torch.equal(as_rgb(image), item)


def test_links_and_tiffs_count_and_hidden_files_do_not(tmp_path, caplog):
    for name in ["a.tif", "elsewhere/b.png", ".ipynb_checkpoints/a-checkpoint.png", "._c.png"]:
        save(tmp_path / "set" / name if "elsewhere" not in name else tmp_path / name, RED)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "notes.txt").write_text("no image")
    with caplog.at_level("INFO"):
        assert ImageFiles(tmp_path / "set").names == ["a.tif", "linked/b.png"]
    assert "2 images; left out: 1 .txt, 2 hidden" in caplog.text


def test_tables_of_numbers_and_archives(tmp_path):
    """CSV with and without a header, parquet, dgm-eval's reps, guided-diffusion's samples and statistics."""
    x = np.arange(12, dtype=float).reshape(4, 3) / 7
    np.savetxt(tmp_path / "plain.csv", x, delimiter=",")
    np.savetxt(tmp_path / "headed.csv", x, delimiter=",", header="a,b,c", comments="")
    np.savez(tmp_path / "reps.npz", reps=x, hparams=np.zeros(2))
    for name in ("plain.csv", "headed.csv", "reps.npz"):
        np.testing.assert_allclose(load_features(tmp_path / name).numpy(), x)
    (tmp_path / "words.csv").write_text("name,a\nx.png,1\n")
    with pytest.raises(ValueError, match="words.csv.*'name' is not numeric"):
        load_features(tmp_path / "words.csv")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="need the samples themselves"):
        load_features(tmp_path / "stats.npz")
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", images, np.arange(5))
    assert load_sample_archive(tmp_path / "samples.npz").shape == images.shape
    np.savez(tmp_path / "reference.npz", images, np.arange(5), mu=np.zeros(3), sigma=np.eye(3))
    assert load_sample_archive(tmp_path / "reference.npz").shape == images.shape
    assert load_sample_archive(tmp_path / "reps.npz") is None


def test_parquet(tmp_path, monkeypatch):
    """With pyarrow its numbers, without it what to install."""
    import pandas as pd

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setitem(sys.modules, "fastparquet", None)
        with pytest.raises(ValueError, match="x.parquet.*parquet needs pyarrow: pip install pyarrow"):
            load_features(tmp_path / "x.parquet")
    pytest.importorskip("pyarrow", reason="reads parquet")
    pd.DataFrame(FEATURES, columns=list("abcdefg")).to_parquet(tmp_path / "x.parquet")
    assert torch.equal(load_features(tmp_path / "x.parquet"), torch.from_numpy(FEATURES))


def test_a_zip_is_a_folder(tmp_path):
    """Same images, same order, read by workers; what is no image is said; a broken entry is named."""
    for name in ["b/2.png", "b/1.JPG", "a.png", ".hidden/x.png", "dataset.json"]:
        save(tmp_path / "set" / name, RED) if name != "dataset.json" else (tmp_path / "set" / name).write_text("{}")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "set")
    folder, packed = ImageFiles(tmp_path / "set"), ImageFiles(tmp_path / "packed.zip")
    assert packed.names == folder.names == ["a.png", "b/1.JPG", "b/2.png"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed, folder, strict=True))
    everything = torch.arange(3)
    assert packed.content_digest(everything) == folder.content_digest(everything)
    loaded = torch.cat(list(DataLoader(packed, num_workers=2)))
    assert torch.equal(loaded, torch.stack(list(folder)))
    whole = (tmp_path / "packed.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "packed.zip") as archive:
        start = archive.getinfo("a.png").header_offset + 60
    (tmp_path / "bad.zip").write_bytes(whole[:start] + b"????" + whole[start + 4 :])
    with pytest.raises(BrokenFile, match=r"bad.zip/a.png: .*--skip-broken"):
        ImageFiles(tmp_path / "bad.zip")[0]
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="cut.zip: is not a complete zip archive"):
        ImageFiles(tmp_path / "cut.zip")


def test_images_of_different_sizes_batch_when_a_size_is_given(tmp_path):
    save(tmp_path / "a.png", RED)
    save(tmp_path / "b.png", np.repeat(RED, 3, axis=0))
    files = ImageFiles(tmp_path, resize=Resize((8, 5)))
    assert torch.stack([files[0], files[1]]).shape == (2, 3, 8, 5)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_corrupt_image_is_named_or_handed_back(suffix, share, tmp_path):
    path = tmp_path / "sub" / f"bad.{suffix}"
    save(path, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BrokenFile, match=rf"sub/bad\.{suffix}: .*--skip-broken"):
        ImageFiles(tmp_path)[0]
    assert isinstance(ImageFiles(tmp_path, skip_broken=True)[0], BrokenFile)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ImageFiles(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no images"):
        ImageFiles(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file\.png: is a file; expected an image folder or a .zip"):
        ImageFiles(tmp_path / "file.png")


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (3, 5, 6), (5, 6, 3)])
def test_array_layouts_agree_with_by_hand(shape):
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
    channels_last = shape[-1] == 3
    by_hand = images.transpose(0, 3, 1, 2) if channels_last else images.reshape(4, -1, 5, 6)
    expected = torch.from_numpy(np.broadcast_to(by_hand, (4, 3, 5, 6)) / np.float32(255))
    dataset = ImageArray(images)
    torch.testing.assert_close(torch.stack([dataset[i] for i in range(len(dataset))]), expected)
    if not channels_last:
        torch.testing.assert_close(ImageArray(torch.from_numpy(images) / 255)[2], dataset[2])


@pytest.mark.parametrize(
    "images, reason",
    [
        (torch.rand(4, 8), r"\(4, 8\)"),
        (torch.rand(4, 2, 8, 8), r"\(4, 2, 8, 8\)"),
        (torch.rand(4, 8, 8, 3), r"\(4, 8, 8, 3\) torch.float32"),
        (torch.rand(0, 8, 8), r"\(0, 8, 8\)"),
        (torch.ones(4, 8, 8, dtype=torch.int64), "torch.int64"),
        (torch.linspace(-1, 1, 256).view(4, 8, 8), r"torch.float32 in \[-1, 1\]"),
        (torch.linspace(0, 255, 256).view(4, 8, 8), r"in \[0, 255\]"),
        (torch.full((4, 8, 8), torch.nan), "nan"),
        (np.zeros((4, 8, 8), bool), "bool"),
    ],
)
def test_other_arrays_are_refused(images, reason):
    with pytest.raises(ValueError, match=reason):
        ImageArray(images)


# ---- subsets and data sets ----


@given(st.integers(1, 200), st.integers(1, 250), st.integers(0, 10))
def test_subset_is_sorted_unique_and_repeatable(n, num_samples, seed):
    chosen = subset(n, num_samples, seed)
    assert chosen.dtype == torch.int64 and len(chosen) == min(n, num_samples)
    assert (chosen.diff() > 0).all() and 0 <= chosen[0] and chosen[-1] < n
    assert torch.equal(chosen, subset(n, num_samples, seed))


def test_subset_depends_on_the_seed_and_reaches_every_item():
    assert not torch.equal(subset(1000, 10, 0), subset(1000, 10, 1))
    seen = torch.cat([subset(20, 5, seed) for seed in range(60)])
    assert len(seen.unique()) == 20
    assert torch.equal(subset(4, None, 0), torch.arange(4))
    with pytest.raises(ValueError, match="at least 1"):
        subset(4, 0, 0)


def write_mnist(root, images=3):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        header = b"".join(x.to_bytes(4, "big") for x in (2051, images, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(range(256)) * (images * 784 // 256 + 1))
        pixels = (raw / f"{prefix}-images-idx3-ubyte").read_bytes()[: 16 + images * 784]
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        labels = b"".join(x.to_bytes(4, "big") for x in (2049, images)) + bytes(range(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return raw


def test_mnist_is_read_and_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST.raw: MNIST lacks train-images.*download=True"):
        load_mnist(tmp_path, train=True)
    raw = write_mnist(tmp_path)
    mnist = load_mnist(tmp_path, train=False)
    assert mnist.images.shape == (3, 28, 28) and mnist.images.dtype == torch.uint8
    assert mnist.images[0, 0, 5] == 5 and mnist.labels.tolist() == [0, 1, 2]
    for cut in (8, 500):
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ValueError, match="MNIST is damaged"):
            load_mnist(tmp_path, train=True)


def test_digits():
    digits = load_digits()
    assert digits.images.shape == (1797, 8, 8) and digits.images.dtype == torch.float32
    assert digits.images.min() == 0 and digits.images.max() == 1
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_dataset_record_follows_the_content():
    array = np.arange(6.0).reshape(2, 3)
    record = dataset_record("toy", array)
    assert record["name"] == "toy" and record["shape"] == [2, 3] and len(record["sha256"]) == 16
    assert dataset_record("toy", torch.from_numpy(array)) == record
    assert dataset_record("toy", array + 1)["sha256"] != record["sha256"]
    assert dataset_record("toy", np.asfortranarray(array)) == record
