"""Losses, scores and fits on cases small enough to work out by hand."""

import inspect
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hib_ndigit_mnist import contrastive_loss, expected_calibration_error, expected_sigmoid, recall_at_1
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.evaluate import (
    Evaluation,
    TestSet,
    class_centroids,
    component_distance,
    fit_match,
    shared_digit_ratio,
    shares_digit,
)
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.losses import vib_objective
from hib_ndigit_mnist.mc_infonce import MCInfoNCELoss
from hib_ndigit_mnist.metrics import binned_correlation
from hib_ndigit_mnist.models import MLPEncoder, to_unit
from hib_ndigit_mnist.pairs import Pairs
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import _classical, _warn_if_hopeless, make_fabric

NUMBERS = torch.tensor([12, 13, 42, 77])
CENTROIDS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
RATIO = 1 / ((9 * math.sqrt(2) + math.sqrt(2) + 2 * math.sqrt(64 + 81)) / 4)  # 12-13 and 12-42 share, the others do not


def points(*places):
    return GaussianMixtureEmbedding(torch.tensor(places, dtype=torch.float64)[:, None], None)


def test_the_classical_loss_by_pair():
    z1, z2 = torch.zeros(4, 1), torch.tensor([[0.5], [0.25], [1.5], [0.0]])
    loss = contrastive_loss(z1, z2, torch.tensor([1, 0, 0, 0]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.25, 0.75**2, 0.0, 1.0]))  # the margin is 1 by default
    assert float(contrastive_loss(z1, z2, torch.tensor([1, 0, 0, 0]), reduction="sum")) == pytest.approx(
        1.8125, rel=1e-5
    )
    pairs = Pairs(*(torch.tensor([v]) for v in ([0, 1, 0], [1, 2, 2], [True, False, False], [0.5, 0.25, 0.25])))
    out = _classical(torch.tensor([[[0.0], [0.5], [0.75]]]), pairs, 1.0, MatchProbability(1.0, 1.0))
    positive, negative = 0.5 * 0.25, 0.25 * (0.75**2 + 0.25**2)
    for found, expected in ((out.nll_pos, 2 * positive), (out.nll_neg, 2 * negative), (out.loss, positive + negative)):
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_kl_is_chosen_by_itself():
    embedding = GaussianMixtureEmbedding(torch.randn(4, 1, 2), torch.zeros(4, 1, 2))
    pairs = Pairs(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([0.5, 0.5]))
    arguments = embedding, embedding.mu, pairs, MatchProbability(), 1e-4
    assert vib_objective(*arguments).kl == vib_objective(*arguments, kl="auto").kl


def test_calibration_bin_by_bin():
    p, match = torch.tensor([0.05, 0.05, 0.95, 1.0, 0.95]), torch.tensor([True, False, True, False, True])
    found = expected_calibration_error(p, match, bins=10)
    assert found.error == pytest.approx(0.4 * (0.5 - 0.05) + 0.6 * (2.9 / 3 - 2 / 3))
    assert np.flatnonzero(found.weight).tolist() == [0, 9] and found.weight[[0, 9]] == pytest.approx([0.4, 0.6])
    assert len(found.confidence) == 10 and np.isnan(found.confidence[1:9]).all()
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match=r"match_prob: expected values in \[0, 1\]"):
            expected_calibration_error(torch.tensor([0.5, wrong]), match[:2])


def test_p_is_the_share_of_orders_at_least_as_negative():
    eta = torch.arange(5.0)
    found = binned_correlation(eta, -eta, bins=5)
    assert found.tau == pytest.approx(1) and found.p_value == pytest.approx(1 / 120, rel=0.5)  # one order of 120
    assert found.p_value == binned_correlation(eta, -eta, bins=5).p_value
    again = binned_correlation(eta, eta, bins=5)
    assert again.tau == pytest.approx(-1) and again.p_value == 1
    none = binned_correlation(eta, torch.ones(5), bins=5)
    assert math.isnan(none.tau) and math.isnan(none.p_value) and none.dropped == 0


def test_neighbours_of_many_images_are_found_part_by_part():
    angle = torch.arange(1100) // 2 * 2 * math.pi / 550 + torch.arange(1100) % 2 * 1e-3
    features = torch.stack([angle.cos(), angle.sin()], 1)
    assert recall_at_1(features, torch.arange(1100) // 2).all()


def test_structure_of_the_centroids():
    assert shares_digit(torch.tensor([19, 29, 91]), 2).nonzero().tolist() == [[0, 1], [1, 0]]
    assert shared_digit_ratio(CENTROIDS, NUMBERS, 2) == pytest.approx(RATIO, rel=1e-6)
    centroids, numbers = class_centroids(points([0.0, 0.0], [4.0, 2.0], [1.0, 1.0]), torch.tensor([5, 5, 3]))
    assert numbers.tolist() == [3, 5] and centroids.tolist() == [[1.0, 1.0], [2.0, 1.0]]
    three = GaussianMixtureEmbedding(torch.tensor([[[0.0], [1.0], [3.0]]]), torch.zeros(1, 3, 1))
    assert component_distance(three).tolist() == [2.0]  # (1 + 2 + 3) / 3


def made(labels, embedding, *, images=(0, 0), **computed):
    """An evaluation of images of one brightness (clean, corrupt), embedded and scored as given."""
    grey = [torch.full((len(labels), 1, 1, 1), value, dtype=torch.uint8) for value in images]
    pixels = {"clean": grey[0], "corrupt": grey[1]}
    test = TestSet(pixels, labels, None, None, torch.arange(len(labels)))
    found = Evaluation(MLPEncoder(components=embedding.components), MatchProbability(2.0, 3.0), test)
    found.__dict__["embeddings"] = {"clean": embedding, "corrupt": embedding}
    found.__dict__.update(computed)
    return found


def test_reports_on_four_images():
    labels = torch.tensor([0, 0, 1, 1])
    eta, right = torch.tensor([0.4, 0.1, 0.2, 0.3]), torch.tensor([True, True, True, False])
    votes = {"clean": (None, right), "corrupt": (None, ~right)}
    found = made(labels, points(*[[0.0, 0.0]] * 4), eta={"clean": eta, "corrupt": eta}, _votes=votes).selective()
    assert found["r1_clean"] == 0.75 and found["r1_corrupt"] == 0.25
    assert found["r_auroc_clean"] == pytest.approx(2 / 3) and found["r_auroc_corrupt"] == pytest.approx(1 / 3)
    assert found["rejection_area_clean"] == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)
    one = made(NUMBERS, points(*CENTROIDS.tolist()))
    one.test = replace(one.test, occluders=type("Occluders", (), {"side": torch.zeros(4, 2)}))
    assert one.structure() == {"shared_over_other": pytest.approx(RATIO, rel=1e-6)}
    single = GaussianMixtureEmbedding(torch.zeros(4, 1, 2), torch.full((4, 1, 2), -2.0))
    assert not [name for name in made(labels, single).spread() if name.startswith("apart")]
    double = GaussianMixtureEmbedding(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]).repeat(4, 1, 1), torch.zeros(4, 2, 2))
    assert made(labels, double).spread()["apart_clean"] == 5.0


def test_hidden_ink_is_the_share_of_a_clean_image_s_brightness():
    for clean, corrupt, hidden in ((200, 50, 0.75), (1, 1, 0.0), (0, 0, 1.0)):
        test = made(torch.tensor([0, 0]), points([0.0], [0.0]), images=(clean, corrupt)).test
        assert test.hidden_ink().tolist() == [hidden] * 2


class Stripes:
    """A set whose images of class c are grey, brighter with c, and a little different from each other."""

    num_digits, tile = 1, 4
    labels = torch.arange(300) % 5

    def __len__(self):
        return len(self.labels)

    def images(self, rows):
        return (40 * self.labels[rows] + 10 + rows % 3).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)


class Brightness(torch.nn.Module):
    """Embeds an image as the point of its mean brightness."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return GaussianMixtureEmbedding(images.double().mean((1, 2, 3))[:, None, None] * self.weight.double(), None)


def test_a_and_b_separate_the_distances_of_pairs():
    a, b = fit_match(Brightness(), Stripes(), 0.0).values()
    assert 2 < b / a < 38  # images of a class are at most 2 apart, of two classes at least 38
    assert fit_match(Brightness(), Stripes(), 0.0).values() == (a, b)
    occluded, _ = fit_match(Brightness(), Stripes(), 1.0).values()
    assert occluded < a / 2  # occluded images of a class scatter


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
@pytest.mark.parametrize("variance", [1e-18, 1e-12, 1e-9, 1e-5, 4.0])
@pytest.mark.parametrize("a", [0.1, 30.0])
def test_the_expected_sigmoid_is_exact_unless_told_otherwise(dim, variance, a):
    mean = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)[:, None].expand(-1, dim) / dim**0.5
    spread = torch.full_like(mean, variance)
    found = expected_sigmoid(mean, spread, a, 1.0)
    torch.testing.assert_close(found, expected_sigmoid(mean, spread, a, 1.0, 1e-12), atol=3e-9, rtol=0)
    if variance < 1e-8:  # as a point
        near = torch.sigmoid(1 - a * mean.norm(dim=1))
        torch.testing.assert_close(found[1:], near[1:], atol=30 * variance + 1e-11, rtol=0)


def test_a_narrow_gaussian_bends_the_sigmoid_along_and_across():
    mean, variance = (torch.tensor([values], dtype=torch.float64) for values in ([0.6, 0.8], [4e-8, 1e-8]))
    p = 1 / (1 + math.exp(-0.5))  # a = 1.5, b = 2, length 1
    slope, curvature = -1.5 * p * (1 - p), 2.25 * p * (1 - p) * (1 - 2 * p)
    along = 0.36 * 4e-8 + 0.64 * 1e-8
    bent = (along * curvature + (5e-8 - along) * slope) / 2
    assert float(expected_sigmoid(mean, variance, 1.5, 2.0)) - p == pytest.approx(bent, rel=1e-5)
    wider = [float(expected_sigmoid(mean, variance * scale, 1.5, 2.0)) - p for scale in (1.5, 20)]
    assert wider == pytest.approx([1.5 * bent, 20 * bent], rel=2e-3)  # by expansion, and by quadrature


def test_a_gaussian_many_deviations_from_the_origin_is_not_nan():
    line = torch.full((1, 1), 10.0, dtype=torch.float64)
    line = expected_sigmoid(line, torch.full_like(line, 1e-9), 300.0, 3000.2)
    for dim in (3, 10):
        mean = torch.full((1, dim), 10 / dim**0.5, dtype=torch.float64)
        found = expected_sigmoid(mean, torch.full_like(mean, 1e-9), 300.0, 3000.2)
        torch.testing.assert_close(found, line, atol=1e-7, rtol=0)


def test_devices_and_precisions(monkeypatch):
    assert str(make_fabric("cpu").strategy.precision.precision) == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert make_fabric("cpu").device.type == "cpu"


def test_the_divergence_of_a_mixture_is_the_bound_by_its_components():
    """Two Gaussians per image, of variance 1, one of them 2 away from the prior: (0 + 4/2) / 2 nats."""
    embedding = GaussianMixtureEmbedding(
        torch.tensor([[[0.0, 0.0], [2.0, 0.0]]] * 4, dtype=torch.float64), torch.zeros(4, 2, 2, dtype=torch.float64)
    )
    found = made(torch.tensor([0, 0, 1, 1]), embedding).divergence()
    assert found == {"kl_clean": pytest.approx(1.0), "kl_corrupt": pytest.approx(1.0)}


def test_defaults_are_the_paper_s_protocol():
    """10,000 images, pairs and queries; tau over 20 bins; eight samples of an image."""
    asked = inspect.signature(TestSet.of).parameters
    assert [asked[name].default for name in ("images", "pairs", "queries")] == [10_000] * 3
    assert inspect.signature(Evaluation.tau).parameters["bins"].default == 20
    assert MCInfoNCELoss().samples == Training().samples == 8


@pytest.mark.parametrize("variance, told", ((10.0, True), (5.0, False)))
def test_a_start_at_which_no_image_matches_itself_is_told(caplog, variance, told):
    """With a = b = 1, eta is 0.970 at a variance of 10 in all, 0.897 at 5; the bound is 0.95."""
    training = replace(Training(), dim=4, logvar_bias=math.log(variance / 4))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("hib-ndigit-mnist").propagate = True
        _warn_if_hopeless(training)
    assert ("matches itself" in caplog.text) == told


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
def test_an_exact_match_probability_has_its_embedding_s_precision(dtype):
    """But at least float32."""
    embedding = GaussianMixtureEmbedding(torch.zeros(2, 1, 2, dtype=dtype), torch.zeros(2, 1, 2, dtype=dtype))
    found = MatchProbability(1.0, 1.0).prob(embedding, embedding, method="quadrature")
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("part", ["mu", "logvar"])
def test_an_embedding_that_is_no_number_has_no_match_probability(dim, part):
    values = {name: torch.randn(2, 1, dim) for name in ("mu", "logvar")}
    values[part][0, 0, 0] = torch.nan
    embedding = GaussianMixtureEmbedding(values["mu"], values["logvar"])
    with pytest.raises(ValueError, match="expected finite means, and finite variances of 0 or more"):
        MatchProbability(20.0, 50.0).self_mismatch(embedding, method="quadrature")
    with pytest.raises(ValueError, match="expected finite means"):
        expected_sigmoid(torch.zeros(1, dim), -torch.ones(1, dim), torch.tensor(1.0), torch.tensor(1.0))


def test_nothing_matches_nothing():
    embedding = GaussianMixtureEmbedding(torch.zeros(3, 1, 2), torch.zeros(3, 1, 2))
    assert MatchProbability(1.0, 1.0).pairwise(embedding, embedding[:0], method="quadrature").shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_only_bytes_are_scaled(dtype):
    assert to_unit(torch.tensor([255], dtype=torch.uint8)) == 1
    with pytest.raises(TypeError, match="expected uint8, or floating-point values"):
        to_unit(torch.tensor([255], dtype=dtype))


@pytest.mark.parametrize("tolerance", (0.0, 0.11))
def test_a_tolerance_that_cannot_be_met_or_means_nothing_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a value in"):
        expected_sigmoid(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(1.0), torch.tensor(1.0), tolerance)
