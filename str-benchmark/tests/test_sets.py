"""Sets by name, in the released layouts."""

import json
import shutil

import pytest
from PIL import Image

from shared_utils.images import BrokenFile
from str_benchmark.data.inventory import inventory, verify
from str_benchmark.data.sets import locate, open_set


def test_sets_by_name(tmp_path, released_layout, word_lmdb):
    root = released_layout(tmp_path, n=3)
    word_lmdb(root / "training" / "MJ" / "valid", ["x1", "x2"])
    assert [len(part) for part in open_set("MJ", root)] == [3, 2]
    assert {row[4] for row in inventory(root)} == {"yes"}
    shutil.rmtree(root / "evaluation" / "SVT")
    (root / "evaluation" / "CUTE80" / "data.mdb").write_bytes(b"short")
    found = {row[0]: row[4:] for row in inventory(root)}
    assert found["SVT_647"] == ("no", "evaluation/SVT", "put the released set there")
    assert found["CUTE_288"][0] == "damaged"
    with pytest.raises(FileNotFoundError, match="no LMDB at or below it"):
        locate("SVT_647", root)
    with pytest.raises(FileNotFoundError, match="neither a set .*MJ.* nor a folder or list"):
        locate("MJS", root)


def test_sets_in_parseq_s_layout(tmp_path, word_lmdb):
    synthetic = ("train/synth/MJ/train", "train/synth/MJ/val")
    for place in ("test/IIIT5k", "test/IC13_1095", "val/IC13", "val/IC15", *synthetic):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        word_lmdb(tmp_path / place, ["ab", "c"])
    for name, parts in (("IIIT_3000", 1), ("IC13_1095", 1), ("validation", 2), ("MJ", 2)):
        assert len(open_set(name, tmp_path)) == parts, name
    assert {row[0]: row[5] for row in inventory(tmp_path)}["IIIT_3000"] == "test/IIIT5k"
    word_lmdb(tmp_path / "evaluation" / "IIIT5k_3000", ["x"])
    assert len(open_set("IIIT_3000", tmp_path)[0]) == 1  # the paper's release comes first


def test_a_list_of_images_in_union14m_s_layout(tmp_path):
    root = tmp_path / "Union14M-L"
    (root / "full_images" / "art").mkdir(parents=True)
    (root / "train_annos" / "mmocr-0.x").mkdir(parents=True)
    for i in range(3):
        Image.new("L", (20 + i, 10), 60 * i).save(root / "full_images" / "art" / f"{i}.png")
    annotations = root / "train_annos" / "mmocr-0.x" / "train_easy.jsonl"
    words = ["Café bar", "no", "!!", "gone"]
    lines = [json.dumps({"filename": f"full_images/art/{i}.png", "text": word}) for i, word in enumerate(words)]
    annotations.write_text("\n".join([*lines[:2], "", *lines[2:]]), encoding="utf-8-sig")
    (data,) = open_set(str(annotations), tmp_path, filter="off")
    assert (len(data), data.total) == (4, 4) and data.key(2) == "full_images/art/2.png"
    assert [data.text(i) for i in range(4)] == words
    assert [data.label(i) for i in range(4)] == ["cafbar", "no", "", "gone"]
    assert data[1][0].size == (21, 10) and data.first(2)[1][1] == "no" and len(data.first(2)) == 2
    with pytest.raises(BrokenFile, match=r"train_easy.jsonl full_images/art/3.png: missing; .* --skip-broken"):
        data[3]
    assert verify([str(annotations)], tmp_path)[0].endswith("pass --skip-broken")
    (strict,) = open_set(str(annotations.parent), tmp_path, nfkd=True, drop_whitespace=True)
    assert [strict.label(i) for i in range(len(strict))] == ["cafebar", "no", "gone"] and strict.report.kept == 3
    for text, message in (
        ('{"filename": "a.png"}', "line 1: expected"),
        ("a.png no", "line 1: expected"),
        ("\n", "no annotations"),
    ):
        annotations.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_set(str(annotations), tmp_path)
    annotations.write_text(lines[3])
    with pytest.raises(FileNotFoundError, match="its first image full_images/art/3.png is in none of"):
        open_set(str(annotations), tmp_path)
