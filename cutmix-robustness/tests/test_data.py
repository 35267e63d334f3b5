"""Images read, drawn, cropped and corrupted, and what is missing or damaged."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_robustness import cli
from cutmix_robustness.corruption_error import ALEXNET_ERROR
from cutmix_robustness.corruptions import CORRUPTIONS
from cutmix_robustness.data import cifar, corrupted, imagenet, ood, sources, voc
from cutmix_robustness.data.inventory import inventory, verify
from cutmix_robustness.tiny import write_all, write_jpeg_archive
from shared_utils.images import BrokenFile

pytestmark = pytest.mark.usefixtures("here")


def test_missing_or_damaged_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="data --download cifar100"):
        cifar.load("cifar100", tmp_path, "none", "cpu")
    with pytest.raises(FileNotFoundError, match=r"cifar10-imagefolder.zip: archive not found"):
        cifar.load("cifar10-jpeg", tmp_path, "none", "cpu")
    write_jpeg_archive(tmp_path / cifar.JPEG_ARCHIVE, 2, side=30)
    with pytest.raises(BrokenFile, match="train/airplane/0000.jpg: 30 x 30 pixels, expected 32 x 32"):
        cifar.load("cifar10-jpeg", tmp_path, "none", "cpu")
    with pytest.raises(FileNotFoundError, match="data --download svhn"):
        ood.outliers("svhn", tmp_path, 32, 0, "cpu")
    with pytest.raises(FileNotFoundError, match="gan-samples: contains no images"):
        ood.outliers("gan", tmp_path, 32, 0, "cpu")
    with pytest.raises(FileNotFoundError, match="lacks Pascal VOC"):
        voc.VocImages(tmp_path, voc.TEST)
    with pytest.raises(FileNotFoundError, match="images.txt: missing"):
        imagenet.load_cub(tmp_path, "wsol", "cpu")
    with pytest.raises(FileNotFoundError, match="is not a folder with one folder of images per class"):
        imagenet.load(tmp_path / "imagenet", "imagenet", "cpu")


def test_a_broken_image_is_named(tmp_path, write_image_folder):
    write_image_folder(tmp_path, ["a", "b"])
    paths, labels, _ = sources.image_folder(tmp_path)
    paths[2].write_bytes(b"no image")
    for workers in (0, 1):
        data = sources.ImageFiles(paths, labels, "x", num_workers=workers)
        with pytest.raises(BrokenFile, match="^[^\n]*ILSVRC_1_0.JPEG: this is not an image; [^\n]*$"):
            list(data.batches())
    whole = data.without_broken()
    assert whole.skipped == [paths[2]] and whole.labels.tolist() == [0, 0, 1] == list(whole.batches())[0][2].tolist()
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 images of x are missing, first .*ILSVRC_1_0"):
        sources.ImageFiles(paths, labels, "x")
    with pytest.raises(ValueError, match="x contains no images"):
        sources.ImageFiles([], labels, "x")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BrokenFile, match="broken.png: this is not an image"):
        ood.folder_of_images(tmp_path, "x", "cpu")
    assert len(ood.folder_of_images(tmp_path, "x", "cpu", skip_broken=True)) == 3


def test_training_crops_do_not_depend_on_workers_or_resuming(tmp_path, write_image_folder):
    write_image_folder(tmp_path, ["a", "b"], per_class=4)
    paths, labels, _ = sources.image_folder(tmp_path)
    plain, workers = (sources.ImageFiles(paths, labels, "x", "imagenet", num_workers=n) for n in (0, 2))
    whole = list(plain.train_batches(4, 1, 3, 0, 0, 1))
    again = list(workers.train_batches(4, 1, 3, 0, 0, 1))
    resumed = list(plain.train_batches(4, 1, 3, 1, 0, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, again, strict=True))
    assert resumed[0][0] == 1 and torch.equal(resumed[0][1], whole[1][1])
    share = [list(plain.train_batches(4, 1, 3, 0, rank, 2)) for rank in (0, 1)]
    assert torch.equal(share[1][0][1], whole[0][1][1::2]) and torch.equal(share[0][0][2], whole[0][2][::2])


def test_lighting_shifts_a_whole_image_along_the_axes_of_colour():
    torch.manual_seed(0)
    grey = torch.full((3, 4, 5), 128, dtype=torch.uint8)
    shifts = torch.stack([sources.Lighting()(grey).float() - 128 for _ in range(3000)])
    assert (shifts == shifts[..., :1, :1]).all() and shifts.mean().abs() < 0.3
    covariance = torch.cov(shifts[:, :, 0, 0].T)
    axes, variances = sources.Lighting.axes, (25.5 * sources.Lighting.variances) ** 2
    expected = axes @ torch.diag(variances) @ axes.T + torch.eye(3) / 12  # and the rounding to 8 bits
    torch.testing.assert_close(covariance, expected, rtol=0.1, atol=0.3)


def test_inventory_says_what_to_do(tmp_path):
    missing = {row[0]: row[-1] for row in inventory(tmp_path) if row[4] == "no"}
    assert missing["CIFAR-100"] == "cutmix-robustness data --download cifar100" and len(missing) == 19
    (tmp_path / "cifar-100-python").mkdir()
    assert "CIFAR-100" not in {row[0] for row in inventory(tmp_path) if row[4] == "no"}


def test_corrupting_files(tmp_path, save_picture):
    save_picture(tmp_path / "in" / "sub" / "a.jpg", 1, 50, 70)
    save_picture(tmp_path / "in" / "b.png", 2, 40, 40)
    save_picture(tmp_path / "in" / "b.jpg", 3, 40, 40)
    (tmp_path / "in" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    save_picture(tmp_path / "in" / ".ipynb_checkpoints" / "b.png", 2, 40, 40)
    wide = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    Image.fromarray(wide).save(tmp_path / "in" / "wide.png")
    written = corrupted.write_images(tmp_path / "in", tmp_path / "out", ("fog", "pixelate"), (1, 5), "imagenet", 0)
    assert written == 16 and Image.open(tmp_path / "out" / "fog" / "5" / "sub" / "a.jpg.png").size == (70, 50)
    here = sorted(path.name for path in (tmp_path / "out" / "fog" / "1").iterdir())
    assert here == ["b.jpg.png", "b.png", "sub", "wide.png"]
    ramp = np.array(Image.open(tmp_path / "out" / "pixelate" / "1" / "wide.png"))[20, :, 0].astype(int)
    assert ramp[0] < 10 and ramp[-1] > 245 and abs(ramp[32] - 128) < 12
    (tmp_path / "in" / "cut.jpg").write_bytes((tmp_path / "in" / "b.jpg").read_bytes()[:700])
    options = (tmp_path / "in", tmp_path / "more", ("fog",), (1,), "imagenet", 0)
    with pytest.raises(BrokenFile, match="cut.jpg: .*; replace the file, or pass --skip-broken where"):
        corrupted.write_images(*options)
    assert corrupted.write_images(*options, skip_broken=True) == 4
    with pytest.raises(ValueError, match="nothing to write"):
        corrupted.write_images(tmp_path / "in", tmp_path / "out", ("fog",), (), "imagenet", 0, skip_broken=True)
    (tmp_path / "in" / "cut.jpg").unlink()
    first = np.array(Image.open(tmp_path / "out" / "fog" / "1" / "b.png"))
    corrupted.write_images(tmp_path / "in" / "b.png", tmp_path / "again", ("fog",), (1,), "imagenet", 0)
    assert np.array_equal(first, np.array(Image.open(tmp_path / "again" / "fog" / "1" / "b.png")))
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        corrupted.write_images(tmp_path / "none", tmp_path / "out", ("fog",), (1,), "imagenet", 0)
    with pytest.raises(ValueError, match="severity"):
        corrupted.write_images(tmp_path / "in", tmp_path / "out", ("fog",), (6,), "imagenet", 0)


def test_the_order_of_corruptions_is_that_of_mce():
    assert list(CORRUPTIONS) == list(ALEXNET_ERROR)


def test_digits_on_photographs_have_tight_boxes_and_parts_that_share_nothing(monkeypatch):
    from cutmix_robustness.data import digits

    data, boxes = digits.digits_on_photographs(40, 3, "train")
    assert data.images.shape == (40, 3, 32, 32) and data.labels.tolist() == 4 * list(range(10))
    same, other = digits.digits_on_photographs(40, 3, "train")[0], digits.digits_on_photographs(40, 3, "test")[0]
    assert torch.equal(data.images, same.images) and not torch.equal(data.images, other.images)
    monkeypatch.setattr(digits, "_photographs", lambda: 2 * [np.zeros((427, 640, 3), np.uint8)])
    for part in ("train", "test"):  # on black, what is bright is the digit
        data, boxes = digits.digits_on_photographs(40, 3, part)
        for image, ((x0, y0, x1, y1),) in zip(data.images, boxes, strict=True):
            rows, columns = np.nonzero(image[0].numpy() >= 128)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert 16 * 0.5 < y1 - y0 <= 24
    written, seen = digits._digits(), {}
    for part in ("train", "test"):
        taken = []
        monkeypatch.setattr(digits, "_digits", lambda: (np.arange(1797)[:, None, None] * np.ones((8, 8)), written[1]))
        monkeypatch.setattr(
            digits.Image, "fromarray", lambda digit, taken=taken: taken.append(int(digit[0, 0])) or _Ink()
        )
        digits.digits_on_photographs(300, 0, part)
        seen[part] = set(taken)
        assert [written[1][number] for number in taken] == 30 * list(range(10))
    assert not seen["train"] & seen["test"]


class _Ink:
    """Any digit, after the resize."""

    def resize(self, size, resample):
        return np.full(size, 255, np.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "root"
    write_all(root)
    return root


@pytest.mark.parametrize(
    ("place", "left", "name", "told"),
    [
        ("cifar-10-batches-py/data_batch_3", 0.7, "CIFAR-10", "data_batch_3: .*; download the archive again"),
        ("cifar-100-python/test", 0, "CIFAR-100", "test: .*; download the archive again"),
        ("CIFAR-100-C/fog.npy", 0, "CIFAR-100-C", "fog.npy: .*; get the archive again"),
        ("ood/iSUN/iSUN_patches/1.jpg", 0.7, "out-of-distribution: isun", "1.jpg: .*truncated"),
        ("MNIST/raw/t10k-images-idx3-ubyte", 0, "MNIST", "MNIST is missing or damaged; run .* --download mnist"),
        ("train_32x32.mat", 0.7, "SVHN", "train_32x32.mat: .*; download it again"),
        ("imagenet/train/n01443537/n01443537_2.JPEG", 0.7, "ImageNet (ILSVRC 2012)", "n01443537_2.JPEG: .*truncated"),
    ],
)
def test_verify_finds_damage_in_sets_of_every_format(whole, place, left, name, told):
    path = whole / place
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    try:
        found = verify(whole, workers=0)
    finally:
        path.write_bytes(content)
    assert {each for each, (_, lines) in found.items() if lines} == {name}
    (line,) = found[name][1]
    assert re.search(told, line)


def test_verify_counts_what_it_read_and_an_empty_folder_is_not_whole(whole, tmp_path, monkeypatch, capsys):
    assert {name: count for name, (count, _) in verify(whole, workers=0).items()} == {
        "CIFAR-10": 150, "CIFAR-100": 300, "CIFAR-10 (JPEG)": 80, "CIFAR-100-C": 5 * 100 * 15,
        **{f"out-of-distribution: {name}": 3 for name in ood.FOLDERS}, "MNIST": 100, "SVHN": 80, "GAN samples": 80,
        "ImageNet (ILSVRC 2012)": 27, "ImageNet-C": 450, "CUB-200-2011": 12, "Pascal VOC 2007, 2012": 12,
    }  # fmt: skip
    (tmp_path / "part" / "VOCdevkit").mkdir(parents=True)
    assert verify(tmp_path / "part", workers=0)["Pascal VOC 2007, 2012"][1][0].endswith("contains no images")
    monkeypatch.setattr(sys, "argv", ["cutmix-robustness", "data", "verify", "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "none of the data sets is here" in capsys.readouterr().err
