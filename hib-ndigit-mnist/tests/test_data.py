"""Index tables, local MNIST in every layout, occluders, samplers and metrics."""

import gzip
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hib_ndigit_mnist import (
    NDigitMNIST,
    RandomOcclusion,
    TwoStreamSampler,
    apply_occlusion,
    average_precision,
    binned_correlation,
    build_ndigit_indices,
    count_partners,
    expected_calibration_error,
    knn_accuracy,
    knn_predict,
    read_mnist,
    standard_indices,
    verification_pairs,
)
from hib_ndigit_mnist.data import read_digits, read_idx
from shared_utils.images import BrokenFile

LABELS = (np.arange(3000) % 10, np.arange(1500) % 10)


def write_idx(path, array, packed=False):
    data = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2000, 28, 28), np.uint8), rng.integers(0, 256, (400, 28, 28), np.uint8)
    return {
        "train-images-idx3-ubyte": images[0],
        "train-labels-idx1-ubyte": (np.arange(2000) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": images[1],
        "t10k-labels-idx1-ubyte": (np.arange(400) % 10).astype(np.uint8),
    }


@pytest.mark.parametrize(("folder", "packed"), [("", True), ("raw", False), ("MNIST/raw", True)])
def test_idx_layouts(tmp_path, arrays, folder, packed):
    for name, array in arrays.items():
        write_idx(tmp_path / folder / (name + (".gz" if packed else "")), array, packed)
    digits = read_mnist(tmp_path, verify=False)
    for tensor, array in zip(digits, arrays.values(), strict=True):
        assert np.array_equal(tensor.numpy(), array)
    with pytest.raises(ValueError, match="train_images, .* differ from MNIST's"):
        read_mnist(tmp_path)


def test_png_folders_keep_the_order_of_the_file_names(tmp_path, arrays):
    images, labels = arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"]
    for part, shift in (("training", 0), ("testing", 60000)):
        for i in range(30):
            (tmp_path / part / str(labels[i])).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(tmp_path / part / str(labels[i]) / f"{i + shift}.png")
    digits = read_mnist(tmp_path, verify=False)
    assert np.array_equal(digits.train_images.numpy(), images[:30])
    assert np.array_equal(digits.test_labels.numpy(), labels[:30])


def test_missing_and_damaged_files(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match="searched .*raw.*MNIST/raw.*<index>.png"):
        read_mnist(tmp_path)
    whole = tmp_path / "a-idx1-ubyte"
    write_idx(whole, arrays["train-labels-idx1-ubyte"])
    packed = bytearray(gzip.compress(whole.read_bytes()))
    packed[len(packed) // 2 : len(packed) // 2 + 2] = b"\xff\xff"
    damaged = {"cut": whole.read_bytes()[:100], "other": b"hello", "bad.gz": b"\x1f\x8bhello", "mid.gz": bytes(packed)}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenFile, match=f"{name}.*replace the file"):
            read_idx(tmp_path / name)


def test_dataset(tmp_path, arrays):
    for name, array in arrays.items():
        write_idx(tmp_path / name, array)
    data = NDigitMNIST(tmp_path, 3, "instance", "test", standard=False, seed=3, transform=lambda x: x + 0)
    image, label = data[5]
    assert image.shape == (1, 28, 84) and image.dtype == torch.uint8 and isinstance(label, int)
    ids = data.image_ids[5]
    assert torch.equal(image[0, :, 28:56], torch.from_numpy(arrays["t10k-images-idx3-ubyte"][ids[1]]))
    assert [label // 100, label // 10 % 10, label % 10] == arrays["t10k-labels-idx1-ubyte"][ids].tolist()
    assert len(data.numbers) == 1000 and len(data) == 10_000
    with pytest.raises(IndexError):
        data[len(data)]
    for options, message in (
        ({"split": "test_seen", "gap": "instance"}, "split: expected one of train, test"),
        ({"seed": 1}, "seed: the standard tables"),
        ({"num_digits": 7, "standard": False}, "num_digits: expected 1 to 6"),
        ({"gap": "x", "standard": False}, "gap: expected number or instance"),
    ):
        with pytest.raises(ValueError, match=message):
            NDigitMNIST(tmp_path, **options)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_tables_hold_what_they_promise(num_digits, seed):
    tables = build_ndigit_indices(
        LABELS, num_digits, "number", total_train=2000, total_test=400, min_per_number=7, seed=seed
    )
    train, seen, unseen = tables.values()
    assert not set(train.numbers) & set(unseen.numbers) and not set(seen.numbers) & set(unseen.numbers)
    for table in tables.values():
        labels = LABELS[table.source == "test"]
        digits = labels[table.image_ids]  # (classes, per number, N)
        powers = 10 ** np.arange(num_digits - 1, -1, -1)
        assert (digits @ powers == table.numbers[:, None]).all()
        for column in table.image_ids.transpose(0, 2, 1).reshape(-1, table.image_ids.shape[1]):
            assert len(set(column)) == len(column)  # without replacement within number and position


def test_four_digits_and_the_trap_of_seen_numbers():
    sizes = {"total_train": 20_000, "total_test": 2000, "min_per_number": 100, "seed": 714}
    labels = (np.arange(3000) % 10, np.arange(1500) % 10)
    original = build_ndigit_indices(labels, 4, "number", **sizes)
    fixed = build_ndigit_indices(labels, 4, "number", **sizes, seen_from="trained")
    trained = set(original["train"].numbers)
    assert len(trained) == 200 and len(set(original["test_seen"].numbers) & trained) < 10
    assert set(fixed["test_seen"].numbers) <= set(fixed["train"].numbers)
    with pytest.raises(ValueError, match="min_per_number"):
        build_ndigit_indices(labels, 4, "instance")


def test_impossible_tables():
    for options, message in (
        ({"min_per_number": 0}, "min_per_number: expected >= 1"),
        ({"min_per_number": 600, "total_test": 500}, "min_per_number: 600 images"),
        ({"min_per_number": 400, "total_train": 3000, "total_test": 3000}, "400 images of digit 0 are needed"),
        ({"ratio_train": 100}, "ratio_train"),
        ({"seen_from": "x"}, "seen_from"),
    ):
        with pytest.raises(ValueError, match=message):
            build_ndigit_indices(LABELS, 2, "number", **({"total_train": 2000, "min_per_number": 7} | options))
    with pytest.raises(ValueError, match="standard tables exist for 2 and 3"):
        standard_indices(4)


def test_digits_are_split_once():
    digits = read_digits()
    assert digits.train_images.shape == (1200, 8, 8) and digits.test_images.shape == (597, 8, 8)
    assert digits.train_images.max() == 255 and digits.train_labels.bincount().min() >= 108


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([4, 8, 28]))
def test_occluders_stay_in_their_tile_and_can_be_replayed(seed, tiles, tile):
    x = torch.ones(16, 1, tile, tile * tiles)
    occlude = RandomOcclusion(p=1.0, tile=tile)
    y, info = occlude(x, torch.Generator().manual_seed(seed))
    assert torch.equal(y, apply_occlusion(x, info)) and torch.equal(x, torch.ones_like(x))
    hidden = (y == 0).view(16, tile, tiles, tile).sum((1, 3))
    assert torch.equal(hidden, info.side**2)
    assert torch.equal(RandomOcclusion(p=0.0, tile=tile)(x)[0], x)


def test_expected_hidden_area():
    y, info = RandomOcclusion(p=1.0)(torch.ones(20_000, 1, 28, 28), torch.Generator().manual_seed(0))
    assert abs((y == 0).double().mean() - 266 / 784) < 0.008
    assert info.side.min() == 0 and info.side.max() == 28
    share = RandomOcclusion(p=0.2)(torch.ones(20_000, 1, 28, 28))[1].occluded.double().mean()
    assert abs(share - 0.2) < 0.015


def test_occlusion_mistakes():
    for shape, message in (((2, 1, 28, 30), "28 x 30"), ((2, 1, 30, 28), "30 x 28"), ((2, 3, 28, 28), "B, 1, H, W")):
        with pytest.raises(ValueError, match=message):
            RandomOcclusion()(torch.zeros(shape))
    with pytest.raises(ValueError, match="p in"):
        RandomOcclusion(p=1.5)


def test_two_streams_never_pair_an_image_with_itself():
    labels = torch.tensor([0] * 2 + [1] * 5 + [2] * 9)[torch.randperm(16)]
    sampler = TwoStreamSampler(labels, 8, seed=0, batches=300)
    seen = torch.zeros(16)
    for batch in sampler:
        counts = torch.tensor(batch).bincount(minlength=16)
        assert len(batch) == 8 and labels[batch].bincount().max() >= 2
        seen += counts
    assert seen.min() > 0
    anchor, uniform = torch.arange(16).repeat(50), torch.rand(800)
    partner = sampler.index.partner(anchor, uniform)
    assert (partner != anchor).all() and torch.equal(labels[partner], labels[anchor])
    assert list(TwoStreamSampler(labels, 8, seed=1)) == list(TwoStreamSampler(labels, 8, seed=1))
    for size, bad, message in ((7, labels, "even"), (4, torch.tensor([0, 0, 1]), "class 1 has one")):
        with pytest.raises(ValueError, match=message):
            TwoStreamSampler(bad, size, seed=0)


def test_verification_pairs():
    labels = torch.arange(60) % 6
    first, second, match = verification_pairs(labels, 1000, seed=1, positive_rate=0.3)
    assert match.sum() == 300 and (first != second).all() and torch.equal(labels[first] == labels[second], match)
    assert all(torch.equal(a, b) for a, b in zip(verification_pairs(labels), verification_pairs(labels), strict=True))
    first, second, match = verification_pairs(labels, "all")
    assert len(first) == 60 * 59 // 2 and match.sum() == 6 * 45
    for bad, message in ((torch.zeros(4).long(), "no non-matching"), (torch.arange(4), "no matching")):
        with pytest.raises(ValueError, match=message):
            verification_pairs(bad, 10)
    with pytest.raises(ValueError, match="positive_rate"):
        verification_pairs(labels, 10, positive_rate=2.0)


def test_neighbours_leave_out_the_query_itself():
    match_prob = torch.tensor([[0.99, 0.5, 0.4, 0.3]])
    labels = torch.tensor([7, 1, 2, 2])
    assert knn_predict(match_prob, labels, 1) == 7
    assert knn_predict(match_prob, labels, 1, own=torch.tensor([0])) == 1
    assert knn_predict(match_prob, labels, 3, own=torch.tensor([0])) == 2  # two votes beat the nearer one
    assert knn_predict(match_prob, labels, 2, own=torch.tensor([0])) == 1  # a tie goes to the larger sum
    with pytest.raises(ValueError, match="k: expected 1 to 3"):
        knn_predict(match_prob, labels, 4, own=torch.tensor([0]))


def test_a_query_without_partner_is_no_error():
    labels = torch.tensor([0, 0, 1, 1, 2])
    perfect = (labels[:, None] == labels).double() * 0.9 + 0.05
    assert knn_accuracy(perfect, labels, labels, 1, own=torch.arange(5)) == 1
    assert knn_accuracy(perfect, labels, labels, 1) == 1
    assert count_partners(labels, labels, torch.arange(5)).tolist() == [1, 1, 1, 1, 0]
    assert count_partners(torch.tensor([2, 3]), labels).tolist() == [1, 0]
    with pytest.raises(ValueError, match="no query has"):
        knn_accuracy(torch.ones(1, 5), torch.tensor([7]), labels, 1)


def test_small_classes_are_not_outvoted_in_a_perfect_embedding():
    labels = torch.tensor([0] * 2 + [1] * 20)
    perfect = (labels[:, None] == labels).double() * 0.9 + 0.05
    assert knn_accuracy(perfect, labels, labels, 5, own=torch.arange(22)) == 1
    assert knn_predict(perfect[:1], labels, 5, own=torch.tensor([0])) == 1  # without labels of the queries they are
    perfect[2, 0] = perfect[2, 1] = perfect[2, 3] = 0.99  # two of three wrong, but three of five right
    assert knn_accuracy(perfect[2:3], labels[2:3], labels, 5, own=torch.tensor([2])) == 1
    assert knn_accuracy(perfect[2:3], labels[2:3], labels, 3, own=torch.tensor([2])) == 0


def test_scores_that_are_nan_are_refused():
    labels, nan = torch.arange(40) // 2, float("nan")
    scores = torch.rand(40, 40)
    scores[3, 1] = nan
    for call in (
        lambda: knn_predict(scores, labels, 1),
        lambda: average_precision(labels > 3, scores[3]),
        lambda: binned_correlation(scores[3], torch.ones(40)),
        lambda: binned_correlation(torch.rand(40), scores[3]),
    ):
        with pytest.raises(ValueError, match="1 of .* are NaN"):
            call()


def test_tau_of_ties_does_not_depend_on_the_order_of_rows():
    generator = torch.Generator().manual_seed(0)
    eta = torch.rand(2000, generator=generator)
    eta = torch.where(eta < 0.6, 0.0, eta)  # most images are certain
    match = torch.rand(2000, generator=generator) > eta
    scores = torch.rand(2000, generator=generator)
    for options in ({}, {"match": match}):
        values = scores if options else match.double()
        found = set()
        for order in (torch.arange(2000), match.int().argsort(), match.int().argsort().flip(0)):
            moved = {name: value[order] for name, value in options.items()}
            found.add(round(binned_correlation(eta[order], values[order], **moved).tau, 9))
        assert len(found) == 1
    binned = binned_correlation(eta, match.double())
    assert len(binned.bin_x) == 9 and binned.bin_x[0] == 0  # 12 of 20 bins are one


def test_tau_has_the_papers_sign_and_shuffling_destroys_it():
    generator = torch.Generator().manual_seed(0)
    eta = torch.rand(2000, generator=generator)
    correct = (torch.rand(2000, generator=generator) > eta).double()
    found = binned_correlation(eta, correct)
    assert found.tau > 0.9 and found.p_value < 0.001 and found.dropped == 0
    shuffled = binned_correlation(eta[torch.randperm(2000, generator=generator)], correct)
    assert abs(shuffled.tau) < 0.5 and shuffled.p_value > 0.01
    assert math.isnan(binned_correlation(torch.ones(100), correct[:100]).tau)
    match = torch.zeros(100, dtype=torch.bool)
    match[:10] = True
    assert binned_correlation(torch.arange(100.0), torch.rand(100), match=match).dropped == 18
    with pytest.raises(ValueError, match="at least 20"):
        binned_correlation(eta[:5], correct[:5])


def test_calibration():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50_000, generator=generator)
    match = torch.rand(50_000, generator=generator) < p
    assert expected_calibration_error(p, match).error < 0.01
    assert abs(expected_calibration_error(torch.full((100,), 0.9), torch.arange(100) < 50).error - 0.4) < 1e-6
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        expected_calibration_error(p + 1, match)
    with pytest.raises(ValueError, match="matching pair"):
        average_precision(torch.zeros(3).bool(), p[:3])
