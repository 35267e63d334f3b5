"""LMDBs, filters, pixels, mixtures and the renderer."""

import io
import json
import os
import shutil
import subprocess
import sys

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared_utils.images import BrokenFile
from str_benchmark import bench
from str_benchmark.charset import resolve_charset
from str_benchmark.data import images
from str_benchmark.data.filters import LabelFilter, by_rule, ctc_columns, subset
from str_benchmark.data.inventory import verify
from str_benchmark.data.lmdb_store import LMDBDataset, check_file, write_lmdb
from str_benchmark.data.mixture import BalancedBatchSampler, TrainingData, batch_shares
from str_benchmark.data.names import EVALUATION_NAMES, IRREGULAR, REGULAR, each_word_once
from str_benchmark.data.samples import decode_samples, load_samples
from str_benchmark.data.sets import Parts, find_stores
from str_benchmark.settings import Settings
from str_benchmark.tokenizers import CTCTokenizer


@pytest.fixture
def tiny(golden, tmp_path):
    shutil.copytree(golden / "tiny_lmdb", tmp_path / "tiny")
    return tmp_path / "tiny"


# ---- filters and fixtures ------------------------------------------------------------------------------


def test_the_reference_s_filter(tiny, golden):
    content = json.loads((golden / "lmdb_filter.json").read_text())
    for run in content["runs"]:
        mode = "off" if run["filtering_off"] else "reference"
        data = LMDBDataset(tiny, run["charset"], run["sensitive"], run["max_length"], mode)
        assert data.indices.tolist() == run["kept_index"]
        assert [data.label(i) for i in range(len(data))] == run["labels"]


def test_the_report_says_which_rule_took_what(tiny):
    report = LMDBDataset(tiny).report
    assert (report.total, report.kept) == (10, 4)
    assert report.removed == {"with unknown characters": 4, "longer than 25": 1, "empty": 1}
    assert report.examples["longer than 25"] == ["ThisLabelIsFarTooLongToKeep"]
    assert "4 of 10 kept" in str(report) and "'a-b'" in str(report)


def test_metacharacters_in_a_charset():
    odd = "a]\\^-["
    rules = LabelFilter(odd)
    assert rules.broken_rule("a\\") is None and rules.clean("x]\\^-[b") == "]\\^-["
    quirky = LabelFilter("94", case_sensitive=True, mode="reference")
    assert quirky.broken_rule("a\\b") == "with unknown characters"  # "\]" of the 94 swallows the backslash
    assert LabelFilter("94").broken_rule("a\\b") is None
    with pytest.raises(ValueError, match="is not a valid character class in the released code"):
        LabelFilter("z-a", mode="reference")
    with pytest.raises(ValueError, match="filter: expected one of report, strip, reference, off"):
        LabelFilter("36", mode="none")


def test_labels_are_cleaned_as_parseq_cleans_them():
    rules = LabelFilter("36", mode="strip", max_length=5, nfkd=True, drop_whitespace=True)
    expected = {  # whitespace out, compatible characters, length, then what the alphabet lacks; None: dropped
        "Café": "cafe", "a b\tc": "abc", "it's": "its", "ﬁ²": "fi2", "Å x ö": "axo", "!!": None, " ": None,
        "abc def": None, "ab-cd": "abcd", "a-b-c-": None,
    }  # fmt: skip
    for label, clean in expected.items():
        kept = rules.broken_rule(label) is None
        assert (rules.clean(label) if kept else None) == clean, label
    assert LabelFilter("36", nfkd=True).broken_rule("it's") == "with unknown characters"  # only "strip" takes them out
    assert LabelFilter("абвгй", nfkd=True).clean("Йá") == "й"  # a character of the alphabet is never decomposed
    assert LabelFilter("36").settings != LabelFilter("36", nfkd=True).settings  # not the same cached index


def test_an_alphabet_from_a_file(tmp_path):
    (tmp_path / "chars.txt").write_text("ab\nc \n", encoding="utf-8-sig")
    assert resolve_charset(str(tmp_path / "chars.txt")) == "abc "
    s = Settings(charset=str(tmp_path / "chars.txt"))
    (tmp_path / "chars.txt").unlink()
    assert s.charset == s.test_characters == s.config.charset == "abc "  # a record does not depend on the file
    with pytest.raises(FileNotFoundError):
        resolve_charset("none.txt")


def test_upper_case_alphabets_keep_their_words():
    assert LabelFilter("ABC").broken_rule("AB") is None  # the released code lower-cases first and drops all
    assert LabelFilter("ABC", True, mode="reference").broken_rule("AB") == "with unknown characters"


def test_subsets_that_share_a_name():
    labels = ["cafe", "it", "it's", "2019", "naïve"]
    assert subset(labels, "IC13_1015") == [0, 1, 3] and subset(labels, "IC13_857") == [0, 3]
    assert subset(labels, "IC15_2077") == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="IC15_1811"):
        subset(labels, "IC15_1811")
    hits = np.array([True, True, False, False, True])
    assert by_rule("IC13_1095", labels, hits) == {"IC13_1015": (3, 2), "IC13_857": (2, 1)}
    assert by_rule("IC13_1015", labels, hits) == {"IC13_857": (2, 1)} and by_rule("IC15_2077", labels, hits) == {}
    assert each_word_once(["IC13_857", "SVT_647", "IC13_1095", "IC15_1811"]) == ["SVT_647", "IC13_1095", "IC15_1811"]
    assert each_word_once([*EVALUATION_NAMES]) == [*REGULAR, *IRREGULAR]  # the paper's 8,539 words


# ---- pixels --------------------------------------------------------------------------------------------


def test_preprocessing(golden):
    with np.load(golden / "preprocess.npz") as content:
        for mode in ("gray", "rgb"):
            raw = [Image.fromarray(content[f"{mode}_{i}"]) for i in range(3)]
            for pad in (0, 1):
                found = images.to_input(images.stack(raw, (32, 100), bool(pad)))
                expected = torch.from_numpy(content[f"{mode}_pad{pad}"])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from(["L", "RGB", "CMYK"]), st.sampled_from(["JPEG", "PNG"]), st.integers(30, 95)
)
def test_decoding_is_pillow_s(seed, mode, form, quality):
    if (mode, form) == ("CMYK", "PNG"):
        mode = "RGB"
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(5, 40, 2), {"L": 1, "RGB": 3, "CMYK": 4}[mode])
    smooth = np.kron(rng.integers(0, 255, shape, dtype=np.uint8), np.ones((3, 3, 1), dtype=np.uint8)).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(smooth, mode).save(buffer, form, **({"quality": quality} if form == "JPEG" else {}))
    for channels, wanted in ((1, "L"), (3, "RGB")):
        expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert(wanted))
        assert np.array_equal(np.asarray(images.decode(buffer.getvalue(), channels)), expected)


def test_pictures_are_turned_and_laid_on_white():
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, :20] = 200  # the left half is light
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    upright = np.asarray(images.decode(buffer.getvalue()))
    assert upright.shape == (40, 20) and upright[:18].mean() > 190 and upright[22:].mean() < 10
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, "PNG")
    assert np.asarray(images.decode(buffer.getvalue())).min() == 255  # black text would vanish on black


def test_batches_equal_the_plain_loader_s(tmp_path):
    write_lmdb(bench._jpegs(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = LMDBDataset(tmp_path / "a")
    loaded = load_samples([(data, i) for i in range(40)], (32, 100))
    environment = lmdb.open(str(tmp_path / "b"), readonly=True, lock=False)
    pixels, labels = bench.plain_batch(environment, range(1, 41))
    assert torch.equal(images.to_input(loaded.pixels), pixels) and loaded.labels == labels


# ---- LMDBs ---------------------------------------------------------------------------------------------


def test_a_cached_index_is_used_until_anything_changes(tmp_path, word_lmdb, monkeypatch):
    path = word_lmdb(tmp_path / "w", ["abc", "a-c", "abcdef"])
    first = LMDBDataset(path)
    from str_benchmark.data import lmdb_store

    def never(*_):
        raise AssertionError("the labels are read again")

    monkeypatch.setattr(lmdb_store, "_index", never)
    again = LMDBDataset(path)
    assert again.indices.tolist() == first.indices.tolist() == [1, 3] and again.report == first.report
    for changes in ({"charset": "62"}, {"max_length": 3}, {"filter": "off"}, {"case_sensitive": True}):
        with pytest.raises(AssertionError):
            LMDBDataset(path, **changes)
    os.utime(path / "data.mdb", (1, 1))
    with pytest.raises(AssertionError):
        LMDBDataset(path)
    monkeypatch.undo()
    for file in path.glob("index-*"):
        file.write_bytes(b"torn")
    assert LMDBDataset(path).report == first.report


def test_missing_keys_are_counted(tmp_path, word_lmdb):
    path = word_lmdb(tmp_path / "w", ["a", "b", "c", "d"])
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"label-000000002")
        transaction.delete(b"image-000000003")
        transaction.put(b"label-000000004", b"\xff\xfe")
    data = LMDBDataset(path)
    assert data.indices.tolist() == [1]
    assert data.report.removed == {"without a label": 1, "without an image": 1, "with a label that is not UTF-8": 1}


@pytest.mark.parametrize("value, message", [(b"0", "an empty LMDB"), (None, "num-samples is missing"), (b"x", "is x")])
def test_empty_lmdbs(tmp_path, word_lmdb, value, message):
    path = word_lmdb(tmp_path / "w", ["a"])
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"num-samples")
        if value:
            transaction.put(b"num-samples", value)
    with pytest.raises(ValueError, match=message):
        LMDBDataset(path)


def test_a_truncated_lmdb_is_never_mapped(tmp_path, word_lmdb):
    whole = word_lmdb(tmp_path / "w", [f"w{i}" for i in range(200)])
    content = (check_file(whole)).read_bytes()
    for share in (0.999, 0.5, 0.01):
        part = tmp_path / f"p{share}"
        part.mkdir()
        (part / "data.mdb").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="truncated|not an LMDB"):
            LMDBDataset(part)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("hello" * 100)
    with pytest.raises(ValueError, match="not an LMDB file"):
        LMDBDataset(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="is not an LMDB"):
        LMDBDataset(tmp_path)


def test_broken_images_are_named_and_never_trained(tmp_path):
    good = io.BytesIO()
    Image.effect_noise((40, 16), 90).save(good, "PNG")
    jpeg = io.BytesIO()
    Image.effect_noise((40, 16), 90).save(jpeg, "JPEG")
    items = [
        (good.getvalue(), "one"),
        (b"no image", "two"),
        (good.getvalue()[:300], "three"),
        (jpeg.getvalue()[:150], "4"),
    ]
    write_lmdb(items, tmp_path / "w")
    data = LMDBDataset(tmp_path / "w")
    samples = [(data, i) for i in range(4)]
    with pytest.raises(BrokenFile, match="image-000000002: this is not an image; .* --skip-broken"):
        load_samples(samples, (32, 100))
    loaded = load_samples(samples, (32, 100), skip_broken=True)
    assert loaded.labels == ["one"] and len(loaded.pixels) == 1 and len(loaded.broken) == 3
    assert decode_samples(samples, skip_broken=True).kept == [0]
    assert verify([str(tmp_path / "w")], tmp_path) == loaded.broken
    shutil.copytree(tmp_path / "w", tmp_path / "v")
    with lmdb.open(str(tmp_path / "v"), map_size=2**24) as env, env.begin(write=True) as transaction:
        transaction.delete(b"image-000000001")
    missing, *rest = verify([str(tmp_path / "v")], tmp_path)
    assert len(rest) == 3 and missing.endswith("v: 3 of 4 kept; 1 without an image: 'one'")
    with pytest.raises(FileNotFoundError, match="elsewhere: none of the data sets is here"):
        verify([], tmp_path / "elsewhere")
    for workers in (0, 1):  # a loader's worker says the same line as this process
        sampler = BalancedBatchSampler([data], [1], 4, seed=0)
        stream = TrainingData(
            [Parts([data])], sampler, CTCTokenizer("36"), 25, (32, 100), torch.device("cpu"), workers=workers
        )
        with pytest.raises(BrokenFile, match=r"^\S+ image-00000000\d: [^\n]*--skip-broken where the command has it$"):
            list(stream.batches(0, 1))
    sampler = BalancedBatchSampler([data], [1], 4, seed=0)
    parts = [Parts([data])]
    stream = TrainingData(parts, sampler, CTCTokenizer("36"), 25, (32, 100), torch.device("cpu"), skip_broken=True)
    batches = list(stream.batches(0, 2))
    assert [len(pixels) for pixels, _, _ in batches] == [1, 1] and stream.broken == 6


def test_workers_and_a_second_process_read_the_same_file(tmp_path, word_lmdb):
    path = word_lmdb(tmp_path / "w", [f"w{i}" for i in range(16)])
    data = LMDBDataset(path)
    data[0]  # opened here, before the fork
    whole = LMDBDataset(path, "62")  # a second data set on the same folder
    assert whole[1][1] == "w1"
    streams = []
    for workers in (0, 2):
        sampler = BalancedBatchSampler([data, whole], [0.5, 0.5], 4, seed=1)
        options = {"workers": workers}
        sets = [Parts([data]), Parts([whole])]
        stream = TrainingData(sets, sampler, CTCTokenizer("36"), 25, (32, 100), torch.device("cpu"), **options)
        streams.append(list(stream.batches(3, 9)))
    for a, b in zip(*streams, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    code = f"from str_benchmark import LMDBDataset; print(LMDBDataset({str(path)!r})[2][1])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "w2"


def test_writing_leaves_nothing_half_done(tmp_path, word_lmdb):
    def failing():
        yield Image.new("L", (4, 4)), "a"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_lmdb(failing(), tmp_path / "w")
    with pytest.raises(ValueError, match="no samples to write"):
        write_lmdb([], tmp_path / "w")
    assert not list(tmp_path.iterdir())
    word_lmdb(tmp_path / "w", ["a"])
    with pytest.raises(FileExistsError):
        word_lmdb(tmp_path / "w", ["a"])


# ---- mixtures ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=4), st.integers(80, 300))
def test_shares_are_exact(ratios, batch):
    shares = batch_shares(ratios, batch)
    assert sum(shares) == batch
    assert all(abs(share - batch * ratio / sum(ratios)) < 1 for share, ratio in zip(shares, ratios, strict=True))


def test_a_set_of_several_lmdbs_is_drawn_from_as_one(tmp_path, word_lmdb):
    labels = [["w"] * 3000, ["s"] * 5, ["m"] * 30]
    data = Parts([LMDBDataset(word_lmdb(tmp_path / str(i), each)) for i, each in enumerate(labels)])
    assert len(data) == 3035 and [data[i][1] for i in (0, 2999, 3000, 3004, 3005, 3034)] == [0, 2999, 0, 4, 0, 29]
    drawn = BalancedBatchSampler([data], [1], 7, seed=0)  # less than one of the smallest part in a batch
    once = sorted(index for step in range(3035 // 7) for _, index in drawn.batch(step))
    assert len(set(once)) == len(once)
    assert [len(part) for part in data.take(0.99).parts] == [3000, 4] and len(data.take(0.99)) == 3004
    with pytest.raises(ValueError, match="fraction"):
        data.take(0)


def test_linked_parts_are_found_and_hidden_ones_are_not(tmp_path, word_lmdb):
    word_lmdb(tmp_path / "other", ["a"])
    word_lmdb(tmp_path / "MJ" / "valid", ["b"])
    (tmp_path / "MJ" / "train").symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "MJ" / "again").symlink_to(tmp_path / "MJ", target_is_directory=True)  # leads upwards
    word_lmdb(tmp_path / "MJ" / ".trash", ["c"])
    assert [path.name for path in find_stores(tmp_path / "MJ")] == ["train", "valid"]


def test_labels_that_ctc_cannot_say_are_left_out(tmp_path, word_lmdb):
    path = word_lmdb(tmp_path / "w", ["abcd", "aabb", "abcde", "aabbc"])
    assert [ctc_columns(label) for label in ("", "abcd", "aab")] == [0, 4, 4]
    data = LMDBDataset(path, columns=6)
    assert [data.label(i) for i in range(len(data))] == ["abcd", "aabb", "abcde"]
    assert "more than the 6 columns" in str(data.report) and "'aabbc'" in str(data.report)
    assert len(LMDBDataset(path)) == 4  # attention has no columns to run out of


def test_each_set_is_used_up_before_it_comes_again():
    sampler = BalancedBatchSampler([range(10), range(7)], [0.5, 0.5], 8, seed=3)
    drawn = [pair for step in range(35) for pair in sampler.batch(step)]
    for number, size in ((0, 10), (1, 7)):
        mine = [index for which, index in drawn if which == number]
        assert len(mine) == 35 * 4
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert len({tuple(mine[epoch * size : (epoch + 1) * size]) for epoch in range(14)}) > 10  # shuffled anew
    assert sampler.batch(5) == BalancedBatchSampler([range(10), range(7)], [1, 1], 8, seed=3).batch(5)
    assert sampler.batch(5) != BalancedBatchSampler([range(10), range(7)], [1, 1], 8, seed=4).batch(5)


def test_ranks_share_a_batch():
    sets, ratios = [range(50), range(20)], [0.5, 0.5]
    whole = BalancedBatchSampler(sets, ratios, 8, 1).batch(4)
    parts = [BalancedBatchSampler(sets, ratios, 8, 1, rank, 2).batch(4) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert all([which for which, _ in part] == [0, 0, 1, 1] for part in parts)


def test_a_stream_goes_on_where_its_state_says():
    first = BalancedBatchSampler([range(50)], [1], 4, seed=1, stop=9)
    begun = [next(iter(first)) for _ in range(3)]
    second = BalancedBatchSampler([range(50)], [1], 4, seed=1, stop=9)
    second.load_state_dict(first.state_dict())
    assert begun + list(second) == [BalancedBatchSampler([range(50)], [1], 4, seed=1).batch(i) for i in range(9)]
    with pytest.raises(ValueError, match="sampler state of other data"):
        BalancedBatchSampler([range(51)], [1], 4, seed=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: batch_shares([0.5, 0], 8), "expected positive numbers"),
        (lambda: batch_shares([1, 0.001], 8), "leave a set without samples"),
        (lambda: BalancedBatchSampler([range(3)], [0.5, 0.5], 8, 0), "expected 1, one per data set, got 2"),
        (lambda: BalancedBatchSampler([range(3)], [1], 8, 0, world=3), "cannot be shared by 3 ranks"),
        (lambda: BalancedBatchSampler([[]], [1], 8, 0), "number 0 is empty"),
    ],
)
def test_wrong_mixtures(act, message):
    with pytest.raises(ValueError, match=message):
        act()
