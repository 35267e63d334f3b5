"""Decoding, tokenizers, TPS, metrics and frontiers against slow definitions; what the paper's own figures imply."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from str_benchmark.analysis import compare_words, frontier, matched_gains, module_means, published
from str_benchmark.charset import PRESETS, normalise, resolve_charset
from str_benchmark.decoding import ctc_beam_search, ctc_greedy
from str_benchmark.frontier import non_dominated, upper_hull
from str_benchmark.metrics import (
    bootstrap_interval,
    correct_words,
    edit_similarity,
    failure_intersection,
    levenshtein,
    mcnemar,
    ned,
    total_accuracy,
    word_accuracy,
)
from str_benchmark.tokenizers import AttnTokenizer, CTCTokenizer
from str_benchmark.tps import ThinPlateSpline, base_points, inverse_delta, lifted, pixel_centres, skewed_start

# ---- decoding ------------------------------------------------------------------------------------------


def collapse(path):
    return tuple(k for k, _ in itertools.groupby(path) if k)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_a_full_beam_sums_all_alignments(seed, steps):
    log_probs = torch.randn(1, steps, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_probs = log_probs.log_softmax(-1)
    totals = {}
    for path in itertools.product(range(3), repeat=steps):
        p = math.exp(sum(log_probs[0, t, k].item() for t, k in enumerate(path)))
        totals[collapse(path)] = totals.get(collapse(path), 0) + p
    found = ctc_beam_search(log_probs, "ab", beam=1000)[0]
    assert {text: pytest.approx(math.exp(p)) for text, p in found} == {
        "".join("ab"[k - 1] for k in labels): p for labels, p in totals.items()
    }
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


def test_a_beam_finds_what_the_best_path_misses():
    column = torch.tensor([0.6, 0.4]).log()  # blank, a: the best path is empty (0.36), "a" has 0.64
    log_probs = column.expand(1, 2, 2)
    assert ctc_greedy(log_probs, "a") == [""]
    assert ctc_beam_search(log_probs, "a", beam=2)[0][0] == ("a", pytest.approx(math.log(0.64)))


def test_the_narrowest_beam_and_the_best_classes_of_each_column():
    log_probs = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]]).log()  # blank, a, b
    assert ctc_beam_search(log_probs, "ab", beam=1) == [[("a", pytest.approx(math.log(0.5 * 0.5)))]]
    assert ctc_beam_search(log_probs, "ab", per_column=1) == [[("a", pytest.approx(math.log(0.25)))]]
    found = dict(ctc_beam_search(log_probs, "ab", per_column=2)[0])  # blank or a, then a or b
    expected = {"a": 0.5 * 0.5 + 0.3 * 0.5, "b": 0.5 * 0.3, "ab": 0.3 * 0.3}
    assert found == {text: pytest.approx(math.log(p)) for text, p in expected.items()}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_greedy_drops_repeats_then_blanks(path):
    expected = "".join("abc"[k - 1] for k in collapse(path))
    assert CTCTokenizer("abc").decode(torch.tensor([path]))[0] == [expected]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(PRESETS["94"], max_size=8), min_size=1, max_size=4))
def test_attention_encodes_and_decodes(labels):
    tokenizer = AttnTokenizer("94")
    ids, lengths = tokenizer.encode(labels, 8)
    assert ids.shape == (len(labels), 10) and lengths.tolist() == [len(label) + 1 for label in labels]
    assert tokenizer.decode(ids[:, 1:])[0] == labels  # the text "[s]" in a label is no end


def test_full_length_predictions_keep_their_last_character():
    ids, _ = AttnTokenizer("36").encode(["abc"], 3)
    assert AttnTokenizer("36").decode(ids[:, 1:-1])[0] == ["abc"]  # no [s] came
    assert AttnTokenizer("94").decode(AttnTokenizer("94").encode(["a[s]b"], 6)[0][:, 1:])[0] == ["a[s]b"]


def test_confidences():
    probs = torch.tensor([[[0.1, 0.9, 0], [0.2, 0.8, 0], [0.7, 0.3, 0], [0, 0.4, 0.6]]])
    tokenizer = CTCTokenizer("ab")
    assert tokenizer.decode(probs) == (["ab"], [pytest.approx(0.9 * 0.8 * 0.7 * 0.6)])
    assert tokenizer.char_confidences(probs) == [[pytest.approx(0.9), pytest.approx(0.6)]]
    probs = torch.tensor([[[0, 0.1, 0.9], [0.2, 0.8, 0], [0, 0, 1.0]]])
    assert AttnTokenizer("a").decode(probs) == (["a"], [pytest.approx(0.9)])
    assert AttnTokenizer("a").decode(probs[:, 1:]) == ([""], [0.0])  # an empty reading has no confidence


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: CTCTokenizer("36").encode(["a b"]), "character ' ' is not in the charset"),
        (lambda: CTCTokenizer("36").encode(["abc"], 2), "3 characters, max_length is 2"),
        (lambda: AttnTokenizer("36").encode(["a"], unknown="ignore"), "expected 'error' or 'drop'"),
        (lambda: CTCTokenizer("aba"), "each character once, got 'a' 2 times"),
        (lambda: resolve_charset(""), "got an empty string"),
        (lambda: CTCTokenizer("ab").decode(torch.zeros(1, 2, 4)), r"expected \(B, T, 3\)"),
        (lambda: CTCTokenizer("ab").decode(torch.zeros(2, 3)), r"\(B, T, K\) probs, got \(2, 3\) torch.float32"),
        (lambda: CTCTokenizer("ab").decode(torch.zeros(1, 2, 3, dtype=torch.int64)), r"got \(1, 2, 3\) torch.int64"),
        (lambda: CTCTokenizer("ab").decode(torch.tensor([[3]])), "expected 0 .. 2, got 3 .. 3"),
        (lambda: ctc_beam_search(torch.zeros(1, 2, 3), "ab"), "columns that sum to 1"),
        (lambda: ctc_beam_search(torch.zeros(2, 3), "ab"), r"expected \(B, T, 3\)"),
        (lambda: ctc_beam_search(torch.zeros(1, 2, 3).log_softmax(-1), "ab", beam=0), "beam: expected 1 or more"),
        (lambda: ctc_beam_search(torch.zeros(1, 2, 3).log_softmax(-1), "ab", per_column=0), "per_column: expected"),
        (lambda: total_accuracy({"SVT": (0, 0)}, ["SVT"]), "the total needs words; SVT hold none"),
    ],
)
def test_wrong_input_to_tokenizers_and_decoders(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_unknown_characters_may_be_dropped():
    assert CTCTokenizer("ab").decode(CTCTokenizer("ab").encode(["a!b"], unknown="drop")[0])[0] == ["ab"]


# ---- TPS -----------------------------------------------------------------------------------------------


def test_the_skewed_start_in_float64():
    """Figure 6a of RARE: both rows of points fall from left to right, a unit apart."""
    x, fall = np.linspace(-1, 1, 10), np.linspace(0, 1, 10)
    expected = np.stack([np.concatenate([x, x]), np.concatenate([-fall, 1 - fall])], 1)
    np.testing.assert_allclose(skewed_start(20).numpy(), expected, rtol=0, atol=1e-15)


def test_the_spline_passes_through_its_points():
    points = base_points(8)
    target = points + 0.1 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transform = inverse_delta(points) @ torch.cat([target, target.new_zeros(3, 2)])
    torch.testing.assert_close(lifted(points, points) @ transform, target, rtol=0, atol=1e-5)  # P-hat has ln(r + 1e-6)


def test_affine_points_give_an_affine_grid():
    spline = ThinPlateSpline(20, (16, 40))
    matrix, shift = torch.tensor([[0.9, 0.2], [-0.1, 0.7]]), torch.tensor([0.05, -0.02])
    grid = spline((base_points(20).float() @ matrix + shift)[None])
    expected = pixel_centres(16, 40).float() @ matrix + shift
    torch.testing.assert_close(grid[0].reshape(-1, 2), expected, rtol=0, atol=1e-4)


def test_wrong_input_to_tps():
    assert ThinPlateSpline(4, (1, 3))(base_points(4)[None].float()).shape == (1, 1, 3, 2)
    with pytest.raises(ValueError, match="an even number of 4 or more, got 5"):
        ThinPlateSpline(5, (8, 8))
    with pytest.raises(ValueError, match=r"expected \(B, 20, 2\), got \(1, 19, 2\)"):
        ThinPlateSpline(20, (8, 8))(torch.zeros(1, 19, 2))


# ---- metrics -------------------------------------------------------------------------------------------


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_levenshtein_is_its_definition(a, b):
    assert levenshtein(a, b) == slow_distance(a, b) == levenshtein(b, a)
    assert 0 <= edit_similarity(a, b) <= 1


def test_words_are_compared_on_the_test_alphabet():
    assert word_accuracy(["It's", "HELLO"], ["its", "hello"]) == 1
    assert word_accuracy(["Its"], ["its"], test_charset="62") == 0
    assert correct_words(["??"], ["!!"]).tolist() == [False]  # nothing to read is not read
    assert ned(["??", "a"], ["!!", "a"]) == 0.5
    assert normalise("Zürich-1") == "zrich1"
    with pytest.raises(ValueError, match="one or more, got 0, 0"):
        word_accuracy([], [])
    with pytest.raises(ValueError, match="got 2, 1"):
        ned(["a", "b"], ["a"])


def test_two_models_are_compared_on_the_same_words():
    def read(name, hits):
        words = [f"{name}/image-{i:09d}" for i in range(len(hits))]
        return pd.DataFrame({"set": name, "word": words, "label": "NA", "correct": hits})

    part, whole, other = [True] * 4, [True] * 4 + [False] * 2, [True] * 9 + [False]
    first = pd.concat([read("IC13_857", part), read("IC13_1015", whole), read("SVT_647", other)])
    hits = ([False] * 4, [False] * 4 + [False, True], [True] * 8 + [False] * 2)
    second = pd.concat(
        [read(name, each) for name, each in zip(("IC13_857", "IC13_1015", "SVT_647"), hits, strict=True)]
    )
    found = compare_words(first, second.sample(frac=1, random_state=0)).set_index("set")  # in any order
    assert found.loc["IC13_1015", ["n", "only_first", "only_second"]].tolist() == [6, 4, 1]
    assert found.loc["IC13_1015", "p_value"] == pytest.approx(2 * (1 + 5) / 2**5)  # exact, by hand
    assert found.loc["SVT_647", "p_value"] == 1
    assert found.loc["all words", ["n", "only_first", "only_second"]].tolist() == [
        16,
        5,
        1,
    ]  # the 857 are among the 1015
    assert found.loc["all words", "first"] == pytest.approx(100 * 13 / 16)
    with pytest.raises(
        ValueError, match="not evaluated on the same words: 1 words are only in one file, such as SVT_647"
    ):
        compare_words(first, second.iloc[:-1])
    with pytest.raises(ValueError, match="other labels"):
        compare_words(first, second.assign(label="x"))
    with pytest.raises(ValueError, match="lacks the column correct"):
        compare_words(first.drop(columns="correct"), second)


def test_the_total_counts_words():
    counts = {"big": (900, 450), "small": (100, 100)}
    assert total_accuracy(counts, ["big", "small"]) == (0.55, 1000)
    with pytest.raises(ValueError, match="not evaluated: other"):
        total_accuracy(counts, ["big", "other"])


def test_statistics():
    correct = np.arange(1000) % 4 > 0
    low, high = bootstrap_interval(correct)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 1000)
    assert (low, high) == (pytest.approx(0.75 - half, abs=0.004), pytest.approx(0.75 + half, abs=0.004))
    a, b = np.array([1, 1, 1, 1, 1, 0, 0], bool), np.array([0, 0, 0, 0, 0, 0, 1], bool)
    assert mcnemar(a, b) == {"only_a": 5, "only_b": 1, "p_value": pytest.approx(2 * (1 + 6) / 64)}
    assert mcnemar(a, a)["p_value"] == 1
    half = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
    assert failure_intersection({"x": half}) == {"missed_by_all": 0.5, "expected": 0.375, "read_by_all": 0.25}
    easy, hard = np.ones((2, 4), bool), np.zeros((2, 4), bool)
    shares = failure_intersection({"easy": easy, "hard": hard})  # as independent as can be: not 0.5 against 0.25
    assert shares == {"missed_by_all": 0.5, "expected": 0.5, "read_by_all": 0.5}
    for act in (
        lambda: bootstrap_interval(np.zeros(0)),
        lambda: mcnemar(a, b[:3]),
        lambda: failure_intersection({"x": a}),
        lambda: failure_intersection({"x": half, "y": half[:1]}),
    ):
        with pytest.raises(ValueError):
            act()


# ---- frontiers and the published figures ---------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_hull_and_dominance_by_definition(points):
    x, y = zip(*points, strict=True)
    kept = non_dominated(x, y)
    for i, (a, b) in enumerate(points):
        beaten = any((c <= a and d >= b) and (c, d) != (a, b) for c, d in points)
        assert beaten or any(points[k] == points[i] for k in kept)
        assert not (beaten and i in kept)
    hull = upper_hull(x, y)
    assert set(hull) <= set(kept)
    for left, right in itertools.pairwise(hull):  # no point lies above a segment
        for a, b in points:
            if x[left] <= a <= x[right]:
                line = y[left] + (y[right] - y[left]) * (a - x[left]) / (x[right] - x[left])
                assert b <= line + 1e-9


def test_published_frontiers_are_the_hull_of_table_8():
    time = frontier(published(), "time_ms", "total_8539")
    assert time[time.on_hull].combination.tolist() == [
        "None-VGG-None-CTC",
        "None-ResNet-None-CTC",
        "None-ResNet-BiLSTM-CTC",
        "TPS-ResNet-BiLSTM-CTC",
        "TPS-ResNet-BiLSTM-Attn",
    ]
    assert set(time[~time.on_hull].combination) == {
        "None-VGG-BiLSTM-CTC",
        "TPS-VGG-BiLSTM-CTC",
        "TPS-ResNet-None-Attn",
    }
    size = frontier(published(), "params_M", "total_8539")
    assert size[size.on_hull].combination.tolist() == [
        "None-RCNN-None-CTC",
        "None-RCNN-None-Attn",
        "TPS-RCNN-None-Attn",
        "TPS-RCNN-BiLSTM-Attn",
        "TPS-ResNet-BiLSTM-Attn",
    ]
    assert set(size[~size.on_hull].combination) == {"None-RCNN-BiLSTM-Attn", "TPS-ResNet-None-Attn"}


def test_published_module_gains():
    gains = matched_gains(published(), "total_8539").set_index("module")
    for module, mean, low, high, pairs in (
        ("TPS", 2.2, 1.0, 5.6, 12),
        ("RCNN", 2.3, 0.3, 5.9, 8),
        ("ResNet", 2.6, 1.5, 4.6, 8),
        ("BiLSTM", 3.2, 0.7, 8.9, 12),
        ("Attn", 2.1, 0.6, 5.1, 12),
    ):
        row = gains.loc[module]
        assert (round(row["mean"], 1), round(row.lowest, 1), round(row.highest, 1)) == (mean, low, high)
        assert row.pairs == pairs and row.p_value < 0.01
    means = module_means(published(), "total_8539").set_index("module")["mean"]
    assert means["ResNet"] == pytest.approx(82.20, abs=0.01) and means["TPS"] == pytest.approx(80.79, abs=0.01)


def test_published_totals_are_count_weighted():
    counts = {"IIIT_3000": 3000, "SVT_647": 647, "IC03_867": 867, "IC13_1015": 1015}
    counts |= {"IC15_2077": 2077, "SVTP_645": 645, "CUTE_288": 288}
    frame = published()
    total = sum(n * frame[name] for name, n in counts.items()) / sum(counts.values())
    assert sum(counts.values()) == 8539 and (total - frame.total_8539).abs().max() < 0.07


def test_wrong_input_to_frontiers():
    with pytest.raises(ValueError, match="two vectors of one length"):
        upper_hull([1, 2], [1])
    with pytest.raises(ValueError, match="NaN"):
        non_dominated([1, float("nan")], [1, 2])
    with pytest.raises(ValueError, match="expected a column 'speed'"):
        frontier(published(), "speed", "total_8539")
    with pytest.raises(ValueError, match="expected names such as"):
        matched_gains(published().assign(combination="TRBA"), "total_8539")
