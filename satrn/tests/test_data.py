"""Rendering, rotation, tokens, LMDBs (whole, truncated, with holes), streams."""

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satrn import predict
from satrn.charset import END, IGNORED, Tokenizer
from satrn.data import render
from satrn.data.render import random_words, render_words
from satrn.data.streams import RenderedWords, normalise, positions, share_counts
from satrn.data.words_lmdb import LmdbMixture, LmdbWords, decode_image, write_lmdb
from satrn.rotation import draw_angles, rotate_words
from satrn.settings import Settings
from shared_utils.images import BrokenFile

META = ".*+?[](){}|^$\\/-s"


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.text(META, min_size=1, max_size=6), min_size=1, max_size=5))
def test_tokens_come_back_whatever_the_characters_mean_elsewhere(labels):
    tokens = Tokenizer(META).encode(labels, 8)
    assert Tokenizer(META).decode(tokens.masked_fill(tokens == IGNORED, END)) == labels
    for row, label in zip(tokens, labels, strict=True):
        assert row[len(label)] == END and (row[len(label) + 1 :] == IGNORED).all()


def test_a_label_with_an_end_token_s_name_is_a_label_like_any_other():
    assert Tokenizer("[s]ab").decode(Tokenizer("[s]ab").encode(["a[s]b"], 9)) == ["a[s]b"]


def test_wrong_labels():
    tokenizer = Tokenizer("abc")
    for labels, message in (
        ([], "labels must not be empty"),
        (["ab", "axb"], "label 'axb': character 'x' is not in the charset"),
        (["abca"], "label 'abca' must have 1 to 3 characters, got 4"),
        ([""], "label '' must have 1 to 3 characters, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(labels, 4)
    assert tokenizer.decode(tokenizer.encode(["axb"], 5, unknown="class")) == ["a\ufffdb"]
    with pytest.raises(ValueError, match="unknown must be error or class, got 'drop'"):
        tokenizer.encode(["ab"], 4, unknown="drop")


# ---- pictures ------------------------------------------------------------


def test_rendering_is_determined_by_its_seed_and_keeps_words_apart():
    words = ["47", "47", "RA"]
    images, angles = render_words(words, 3, "rotate", (24, 24), 14.0)
    again, _ = render_words(words, 3, "rotate", (24, 24), 14.0)
    assert images.dtype == torch.uint8 and images.shape == (3, 1, 24, 24) and torch.equal(images, again)
    assert not torch.equal(images[0], images[1]) and ((angles >= 0) & (angles < 360)).all()
    assert not torch.equal(images, render_words(words, 4, "rotate", (24, 24), 14.0)[0])


def ink(image):
    """Centre of the dark pixels (row, column) and their spread along both axes."""
    dark = (image.float() < image.float().median() - 40).nonzero().float()
    return dark.mean(dim=0), dark.std(dim=0)


def test_angles_are_anticlockwise_and_words_stay_in_the_middle():
    for degrees, tall in ((0.0, False), (90.0, True), (180.0, False)):
        image = render_words(["KKKK"], 1, "straight", (48, 48), 14.0, degrees=degrees)[0][0, 0]
        centre, spread = ink(image)
        assert (centre - 23.5).abs().max() < 2.5 and (spread[0] > spread[1]) == tall
    up = ink(render_words(["44AA"], 1, "straight", (64, 64), 14.0, degrees=45.0)[0][0, 0])
    right_half = render_words(["44AA"], 1, "straight", (64, 64), 14.0, degrees=45.0)[0][0, 0][:, 34:]
    assert ink(right_half)[0][0] < up[0][0]  # the end of the word is higher than its middle


def test_rotating_a_picture_is_drawing_it_rotated():
    straight = render_words(["R2"], 5, "straight", (40, 40), 16.0, degrees=0.0)[0].float()
    for degrees in (90.0, 180.0, 270.0):
        drawn = render_words(["R2"], 5, "straight", (40, 40), 16.0, degrees=degrees)[0].float()
        turned = rotate_words(straight, degrees)
        blur = [torch.nn.functional.avg_pool2d(x, 5, 1, 2) for x in (drawn, turned)]
        assert (blur[0] - blur[1]).abs().mean() < 4
        torch.testing.assert_close(turned, torch.rot90(straight, int(degrees // 90), (2, 3)), atol=0.05, rtol=0)


def test_lines_curves_and_lengths():
    two = render_words(["EEEE"], 2, "multi_line", (40, 40), 16.0)[0][0, 0].float()
    rows = (two < two.median() - 40).any(dim=1)
    assert rows[:20].any() and rows[20:].any() and not rows[19:21].all()
    bent = render_words(["EEEEEEE"] * 8, 2, "curve", (32, 100), 16.0)[0]
    straight = render_words(["EEEEEEE"] * 8, 2, "straight", (32, 100), 16.0)[0]
    height = [np.mean([float(ink(image[0])[1][0]) for image in images]) for images in (bent, straight)]
    assert height[0] > 1.2 * height[1]
    words = random_words(200, "ab", (2, 4), torch.Generator().manual_seed(0))
    assert {len(word) for word in words} == {2, 3, 4}
    for call, message in (
        (lambda: render_words([], 0), "words must not be empty"),
        (lambda: render_words(["a", ""], 0), "words must not be empty"),
        (lambda: render_words(["a"], 0, "wave"), "warp must be one of straight"),
        (lambda: random_words(3, "ab", (3, 2), torch.Generator()), "1 <= shortest <= longest"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_scene_word_fills_the_width_of_its_picture(monkeypatch):
    monkeypatch.setattr(render, "_scene", lambda coverage, generator: coverage)
    words = ["W", "EXIT", "HEMLINE", "EXTRAORDINARILY"] * 20
    images, angles = render_words(words, 0, "scene", (32, 100))
    inked = (images[:, 0] > 60).any(dim=1)  # (N, W)
    first, last = inked.int().argmax(dim=1), 99 - inked.flip(1).int().argmax(dim=1)
    assert first.float().quantile(0.95) < 12 and last.float().quantile(0.05) > 87
    tall = (images[:, 0] > 60).any(dim=2).sum(dim=1)
    assert 14 < tall.min() and tall.min() + 6 < tall.max() <= 32
    assert angles[::4].abs().max() > 4 * angles[3::4].abs().max() > 0  # a long word tilts less, to stay inside


def test_scene_words_are_light_or_dark_and_differ_in_contrast():
    words = ["HHHHH"] * 60
    images = render_words(words, 1, "scene", (32, 100))[0]
    assert torch.equal(images, render_words(words, 1, "scene", (32, 100))[0])
    light = [
        float(image[0, 12:20].float().max() + image[0, 12:20].float().min() - 2 * image.float().median())
        for image in images
    ]
    assert 0.25 < np.mean(np.array(light) > 0) < 0.75
    contrast = images.float().flatten(1).std(dim=1)
    assert contrast.max() > 2 * contrast.min()


def test_rendered_sets_take_the_lines_in_turn_and_scenes_vary_their_case(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "RENDERED_AT_ONCE", 4)
    (tmp_path / "words.txt").write_text("exit\nLane\n")
    arguments = (tmp_path / "words.txt", "", (1, 1), (16, 24), 0)
    assert predict.render_lmdb(tmp_path / "plain", 8, "straight", *arguments) == 8
    plain = LmdbWords(tmp_path / "plain", (16, 24))
    assert [plain.label(i) for i in range(8)] == ["exit", "Lane"] * 4
    assert not torch.equal(plain[0][0], plain[4][0])  # each batch has its own seed
    predict.render_lmdb(tmp_path / "scene", 40, "scene", *arguments)
    predict.render_lmdb(tmp_path / "other", 8, "straight", *arguments[:-1], arguments[-1] + 1)
    other = LmdbWords(tmp_path / "other", (16, 24))
    assert not any(torch.equal(plain[i][0], other[i][0]) for i in range(8))  # each seed draws other pictures
    labels = [LmdbWords(tmp_path / "scene", (16, 24)).label(i) for i in range(40)]
    assert set(labels[::2]) == {"exit", "Exit", "EXIT"} and set(labels[1::2]) == {"lane", "Lane", "LANE"}


def test_rotation_repeats_edges_and_crops_the_rotated_box():
    flat = torch.full((2, 1, 10, 30), 77, dtype=torch.uint8)
    assert (rotate_words(flat, torch.tensor([33.0, 200.0])) == 77).all()  # no black corner
    image = torch.rand(1, 3, 16, 40)
    torch.testing.assert_close(rotate_words(image, 0.0), image)
    torch.testing.assert_close(rotate_words(image, 90.0, (40, 16)), torch.rot90(image, 1, (2, 3)), atol=1e-4, rtol=0)
    assert rotate_words(image, 45.0, (64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got \(3, 16, 40\)"):
        rotate_words(image[0], 10.0)
    with pytest.raises(ValueError, match="degrees must be finite"):
        rotate_words(image, float("nan"))
    normal = draw_angles("normal", 4000, torch.Generator().manual_seed(0))
    uniform = draw_angles("uniform", 4000, torch.Generator().manual_seed(0))
    assert abs(normal.mean()) < 2 and abs(normal.std() - 34) < 2 and uniform.min() >= 0 and uniform.max() < 360
    with pytest.raises(ValueError, match="rotation must be none, normal or uniform, got 'both'"):
        draw_angles("both", 1, torch.Generator())


# ---- LMDBs ------------------------------------------------------------


def change(folder, key, value):
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.delete(key) if value is None else transaction.put(key, value)


def test_lmdb_gives_back_what_was_written(tmp_path, write_words):
    words = write_words(tmp_path / "set")
    data = LmdbWords(tmp_path / "set", (16, 24))
    assert len(data) == 12 and [data.label(i) for i in range(12)] == words
    (first, labels), (second, rest) = data.batches(8)
    assert first.shape == (8, 1, 16, 24) and first.dtype == torch.uint8 and labels + rest == words
    assert LmdbWords(tmp_path / "set", (16, 24), channels=3)[0][0].shape == (3, 16, 24)
    with pytest.raises(ValueError, match="already holds an LMDB"):
        write_lmdb(tmp_path / "set", [])


def test_faulty_lmdbs(tmp_path, write_words):
    with pytest.raises(FileNotFoundError, match="is not an LMDB"):
        LmdbWords(tmp_path / "none", (16, 24))
    write_words(tmp_path / "cut")
    file = tmp_path / "cut" / "data.mdb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated LMDB|cannot be opened"):
        LmdbWords(tmp_path / "cut", (16, 24))
    for name, key, value, message in (
        ("holes", b"num-samples", None, "key 'num-samples' is missing"),
        ("empty", b"num-samples", b"0", "empty LMDB"),
        ("text", b"num-samples", b"many", "empty LMDB .num-samples is 'many'"),
        ("label", b"label-000000003", None, "key 'label-000000003' is missing"),
        ("image", b"image-000000003", b"no picture", "image-000000003: this is not an image"),
        ("latin-1", b"label-000000003", "café".encode("latin-1"), "latin-1: label-000000003 is not UTF-8 .b'caf"),
    ):
        write_words(tmp_path / name)
        change(tmp_path / name, key, value)
        with pytest.raises((ValueError, BrokenFile), match=message):
            list(LmdbWords(tmp_path / name, (16, 24)).batches(4))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="cannot be opened as an LMDB"):
        LmdbWords(tmp_path / "junk", (16, 24))


def test_broken_images_are_skipped_only_where_asked(tmp_path, write_words):
    words = write_words(tmp_path / "set")
    change(tmp_path / "set", b"image-000000003", b"no picture")
    data = LmdbWords(tmp_path / "set", (16, 24), skip_broken=True)
    read = [label for _, labels in data.batches(5) for label in labels]
    assert read == words[:2] + words[3:] and data.broken.nonzero().flatten().tolist() == [2]
    assert data.record() == data.identity() | {"words": 11, "skipped": 1}
    s = settings_for(mix=(1.0,), train_sets=("set",), max_length=4)
    mixture = LmdbMixture([tmp_path / "set"], s, workers=0, skip_broken=True)
    usable = [i for i in range(12) if len(words[i]) < 4]
    for place, index in enumerate(usable):  # the next usable word, never a made-up one
        following = usable[(place + 1) % len(usable)]
        assert mixture[0, place][1] == words[following if index == 2 else index]
    with pytest.raises(BrokenFile, match="image-000000003: this is not an image"):
        LmdbMixture([tmp_path / "set"], settings_for(mix=(1.0,), train_sets=("set",)), workers=0)[0, 2]


def settings_for(**changes):
    small = dict(d_model=16, heads=2, ffn=16, img_size=(16, 24), charset="abc123", max_length=5, batch_size=8, steps=6)
    return Settings(**small | changes)


def test_the_mixture_holds_its_shares_and_resumes_anywhere(tmp_path, write_words):
    for name, charset in (("MJ", "abc"), ("ST", "123")):
        write_words(tmp_path / name, charset=charset, count=11)
    s = settings_for(mix=(0.75, 0.25))
    data = LmdbMixture([tmp_path / "MJ", tmp_path / "ST"], s, workers=0)
    whole = [targets for _, targets in data.steps(s, 3, 0, slice(None))]
    later = [targets for _, targets in data.steps(s, 3, 4, slice(None))]
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole[4:], later, strict=True))
    assert all(targets.shape == (8, 5) for targets in whole)
    from_first = [(row[0] < 5).item() for targets in whole for row in targets]
    assert sum(from_first) == 6 * 6
    halves = [[t for _, t in data.steps(s, 3, 0, slice(rank, None, 2))] for rank in (0, 1)]
    assert all(torch.equal(w[0::2], a) and torch.equal(w[1::2], b) for w, a, b in zip(whole, *halves, strict=True))
    checksum = data.sets[0].checksum()
    assert data.record()["sets"][0] == {"name": "MJ", "words": 11, "sha256": checksum, "usable": 11}
    assert checksum != data.sets[1].checksum()


def test_unusable_words_are_counted_and_an_unusable_set_is_refused(tmp_path, write_words, caplog):
    write_words(tmp_path / "set")
    words = LmdbWords(tmp_path / "set", (16, 24))
    labels = [words.label(i) for i in range(12)]
    usable = words.usable("abc123", 4)
    assert [labels[i] for i in usable] == [label for label in labels if len(label) < 4]
    assert np.array_equal(usable, words.usable("abc123", 4))  # the kept list
    with pytest.raises(ValueError, match="no usable words; do the labels fit"):
        LmdbMixture([tmp_path / "set"], settings_for(charset="xyz", train_sets=("set",), mix=(1.0,)), workers=0)


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 300), mix=st.lists(st.floats(0.01, 5), min_size=1, max_size=4))
def test_shares_add_up(batch, mix):
    counts = share_counts(mix, batch)
    assert sum(counts) == batch
    assert all(abs(count - batch * part / sum(mix)) < 1 for count, part in zip(counts, mix, strict=True))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 30), per_step=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_word_comes_once_per_epoch(n, per_step, seed):
    drawn = torch.cat([positions(n, per_step, seed, step) for step in range(n)])
    for epoch in range(per_step):
        assert sorted(drawn[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_pixels_and_records(small_settings):
    gray = normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), Settings())
    assert gray.tolist() == [[[[-0.5, 0.5]]]]
    white = normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), Settings(in_channels=3))
    torch.testing.assert_close(white.flatten(), torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    a, b = (RenderedWords(small_settings, 9, seed, torch.device("cpu")) for seed in (1, 2))
    assert a.record()["sha256"] != b.record()["sha256"] and a.record()["shape"] == [9, 1, 16, 16]
    with pytest.raises(BrokenFile, match="word 3: this is not an image"):
        decode_image(b"nothing", (16, 24), 1, "word 3")
