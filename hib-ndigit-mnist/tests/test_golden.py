"""Fixtures from first principles and from running google/n-digit-mnist: exact, or to the stated tolerance."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hib_ndigit_mnist import (
    GaussianMixtureEmbedding,
    MatchProbability,
    OcclusionInfo,
    apply_occlusion,
    average_precision,
    binned_correlation,
    build_ndigit_indices,
    knn_accuracy,
    knn_predict,
    soft_contrastive_loss,
    standard_indices,
)
from hib_ndigit_mnist.data import Digits, NDigitSet, ndigit_sets
from hib_ndigit_mnist.pair_nll import pair_nll
from hib_ndigit_mnist.quadrature import expected_sigmoid
from hib_ndigit_mnist.settings import default_data_root

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "generator.json").read_text())
DIGESTS = json.loads((GOLDEN / "standard_digests.json").read_text())


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) if file[key].dtype != np.uint16 else file[key] for key in file}


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- data ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_generator(case):
    golden, args = load("generator"), case["args"]
    labels = (golden["train_labels"].numpy(), golden["test_labels"].numpy())
    options = {
        "ratio_train": args["number_ratio_train"],
        "total_train": args["total_num_train"],
        "total_test": args["total_num_test"],
        "min_per_number": args["min_num_instance_per_number"],
        "seed": args["seed"],
    }
    if "error" in case:
        with pytest.raises(ValueError, match="min_per_number"):
            build_ndigit_indices(labels, args["num_digits"], args["domain_gap"], **options)
        return
    digits = Digits(golden["train_images"], golden["train_labels"], golden["test_images"], golden["test_labels"])
    built = build_ndigit_indices(labels, args["num_digits"], args["domain_gap"], **options)
    assert list(built) == [each["split"] for each in case["splits"]]
    for split, index in built.items():
        prefix = f"c{case['case']}_{split}"
        assert np.array_equal(index.image_ids, golden[f"{prefix}_image_ids"].numpy())
        assert np.array_equal(index.numbers, golden[f"{prefix}_chosen_numbers"].numpy())
        assert np.array_equal(index.labels, golden[f"{prefix}_labels"].numpy())
        assert torch.equal(NDigitSet.of(digits, index).images(torch.arange(40))[:, 0], golden[f"{prefix}_images"])


@pytest.mark.parametrize("name", DIGESTS["datasets"])
def test_shipped_standard_tables(name):
    num_digits, _, split = name.split("_", 2)
    index, expected = standard_indices(int(num_digits))[split], DIGESTS["datasets"][name]
    assert sha256(index.rows) == expected["image_ids_sha256_int64"]
    assert sha256(index.labels) == expected["labels_sha256_int64"]
    assert [len(index.labels), len(index.numbers)] == [expected["num_samples"], expected["num_classes"]]


@pytest.mark.skipif(not (default_data_root() / "MNIST").is_dir(), reason="needs real MNIST under DATA_ROOT")
@pytest.mark.parametrize("num_digits", [2, 3])
def test_standard_images_and_the_generator_on_real_mnist(num_digits):
    sets = ndigit_sets("mnist", num_digits, "number", default_data_root())
    drawn = ndigit_sets("mnist", num_digits, "number", default_data_root(), standard=False)
    for split, data in sets.items():
        digest, pixels = hashlib.sha256(), 0
        for rows in torch.arange(len(data)).split(5000):
            images = data.images(rows).numpy()
            digest.update(images.tobytes())
            pixels += int(images.sum(dtype=np.int64))
        expected = DIGESTS["datasets"][f"{num_digits}_number_{split}"]
        assert (digest.hexdigest(), pixels) == (expected["image_sha256"], expected["pixel_sum"])
        if (num_digits, split) != (3, "test_unseen"):  # that table came from the set order of Python 2
            assert torch.equal(drawn[split].image_ids, data.image_ids)


def test_occlusion():
    golden = load("occlusion_n2")
    info = OcclusionInfo(*(golden[name] for name in ("occluded", "side", "top", "left")))
    assert torch.equal(apply_occlusion(golden["images"][:, None], info)[:, 0], golden["expected"])
    assert torch.equal(apply_occlusion(golden["images"][3][None], info[3])[0], golden["expected"][3])


# ---- the model ----


def embeddings(golden, setting):
    return [GaussianMixtureEmbedding(golden[f"s{setting}_mu{i}"], golden[f"s{setting}_logvar{i}"]) for i in (1, 2)]


def terms(first, second, a, b, tolerance):
    """Mean over component pairs with one a and b per row."""
    mean = first.mu[:, :, None] - second.mu[:, None]
    variance = first.variance()[:, :, None] + second.variance()[:, None]
    n = mean.shape[1] * mean.shape[2]
    flat = mean.reshape(-1, first.dim), variance.reshape(-1, first.dim)
    return expected_sigmoid(*flat, a.repeat_interleave(n), b.repeat_interleave(n), tolerance).view(-1, n).mean(1)


@pytest.mark.parametrize("setting", range(4))
def test_quadrature(setting):
    golden = load("match_prob")
    first, second = embeddings(golden, setting)
    a, b = golden[f"s{setting}_a"], golden[f"s{setting}_b"]
    match_prob, mismatch = golden[f"s{setting}_match_prob"], golden[f"s{setting}_self_mismatch_1"]
    torch.testing.assert_close(terms(first, second, a, b, 1e-11), match_prob, atol=1e-8, rtol=0)
    torch.testing.assert_close(1 - terms(first, first, a, b, 1e-11), mismatch, atol=1e-8, rtol=0)


@pytest.mark.parametrize("setting", range(4))
def test_match_probability_by_every_method(setting):
    golden = load("match_prob")
    first, second = embeddings(golden, setting)
    for row in range(len(first)):
        match = MatchProbability(golden[f"s{setting}_a"][row], golden[f"s{setting}_b"][row])
        pair = first[[row]], second[[row]]
        exact, eta = golden[f"s{setting}_match_prob"][row], golden[f"s{setting}_self_mismatch_1"][row]
        for tolerance in (1e-2, 1e-4, 1e-6, 1e-9):
            assert abs(match.prob(*pair, method="quadrature", tolerance=tolerance) - exact) < tolerance
            assert abs(match.self_mismatch(pair[0], method="quadrature", tolerance=tolerance) - eta) < tolerance
            assert abs(match.pairwise(*pair, method="quadrature", tolerance=tolerance) - exact) < tolerance
        many = [each[[0] * 2000] for each in pair]
        generator = torch.Generator().manual_seed(row)
        for estimate, truth in (
            (match.prob(*many, generator=generator), exact),
            (match.self_mismatch(many[0], generator=generator), eta),
        ):
            assert abs(estimate.mean() - truth) < 4 * estimate.std() / 2000**0.5


def test_losses_and_gradients():
    golden = load("losses")
    for objective in ("log_mean", "mean_log"):
        inputs = [golden[name].clone().requires_grad_() for name in ("z1", "z2", "a", "b")]
        z1, z2, a, b = inputs
        logits = b - a * ((z1[:, :, None] - z2[:, None]).square().sum(-1) + golden["eps"]).sqrt()
        slow = soft_contrastive_loss(logits, golden["match"], objective, "none")
        z, pairs = torch.cat([z1, z2]), torch.arange(len(z1))
        fast = pair_nll(z, pairs, pairs + len(z1), golden["match"].bool(), a, b, objective, float(golden["eps"]))
        for nll in (slow, fast):
            torch.testing.assert_close(nll, golden[f"nll_{objective}"], rtol=1e-10, atol=1e-14)
            for name, grad in zip(("z1", "z2", "a", "b"), torch.autograd.grad(nll.mean(), inputs), strict=True):
                torch.testing.assert_close(grad, golden[f"grad_{objective}_{name}"], rtol=1e-9, atol=1e-13)


def test_logits_give_the_mean_match_probability_and_pcmes_convention():
    golden = load("losses")
    match = MatchProbability(golden["a"], golden["b"], eps=float(golden["eps"]))
    logits = match.logits(golden["z1"], golden["z2"])
    torch.testing.assert_close(logits.sigmoid().mean((1, 2)), golden["match_prob"], rtol=1e-10, atol=1e-14)
    double = MatchProbability.from_double_convention(float(golden["a"]) / 2, float(golden["b"]) / 2)
    nll = soft_contrastive_loss(double.logits(golden["z1"], golden["z2"]), golden["match"], reduction="none")
    torch.testing.assert_close(nll, golden["pcme_soft_contrastive_nll"], atol=2e-4, rtol=0)


def test_kl():
    golden = load("kl")
    for dim in (2, 3, 4):
        mu, logvar = (golden[f"g{dim}_{name}"][:, None] for name in ("mu", "logvar"))
        kl = GaussianMixtureEmbedding(mu, logvar).kl()
        torch.testing.assert_close(kl, golden[f"g{dim}_kl"], rtol=1e-10, atol=1e-14)
    mixture = GaussianMixtureEmbedding(golden["mog2_mu"], golden["mog2_logvar"])
    torch.testing.assert_close(mixture.kl("upper_bound"), golden["mog2_upper_bound"], rtol=1e-10, atol=1e-14)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([mixture.kl("mc", mixture.sample(200, generator)) for _ in range(200)])
    standard_error = draws.std(0) / 200**0.5
    assert ((draws.mean(0) - golden["mog2_kl"]).abs() < 4 * standard_error + 1e-9).all()


def test_metrics():
    golden = load("metrics")
    match, bins = golden["labels"].bool(), 20
    for name in ("", "_ties"):
        assert abs(average_precision(match, golden[f"scores{name}"]) - float(golden[f"ap{name}"])) < 1e-12
    assert abs(average_precision(match, torch.ones(len(match))) - float(golden["ap_constant"])) < 1e-12
    binned = binned_correlation(golden["uncertainty"], golden["correct"].double(), bins)
    np.testing.assert_allclose(binned.bin_x, golden["bin_uncertainty"], atol=1e-12)
    np.testing.assert_allclose(binned.bin_y, golden["bin_accuracy"], atol=1e-12)
    assert abs(binned.tau - float(golden["correlation_reported"])) < 1e-12
    k, gallery, queries = int(golden["knn_k"]), golden["knn_gallery_labels"], golden["knn_query_labels"]
    assert torch.equal(knn_predict(golden["knn_match_prob"], gallery, k), golden["knn_pred"])
    assert knn_accuracy(golden["knn_match_prob"], queries, gallery, k) == float(golden["knn_accuracy"])
