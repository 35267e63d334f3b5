"""Every kind of image that users have, and files that are none."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils.images import BrokenFile, image_files, read_image


def left_dark(mode="L", size=(8, 6)):
    pixels = np.full((size[1], size[0]), 200, np.uint8)
    pixels[:, :2] = 10
    return Image.fromarray(pixels).convert(mode)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what lay left lies on top
    left_dark().save(tmp_path / "turned.jpg", exif=exif, quality=100)
    turned = np.asarray(read_image(tmp_path / "turned.jpg", "L"))
    assert turned.shape == (8, 6) and turned[0].max() < 50 and turned[-1].min() > 150


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(wide).save(tmp_path / f"wide.{suffix}")
    assert np.asarray(read_image(tmp_path / f"wide.{suffix}", "L")).tolist() == [[0, 1, 128, 255]]


def test_transparent_pixels_lie_on_white(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)).save(tmp_path / "a.png")
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [255] * 3 and found[0, 1].tolist() == [0] * 3 and 120 < found[0, 2, 0] < 135
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 70, 80, 90])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [70, 80, 90]]]


def test_cmyk_grey_and_palette_become_rgb(tmp_path):
    for mode, name in (("CMYK", "c.jpg"), ("L", "l.jpg"), ("P", "p.gif"), ("1", "b.png"), ("LA", "la.png")):
        left_dark().convert("RGB" if mode == "CMYK" else "L").convert(mode).save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert found.mode == "RGB" and found.size == (8, 6)
        assert np.asarray(found)[0, 0].mean() < 60 < 150 < np.asarray(found)[0, -1].mean()


def test_float_tiff_must_be_in_the_unit_interval(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(read_image(tmp_path / "f.tif", "L")).tolist() == [[0, 128, 255]]
    Image.fromarray(np.array([[0, 300.0]], np.float32)).save(tmp_path / "g.tif")
    with pytest.raises(BrokenFile, match="g.tif: floating-point values from 0.0 to 300.0"):
        read_image(tmp_path / "g.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_truncated_file_is_one_line_with_its_name(tmp_path, suffix):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix)
    )
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(BrokenFile, match=f"cut.{suffix}: .*--skip-broken") as error:
        read_image(path)
    assert "\n" not in str(error.value)
    path.write_text("<html>not found</html>")
    with pytest.raises(BrokenFile, match="not an image"):
        read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")


class _Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise BrokenFile("x.jpg: cut off; replace it")


def test_a_broken_file_stays_one_line_on_its_way_out_of_a_worker():
    with pytest.raises(BrokenFile) as error:
        list(torch.utils.data.DataLoader(_Broken(), num_workers=1))
    assert str(error.value) == "x.jpg: cut off; replace it"


def test_the_files_of_a_folder(tmp_path):
    for name in ("b/2.JPG", "b/10.tif", "a/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", ".DS_Store", "a/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "a")
    (root / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    found, left_out = image_files(root)
    assert [str(path.relative_to(root)) for path in found] == ["a/1.png", "b/10.tif", "b/2.JPG"]
    assert left_out == {"hidden": 2, ".txt": 1}
    with pytest.raises(FileNotFoundError, match="no such folder"):
        image_files(tmp_path / "none")
