"""The protocol of section 4 on test sets whose answers are known, and what a training step draws."""

from dataclasses import replace

import pytest
import torch

from hib_ndigit_mnist import HedgedHead, VIBPairLoss, accuracy_rejection_area, ood_auroc, r_auroc, recall_at_1
from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.evaluate import Evaluation, TestSet
from hib_ndigit_mnist.experiments import execute
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.models import MLPEncoder
from hib_ndigit_mnist.pairs import verification_pairs
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import _Run

SIZES = {"total_train": 1080, "total_test": 450, "min_per_number": 10}


@pytest.fixture(scope="module")
def sets():
    return ndigit_sets("digits", 1, "instance", ".", **SIZES)


def evaluation(clean, corrupt, labels, logvar=None, match=None, pairs=None):
    """One of images that are embedded at given places (n, D)."""
    blank = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    test = TestSet({"clean": blank, "corrupt": blank}, labels, None, pairs, torch.arange(len(labels)))
    found = Evaluation(MLPEncoder(), match or MatchProbability(2.0, 3.0), test, nearest_k=1)
    variances = [None, None] if logvar is None else [torch.full_like(clean, v)[:, None] for v in logvar]
    places = {"clean": clean, "corrupt": corrupt}.items()
    found.__dict__["embeddings"] = {
        name: GaussianMixtureEmbedding(place[:, None].double(), None if v is None else v.double())
        for (name, place), v in zip(places, variances, strict=True)
    }
    return found


def test_no_query_meets_its_own_image_in_any_gallery():
    """Pairs of neighbours belong to different classes: only an image's own twin would be right."""
    where = torch.stack([torch.arange(8.0) // 2 * 10 + torch.arange(8.0) % 2, torch.zeros(8)], 1)
    found = evaluation(where, where + 0.1, torch.arange(8) % 2)
    assert found.identification() == {"knn_clean": 0.0, "knn_corrupt": 0.0, "knn_corrupt_same": 0.0}


def test_the_gallery_is_of_the_condition_that_is_said():
    labels = torch.tensor([0, 0, 1, 1])
    clean = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]])
    corrupt = torch.tensor([[10.0, 0.5], [0.0, 0.5], [0.6, 0.5], [11.0, 0.5]])  # of images 0 and 2 moved to the others
    found = evaluation(clean, corrupt, labels).identification()
    assert found == {"knn_clean": 1.0, "knn_corrupt": 0.5, "knn_corrupt_same": 0.0}


def test_a_small_class_is_asked_for_as_many_neighbours_as_it_has():
    labels = torch.tensor([0] * 2 + [1] * 9)
    where = torch.stack([labels * 10.0, torch.arange(11.0) / 100], 1)
    found = evaluation(where, where, labels)
    found.k = 5
    assert found.identification() == {"knn_clean": 1.0, "knn_corrupt": 1.0, "knn_corrupt_same": 1.0}


def test_pairs_are_scored_within_a_condition():
    pairs = torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([True, False])
    clean, moved = (
        torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]),
    )
    found = evaluation(clean, moved, torch.tensor([0, 0, 1]), pairs=pairs)
    assert found.verification() == {"ap_clean": 1.0, "ap_corrupt": 0.5, "positive_rate": 0.5}


def test_average_precision_is_binned_by_the_eta_of_the_first_image():
    generator = torch.Generator().manual_seed(0)
    labels, n = torch.arange(400) % 2, 4000
    first = torch.randint(200, (n,), generator=generator)  # images 0 .. 199 are the first, the others the second ones
    second = 200 + torch.randint(200, (n,), generator=generator)
    match = labels[first] == labels[second]
    found = evaluation(torch.zeros(400, 2), torch.zeros(400, 2), labels, pairs=(first, second, match))
    eta = torch.cat([torch.linspace(0, 1, 200), torch.linspace(1, 0, 200)])
    found.__dict__["eta"] = {"corrupt": eta}
    right = torch.rand(n, generator=generator) > eta[first]
    found.__dict__["pair_scores"] = {"corrupt": torch.where(right, match.double(), torch.rand(n, generator=generator))}
    assert found.tau("corrupt", "ap").tau > 0.8


def test_eta_that_is_larger_on_corrupted_images_has_an_auc_of_one():
    pairs = verification_pairs(torch.arange(40) // 2 % 10, 400)
    where = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    match = MatchProbability(2.0, 5.0)
    found = evaluation(where, where, torch.arange(40) // 2 % 10, (-6.0, 1.0), match, pairs)
    found.test.__dict__["hidden_ink"] = lambda: torch.rand(40)
    assert found.uncertainty()["auc"] == 1.0
    spread = found.spread()
    assert spread["sigma_corrupt"] == pytest.approx(torch.tensor(0.5).exp().item())
    assert spread["sigma_over_margin"] == pytest.approx(spread["sigma_corrupt"] / (5.0 / 2.0), rel=1e-5)
    assert spread["sigma_ratio"] == pytest.approx(torch.tensor(3.5).exp().item())


def test_every_digit_of_a_corrupted_test_image_is_occluded(sets):
    test = TestSet.of(sets["test"])
    assert test.occluders.occluded.all() and test.occluders.side.unique().tolist() == list(range(9))
    clean, corrupt = (test.images[c].double().mean() for c in ("clean", "corrupt"))
    assert 0.55 < corrupt / clean < 0.75


def test_training_images_are_occluded_and_a_and_b_have_their_own_rate(sets):
    base = Training(architecture="mlp", hidden=(16,), steps=50, batch=64, lr=1e-3, match_lr=3.0)
    bright = []
    for p in (0.0, 0.5, 1.0):
        run = _Run(sets["train"], [replace(base, occlusion_p=p)], [0], "cpu", False)
        bright.append(float(run._batch(run._draw(1)[0][0])[0].mean()))
    assert bright[0] > bright[1] > bright[2] and 0.5 < bright[2] / bright[0] < 0.8
    run.chunk(1)
    weights, match = run.optimizer.param_groups
    assert match["lr"] == pytest.approx(3 * weights["lr"]) and weights["lr"] == pytest.approx(1e-3)
    assert {id(p) for p in match["params"]} == {id(p) for p in run.stack.match.parameters()}


def test_each_run_is_reported_on_its_own_split(tmp_path):
    base = {"dataset": "digits", "num_digits": 2, "architecture": "mlp", "hidden": [16], "steps": 2, "batch": 16}
    base |= {"total_train": 7560, "total_test": 1350, "min_per_number": 10, "test_pairs": 100, "queries": 100}
    seen, unseen = execute([base | {"split": s} for s in ("test_seen", "test_unseen")], [0, 0], tmp_path, "cpu")
    assert seen.metrics != unseen.metrics
    assert seen.dataset["test_images"] == 1330 and unseen.dataset["test_images_per_class"] == [45, 45]
    assert seen.precision == "32-true" and not seen.caveats


def test_what_an_uncertainty_knows():
    """Fixtures by hand, to the definitions of the URL benchmark."""
    features = torch.tensor(
        [[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [0.1, 1.0], [-1.0, 0.0]]
    )  # cosine: length is no matter
    assert recall_at_1(features, torch.tensor([0, 0, 1, 1, 2])).tolist() == [True, True, True, True, False]
    assert recall_at_1(features[:1], torch.tensor([0])).tolist() == [False]  # there is no other image
    uncertainty, correct = torch.tensor([0.4, 0.1, 0.2, 0.3]), torch.tensor([True, True, True, False])
    assert accuracy_rejection_area(uncertainty, correct) == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)
    assert r_auroc(uncertainty, correct) == pytest.approx(2 / 3)  # two of three right ones are more certain
    assert accuracy_rejection_area(torch.zeros(4), correct) == pytest.approx(0.75)
    assert r_auroc(torch.zeros(4), correct) == 0.5 and r_auroc(uncertainty, torch.ones(4)) != r_auroc(
        uncertainty, correct
    )
    assert ood_auroc(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4])) == 0.75
    for wrong in (accuracy_rejection_area, r_auroc):
        with pytest.raises(ValueError, match="1 of 4 are NaN"):
            wrong(torch.tensor([0.1, float("nan"), 0.2, 0.3]), correct)


@pytest.mark.parametrize("options", [{}, {"components": 3}, {"point": True}])
def test_a_head_hedges_any_backbone(options):
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    head, loss = HedgedHead(8, dim=16, **options), VIBPairLoss(samples=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = head(backbone(torch.rand(6, 3, 12, 12)))
    assert embedding.mu.dtype == torch.float32 and embedding.mu.shape == (6, options.get("components", 1), 16)
    loss(embedding, torch.arange(6) // 2).loss.backward()
    assert head.weight.grad.abs().sum() > 0 and backbone[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"expected \(B, 8\)"):
        head(torch.rand(6, 9))
