"""Images as users have them, and archives as they lie on a disk."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hib_ndigit_mnist.cli import main
from hib_ndigit_mnist.data import read_mnist
from hib_ndigit_mnist.experiments import PROJECT, execute
from hib_ndigit_mnist.images import read_digit_images
from hib_ndigit_mnist.tiny import write_tiny
from shared_utils.images import BrokenFile
from shared_utils.rehearsal import rehearse


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny archives, ü")
    write_tiny(folder)
    return folder


def verb(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hib", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
        sys.exit(0)
    return ended.value.code


def test_every_kind_of_file_is_read_with_its_name_and_shape(tmp_path):
    square = np.zeros((64, 64), np.uint8)
    square[8:24, 8:56] = 200
    plain = Image.fromarray(square)
    for folder in ("3", "7/deep"):
        (tmp_path / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "3" / "a.jpg", exif=exif, quality=95)
    Image.fromarray(square.astype(np.uint16) * 257).save(tmp_path / "3" / "b.png")
    plain.save(tmp_path / "3" / "c.tif")
    plain.save(tmp_path / "7" / "d.gif")
    plain.convert("RGB").convert("CMYK").save(tmp_path / "7" / "deep" / "ü.JPEG", quality=95)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    found = read_digit_images(tmp_path, (1, 32, 32))
    assert found.names == ["3/a.jpg", "3/b.png", "3/c.tif", "7/d.gif", "7/deep/ü.JPEG"]
    expected = torch.zeros(32, 32)
    expected[4:12, 4:28] = 200
    assert (found.images.float() - expected).abs().amax((1, 2, 3)).max() < 60  # JPEG and the edges of the bilinear
    assert (found.images.float() - expected).abs().mean() < 6
    wide = read_digit_images(tmp_path / "3" / "c.tif", (1, 32, 64)).images
    assert (
        (wide[..., :16] == 0).all() and (wide[..., 48:] == 0).all() and wide[..., 16:48].max() == 200
    )  # not stretched
    black = Image.fromarray(255 - square)
    black.save(tmp_path / "ink.png")
    inverted = read_digit_images(tmp_path / "ink.png", (1, 32, 64), invert=True).images
    assert torch.equal(inverted, wide)


def test_a_broken_image_ends_with_its_name_or_is_skipped(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:700])
    with pytest.raises(BrokenFile, match=r"b\.jpg.*--skip-broken"):
        read_digit_images(tmp_path, (1, 8, 8))
    assert read_digit_images(tmp_path, (1, 8, 8), skip_broken=True).names == ["a.png"]
    capsys.readouterr()
    assert verb(monkeypatch, "data", "verify", "--images", tmp_path) == 1
    shown = capsys.readouterr().err
    assert "b.jpg" in shown and len(shown.splitlines()) == 1


def test_tiny_archives_are_whole(tiny, monkeypatch, capsys):
    digits = read_mnist(tiny, verify=False)
    assert digits.train_images.shape == (1200, 28, 28) and digits.test_labels.bincount().min() > 40
    assert verb(monkeypatch, "data", "verify", "--images", tiny / "photos") == 0
    assert verb(monkeypatch, "data", "verify", "--data-root", tiny) == 2
    assert "differ from MNIST's" in capsys.readouterr().err
    (tiny / "cut").mkdir()
    for path in (tiny / "MNIST" / "raw").glob("*ubyte*"):
        (tiny / "cut" / path.name).write_bytes(path.read_bytes()[:500])
    assert verb(monkeypatch, "data", "verify", "--data-root", tiny / "cut") == 1
    shown = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz: damaged" in shown and len(shown.splitlines()) == 1


def test_a_missing_set_is_told_before_anything_runs(tmp_path, monkeypatch, capsys):
    runs = PROJECT / "runs" / "paper.jsonl"
    before = runs.read_bytes() if runs.exists() else b""
    for words, expected in ((["--dry-run"], 0), ([], 2)):
        code = verb(monkeypatch, "run", "table-1", "--scale", "paper", "--data-root", tmp_path, *words)
        shown = capsys.readouterr()
        assert code == expected and "hib-ndigit-mnist data --download" in " ".join((shown.out + shown.err).split())
    assert (runs.read_bytes() if runs.exists() else b"") == before


def test_runs_on_other_digits_say_so(tiny):
    settings = {"architecture": "mlp", "hidden": [16], "steps": 2, "batch": 16, "test_pairs": 100, "queries": 100}
    settings |= {"total_train": 1000, "total_test": 240, "min_per_number": 4}
    (outcome,) = execute([settings], [0], tiny, "cpu")
    assert outcome.caveats == ["fewer images than the paper's", "digits that are not MNIST's"]
    json.dumps(outcome.dataset)


def test_a_figure_and_a_table_are_rehearsed():
    found = {each.table: each for each in rehearse(PROJECT, ["figure-5"])}
    assert found["figure-5"].passed, found
