"""Sets as they are released and as users have them: layouts, kinds of images, labels, broken words, preflight."""

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from satrn import cli, experiments
from satrn.charset import IGNORED
from satrn.config import CHARSET_94
from satrn.data import inventory, tiny
from satrn.data.render import render_words
from satrn.data.words_lmdb import LmdbMixture, LmdbWords, decode_image, write_lmdb
from satrn.experiments import execute, on_other_data
from satrn.measure import _evaluate_real
from satrn.rotation import rotate_words
from satrn.settings import Settings
from shared_utils.images import BrokenFile
from shared_utils.rehearsal import rehearse
from shared_utils.runlog import RunLog
from shared_utils.tables import Run

LOWER = "0123456789abcdefghijklmnopqrstuvwxyz"
SMALL = dict(d_model=8, heads=2, ffn=8, enc_layers=1, dec_layers=1, img_size=(8, 16), batch_size=4, steps=2)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    root = tmp_path_factory.mktemp("größer") / "tiny"
    tiny.write(root)
    return root


def put(folder, **items):
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key.replace("_", "-").encode(), value)


# ---- layouts ------------------------------------------------------------


def test_the_released_layout_is_read_as_it_unpacks(archives):
    mj = LmdbWords(inventory.training_folder(archives, "MJ"), (8, 16))
    assert [part.name for part in mj.parts] == ["MJ_test", "MJ_train", "MJ_valid"] and len(mj) == 3 * len(tiny.WORDS)
    assert [mj.label(i) for i in (0, len(tiny.WORDS), len(mj) - 1)] == ["Hello", "Hello", "abc"]
    assert mj[len(tiny.WORDS) + 2][1] == "it's"
    assert all(row[4] == "yes" for row in inventory.inventory(archives))
    assert all(need.met for need in inventory.needs(Settings(), archives))


@pytest.mark.parametrize(
    "kind, name, folder",
    [
        ("train", "MJ", "train/synth/MJ/train"),
        ("train", "TextOCR", "train/real/TextOCR/val"),
        ("train", "filter_train_hard", "Union14M-L-LMDB-Filtered/filter_train_hard"),
        ("train", "mine", "training/mine"),
        ("test", "IIIT5K", "test/IIIT5k"),
        ("test", "IIIT5K", "evaluation/IIIT5k_3000"),
        ("test", "IC13_857", "test/IC13_857"),
        ("test", "CT80", "test/CUTE80"),
        ("test", "multi_oriented", "u14m/multi_oriented"),
    ],
)
def test_sets_are_found_in_every_released_layout(tmp_path, write_words, kind, name, folder):
    write_words(tmp_path / folder, count=2)
    find = inventory.training_folder if kind == "train" else inventory.test_folder
    assert len(LmdbWords(find(tmp_path, name), (8, 16))) == 2
    with pytest.raises(FileNotFoundError, match="is not an LMDB"):
        LmdbWords(find(tmp_path, "another"), (8, 16))


def test_what_is_missing_is_told_at_once_and_nothing_is_trained(tmp_path, write_words, monkeypatch, capsys):
    write_words(tmp_path / "training" / "MJ")
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(Path(cli.__file__).parents[2] / "tables")
    monkeypatch.setattr(sys, "argv", ["satrn", "run", "table-1", "--scale", "paper", "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    assert sum("put its LMDB there" in line for line in lines) == 8  # ST and the seven test sets
    assert any("evaluation/CUTE80" in line for line in lines) and not any("set MJ" in line for line in lines)


def test_finished_runs_do_not_stand_for_other_data(tmp_path, write_words):
    settings = dict(SMALL, train_sets=["own"], mix=[1.0], test_sets=["own"], charset="abc123", max_length=6)
    for name, seed in (("one", 0), ("two", 1)):
        for part in ("training", "evaluation"):
            write_words(tmp_path / name / part / "own", seed=seed)
    run = Run("table-1", "a row", "paper", 0, settings, ("accuracy",))
    log = RunLog(tmp_path / "paper.jsonl")
    assert on_other_data([run], log, tmp_path / "one") == []  # nothing there yet
    checksum = LmdbWords(tmp_path / "one" / "training" / "own", (8, 16)).checksum()
    dataset = {"train": {"sets": [{"sha256": checksum}]}, "test": [{"sha256": checksum}]}
    names = ("table", "row", "scale", "seed", "settings_hash")
    log.append(dict(zip(names, run.key, strict=True), dataset=dataset, metrics={}))
    assert on_other_data([run], log, tmp_path / "one") == []
    assert on_other_data([run], log, tmp_path / "two") == [run]
    assert on_other_data([run], log, tmp_path / "nowhere") == []


# ---- images and labels ------------------------------------------------------------


def test_every_kind_of_image_reads_alike(tmp_path):
    plain = Image.new("L", (100, 32), 255)
    ImageDraw.Draw(plain).text((6, 3), "HELLO", 0, ImageFont.load_default(22))
    ink = Image.eval(plain, lambda value: 255 - value)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    Image.merge("RGBA", [Image.new("L", plain.size)] * 3 + [ink]).save(tmp_path / "transparent.png")
    Image.merge("LA", [Image.new("L", plain.size), ink]).save(tmp_path / "gray-transparent.png")
    Image.fromarray(np.asarray(plain).astype(np.uint16) * 257).save(tmp_path / "sixteen-bit.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    plain.convert("P").save(tmp_path / "palette.png")
    plain.save(tmp_path / "wört 日本.png")
    wanted = torch.from_numpy(np.asarray(plain).copy()).float()
    for path in tmp_path.iterdir():
        read = decode_image(path, (32, 100), 1)[0].float()
        assert (read - wanted).abs().mean() < 3, path.name
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cmyk.jpg").read_bytes()[:900])
    with pytest.raises(BrokenFile, match="cut.jpg: .*replace the file"):
        decode_image(tmp_path / "cut.jpg", (32, 100), 1)


def test_a_charset_without_capitals_reads_labels_in_lower_case(archives):
    words = LmdbWords(inventory.test_folder(archives, "SVT"), (8, 16))
    usable = [words.label(i) for i in words.usable(LOWER, 25)]
    assert usable == ["Hello", "WORLD", "Slinking", "Reverse", "x", "yzt", "2019", "abc"]
    assert [words.label(i) for i in words.usable(CHARSET_94, 25)] == [w for w in tiny.WORDS if w.isascii()]
    s = Settings(**SMALL, charset=LOWER, train_sets=("ST",), mix=(1.0,))
    mixture = LmdbMixture([inventory.training_folder(archives, "ST")], s, workers=0)
    _, targets = next(mixture.steps(s, 0, 0, slice(None)))
    assert targets.max() < 2 + 36 and (targets == 1).sum() == 0 and (targets != IGNORED).any()
    assert mixture[0, 1][1] == "world"


def test_label_lists_that_were_half_written_are_made_anew(tmp_path, write_words, caplog):
    write_words(tmp_path / "set")
    whole = LmdbWords(tmp_path / "set", (8, 16)).usable("abc123", 5)
    (kept,) = (tmp_path / "set").glob("satrn-usable-*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(LmdbWords(tmp_path / "set", (8, 16)).usable("abc123", 5), whole)
    assert np.array_equal(np.load(kept), whole) and not list(kept.parent.glob("*.tmp"))


def test_broken_words_are_counted_from_loader_processes_too_and_stand_in_the_record(tmp_path, write_words):
    for name in ("training/own", "evaluation/own"):
        write_words(tmp_path / name)
    put(tmp_path / "training" / "own", image_000000003=b"no picture", label_000000005="café".encode("latin-1"))
    put(tmp_path / "evaluation" / "own", image_000000001=b"no picture")
    settings = dict(SMALL, train_sets=["own"], mix=[1.0], test_sets=["own"], charset="abc123", max_length=6, steps=8)
    with pytest.raises(BrokenFile, match="own: label-000000005 is not UTF-8"):
        execute(settings, 0, data_root=tmp_path)
    s = Settings(**settings)
    mixture = LmdbMixture([tmp_path / "training" / "own"], s, workers=1, skip_broken=True)
    assert len(list(mixture.steps(s, 0, 0, slice(None)))) == 8
    assert mixture.record()["sets"][0] | {"sha256": ""} == {
        "name": "own", "words": 10, "sha256": "", "skipped": 2, "usable": 11,
    }  # fmt: skip
    tests = LmdbWords(tmp_path / "evaluation" / "own", (8, 16), skip_broken=True)
    assert sum(len(labels) for _, labels in tests.batches(5)) == 11
    caveats = inventory.caveats(mixture.record(), [tests.record()], s)
    assert caveats == ["2 broken words of own skipped", "1 broken words of own skipped"]
    big = {"name": "SVT", "words": 647}
    assert inventory.caveats({"sets": [{"name": "MJ", "words": 8_919_273}]}, [big], replace(
        s, train_sets=("MJ",), test_sets=("SVT",))) == []  # fmt: skip


def test_verify_reads_every_word_to_its_end(tmp_path, write_words, capsys):
    write_words(tmp_path / "training" / "own")
    put(tmp_path / "training" / "own", image_000000003=b"no picture", label_000000004=b"\xe9")
    with pytest.raises(RuntimeError, match="2 broken words\n.*image-000000003: this is not an image"):
        cli.Data("verify", tmp_path)()
    assert "training/own: 12 words, 2 broken" in capsys.readouterr().out


def test_the_union_counts_every_word_once(tmp_path, monkeypatch):
    """Ten words of one set and two of another: the union is no mean of sets."""
    picture = torch.zeros(1, 8, 16, dtype=torch.uint8)
    for name, labels in (("IC15", ["right"] * 10), ("SVTP", ["wrong"] * 2)):
        write_lmdb(
            tmp_path / "evaluation" / inventory.NAMES.get(name, (name,))[0], [(picture, each) for each in labels]
        )

    def read_all(model, data, batch_size=500, degrees=0.0):
        labels = [label for _, part in data.batches(5) for label in part]
        return ["right"] * len(labels), labels

    monkeypatch.setattr("satrn.evaluate.read_all", read_all)
    monkeypatch.setattr("satrn.measure.real_sheet", lambda *_: [])
    s = Settings(**SMALL, test_sets=("IC15", "SVTP"), test_angles=(90.0,))
    metrics, details, _ = _evaluate_real(None, s, tmp_path, False, "case-insensitive")
    assert metrics["IC15"] == 100 and metrics["SVTP"] == 0
    assert metrics["accuracy"] == metrics["rotated_90"] == pytest.approx(100 * 10 / 12)
    assert details["words"] == {"IC15": 10, "SVTP": 2, "all": 12}


# ---- pictures that are drawn ------------------------------------------------------------


def test_lines_break_at_words(tmp_path):
    two, one = (render_words([word], 0, "multi_line", (48, 96), 16.0)[0][0, 0].float() for word in ("I MMM", "IMMM"))

    def widths(image):
        dark = image < image.median() - 40
        return [int(half.any(dim=0).sum()) for half in (dark[:24], dark[24:])]

    assert 3 * widths(two)[0] < widths(two)[1]  # I above MMM
    assert abs(widths(one)[0] - widths(one)[1]) < widths(one)[1] / 2  # without a space: IM above MM
    (tmp_path / "lines.txt").write_text("way out\nno\n")
    cli.Render(tmp_path / "lines", count=2, words=tmp_path / "lines.txt", img_size=(32, 32))()
    words = LmdbWords(tmp_path / "lines", (32, 32))
    assert [words.label(0), words.label(1)] == ["wayout", "no"] and len(words.usable(CHARSET_94, 25)) == 2


def test_characters_without_a_glyph_are_refused():
    with pytest.raises(ValueError, match="which lacks '日本'"):
        render_words(["a日本"], 0)


def test_streaks_of_repeated_edges_tell_the_angle_modulo_90():
    """What the docstring of rotate_words admits: along the turned axes, the pixels beyond an edge are constant."""
    generator = torch.Generator().manual_seed(0)
    noise = (160 + 13 * torch.randn(16, 1, 64, 64, generator=generator)).clamp(0, 255)
    angles = torch.linspace(25, 65, 16)
    turned = rotate_words(noise, angles)
    back = rotate_words(turned, -angles)
    off = rotate_words(turned, -angles + 20)
    beyond = [image[:, 0, 24:40, 6:14].diff(dim=2).abs().mean((1, 2)) for image in (back, off)]
    assert (beyond[0] < beyond[1]).float().mean() > 0.8


# ---- the whole path ------------------------------------------------------------


def test_a_table_of_real_words_runs_from_tiny_archives_to_its_record(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    s = dict(SMALL, max_length=25, test_sets=["IC13", "IC15", "SVTP", "CT80"], rotation="uniform", test_angles=[0, 90])
    outcome = execute(s, 0, data_root=archives)
    assert {"accuracy", "irregular_mean", "rotated_0", "rotated_90"} <= set(outcome.metrics)
    assert f"{len(tiny.WORDS)} of the paper's 1,015 words of IC13" in outcome.caveats
    assert any("words of MJ" in caveat for caveat in outcome.caveats)
    sheet = outcome.details["sheet"]
    assert len(sheet) == 4 * 6 and [word["label"] for word in sheet[:2]] == ["Hello", "it's"]
    assert all(len(base64.b64decode(word["image"])) == word["size"][0] * word["size"][1] for word in sheet)
    json.dumps([outcome.metrics, outcome.details, outcome.dataset])


def test_a_paper_table_is_rehearsed_end_to_end():
    """One of those of `make rehearse`: tiny archives, run, record, verdict, figure."""
    (outcome,) = rehearse(Path(cli.__file__).parents[2], ["real-words"])
    assert outcome.passed, outcome.problem
