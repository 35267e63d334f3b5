"""What LMDBs are made of: listed images, ICDAR 2003's photographs and rendered words."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils.images import BrokenFile
from shared_utils.preflight import Need
from shared_utils.runlog import RunLog
from str_benchmark import checkpoints, experiments
from str_benchmark.charset import PRESETS
from str_benchmark.cli import Run
from str_benchmark.cli_data import CreateLmdb
from str_benchmark.data.create import icdar2003_words, listed_images, rendered_items
from str_benchmark.data.inventory import inventory
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.rendered import RENDERED, rendered_lmdb
from str_benchmark.data.sets import Parts
from str_benchmark.models import build_model
from str_benchmark.render import WARPS, font_files, random_words, render_words
from str_benchmark.settings import PUBLIC, Settings


def test_lists_of_images(tmp_path):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("broken")
    gt = tmp_path / "gt.txt"
    gt.write_text("a.png\thello world\n\n")
    assert [label for _, label in listed_images(gt, tmp_path)] == ["hello world"]
    gt.write_text("a.png\thello\u2028world\r\na.png\tx\x85y\n", encoding="utf-8")  # no ends of lines
    assert [label for _, label in listed_images(gt, tmp_path)] == ["hello\u2028world", "x\x85y"]
    for text, error, message in (
        ("a.png hello", ValueError, "line 1: expected path<TAB>label"),
        ("a.png\t ", ValueError, "line 1: expected path<TAB>label"),
        ("b.png\tx", BrokenFile, "line 1: .*b.png: this is not an image"),
        ("c.png\tx", FileNotFoundError, "line 1: "),
    ):
        gt.write_text(text)
        with pytest.raises(error, match=message):
            list(listed_images(gt, tmp_path))
    gt.write_text("a.png\tx", encoding="utf-8-sig")  # a BOM, as Windows writes it
    assert [label for _, label in listed_images(gt, tmp_path)] == ["x"]
    gt.write_text("b.png\tx\na.png\ty")
    assert [label for _, label in listed_images(gt, tmp_path, skip_broken=True)] == ["y"]


WORD = '<taggedRectangle x="{}" y="{}" width="{}" height="{}"><tag>{}</tag></taggedRectangle>'


def photographs(folder, *words):
    """ICDAR 2003's words.xml with one photograph: column c has the grey value c."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (40, 1))).save(folder / "IMG_1.png")
    text = "".join(WORD.format(*word) for word in words)
    image = f"<image><imageName>IMG_1.png</imageName><taggedRectangles>{text}</taggedRectangles></image>"
    (folder / "words.xml").write_text(
        f'<?xml version="1.0" encoding="ISO-8859-1"?><tagset>{image}</tagset>', encoding="latin-1"
    )
    return folder / "words.xml"


def test_words_are_cut_from_icdar_2003_s_photographs(tmp_path):
    xml = photographs(tmp_path / "train", (10.0, 5.0, 20.0, 8.0, "Café"), (50.0, -3.0, 30.0, 13.0, "&amp;"))
    (first, label), (second, mark) = icdar2003_words(xml)
    assert (label, mark) == ("Café", "&")
    assert np.array_equal(np.asarray(first), np.tile(np.arange(10, 30), (8, 1)))  # x, y is the upper left corner
    assert np.array_equal(np.asarray(second), np.tile(np.arange(50, 60), (10, 1)))  # cut at the photograph's edges
    for word, message in (
        ((10, 5, 0, 8, "a"), "IMG_1.png: word 'a' at .*: empty"),
        ((60, 5, 9, 8, "a"), "outside its photograph"),
        ((0, 0, 9, 8, " "), "word '' at"),
        ((0, 0, "wide", 8, "a"), "IMG_1.png: word 'a': .*x, y, width and height.*'width': 'wide'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(icdar2003_words(photographs(tmp_path / "train", word)))
    xml.write_text(xml.read_text(encoding="latin-1").replace(' width="wide"', ""), encoding="latin-1")
    with pytest.raises(ValueError, match="word 'a': expected a rectangle of numbers x, y, width and height"):
        list(icdar2003_words(xml))
    photographs(tmp_path / "train", (10, 5, 20, 8, "a"))
    (tmp_path / "train" / "IMG_1.png").write_bytes(b"no picture")
    with pytest.raises(BrokenFile, match=r"IMG_1.png: this is not an image"):
        list(icdar2003_words(xml))
    assert list(icdar2003_words(xml, skip_broken=True)) == []
    (tmp_path / "train" / "IMG_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"words.xml: .*IMG_1.png: file not found"):
        list(icdar2003_words(xml))
    assert list(icdar2003_words(xml, skip_broken=True)) == []
    xml.write_text("path\tlabel")
    with pytest.raises(ValueError, match=r"expected ICDAR 2003's words.xml"):
        list(icdar2003_words(xml))


def test_a_public_network_reads_real_words_and_parts_of_them(tmp_path, monkeypatch, capsys):
    boxes = [(10 * i, 5, 9, 20, label) for i, label in enumerate(("two", "it", "(!)", "é", "x1y"))]
    xml, root = photographs(tmp_path / "photographs", *boxes), tmp_path / "root"
    CreateLmdb(xml, root / "evaluation" / "IC03_train")()
    assert capsys.readouterr().out == "5 words written\n"
    assert [row[1] for row in inventory(root) if row[4] == "yes"] == ["smoke, embedded, rendered", "icdar2003"]
    small = Settings(model="None-VGG-None-CTC", charset="94", output_channel=16, hidden_size=16)
    weights = tmp_path / "english.pth"
    torch.save(build_model(small.config).state_dict(), weights)
    monkeypatch.setitem(PUBLIC, "english_g2", small)
    for module in (checkpoints, experiments):
        monkeypatch.setattr(module, "public_file", lambda name: weights)
    monkeypatch.setattr(experiments, "weights_needed", lambda name: Need(name, "", True))
    (tmp_path / "tables").symlink_to(experiments.PROJECT / "tables")
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    Run(("subsets",), scale="icdar2003", data_root=root, jobs=1)()
    records = {record["row"]: record for record in RunLog(tmp_path / "runs" / "icdar2003.jsonl").records()}
    read = records["letters and digits, either case"]
    assert read["weights"] == {"english.pth": checkpoints.sha256(weights)}
    assert read["details"]["n"]["IC03_train"] == 5 and read["details"]["empty_labels"] == {"IC03_train": 2}
    assert read["details"]["by_rule"]["IC03_train"] == {"IC03_train_1097": [3, 0], "IC03_train_936": [2, 0]}
    assert records["IC03's training words, 936 of 1,156: english_g2"]["details"]["n"] == [2, 5]
    with pytest.raises(ValueError, match="released: expected one of english_g2, got 'english'"):
        Settings(released="english")


@pytest.mark.parametrize("warp", WARPS)
def test_rendering_is_reproducible_and_visible(warp):
    words = random_words(6, PRESETS["36"], (1, 8), np.random.default_rng(0))
    first, labels = render_words(words, 5, "all", warp)
    again, _ = render_words(words, 5, "all", warp)
    assert labels == words and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for image in first:
        assert image.dtype == np.uint8 and image.ndim == 2 and image.std() > 20  # contrast 0.35 or more
    other, _ = render_words(words, 6, "all", warp)
    assert any(a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_folder_of_fonts(tmp_path):
    shutil.copy(font_files("sans")[0], tmp_path / "mine.ttf")
    assert font_files(tmp_path) == [tmp_path / "mine.ttf"]
    assert len(render_words(["ab"], 0, tmp_path)[0]) == 1
    for act, message in (
        (lambda: font_files(tmp_path / "none"), "expected one of sans, serif, all or a folder"),
        (lambda: render_words(["a"], 0, warp="wave"), "warp: expected one of none, rotate"),
        (lambda: render_words([" "], 0), "expected something to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def test_rendered_sets_are_lmdbs(tmp_path):
    path = rendered_lmdb("tiny", tmp_path)
    data = LMDBDataset(path, "0123456789")
    assert len(data) == RENDERED["tiny"].n == 64 and all(len(data.label(i)) == 3 for i in range(64))
    assert rendered_lmdb("tiny", tmp_path) == path
    assert len(Parts([data]).take(0.5)) == 32
    with pytest.raises(ValueError, match="expected one of A, B"):
        rendered_lmdb("C", tmp_path)
    assert [label for _, label in rendered_items(["hi"], 0, "", "sans", "none", 0)] == ["hi"]
