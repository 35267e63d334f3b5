"""What the adversary reports on few updates and scores, with the answer that a pencil gives."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability import evaluate
from fl_linkability.data.bundle import NOTHING
from fl_linkability.evaluate import Adversary, macro_ap, mean_utility, user_resamples, weighted_ap
from fl_linkability.linkage import matching_metrics, open_world_metrics
from fl_linkability.settings import Settings


@pytest.fixture
def adversary(store_of):
    """Three users of two devices; each device answers in the rounds 0 and 1."""
    rows = [(number, device, device // 2, device % 2) for number in (0, 1) for device in range(6)]
    return Adversary(store_of(rows), 3, 4, Settings(layers="all"))


def given(monkeypatch, scores):
    monkeypatch.setattr(Adversary, "scores", lambda self, split: np.array(scores, float))


def test_reidentification_by_hand(adversary, monkeypatch):
    """Probes of the users 0, 1, 2, 0, 1, 2: the fourth is taken for user 1, and the others are found."""
    scores = [[9, 1, 1], [1, 8, 1], [1, 1, 9], [3, 7, 1], [1, 9, 2], [2, 1, 8]]
    given(monkeypatch, scores)
    metrics, details = adversary.reid()
    assert metrics["mAP_macro"] == 100  # in each user's column the own probes come first: 9 and 8 lie above the 7
    assert metrics["top1"] == pytest.approx(500 / 6)
    assert metrics["top5"] == 100 and metrics["known_users"] == 3 and metrics["auc_macro"] == 100
    assert metrics["times_chance_ap"] == pytest.approx(3)
    assert metrics["log2_times_chance"] == pytest.approx(math.log2(3))
    assert metrics["times_chance_top1"] == pytest.approx(2.5)
    assert metrics["log2_top1"] == pytest.approx(math.log2(5 / 6))
    assert metrics["floor"] < metrics["floor_q99"] <= 3
    assert metrics["above_floor"] == pytest.approx(3 - metrics["floor_q99"])
    assert metrics["AP_micro"] == pytest.approx(100 * (5 + 6 / 7) / 6)  # of all pairs only the 7 is wrong
    assert details["users"] == {"ap": [1, 1, 1], "top1": [0.5, 1, 1], "probes": [2, 2, 2]}


def test_a_user_without_probes_has_no_value_and_no_hit_at_all_has_a_logarithm(adversary, monkeypatch):
    adversary.n_users = 5
    given(monkeypatch, [[1, 2, 2], [2, 1, 2], [2, 2, 1]] * 2)
    metrics, details = adversary.reid()
    assert metrics["top1"] == 0 and metrics["log2_top1"] == pytest.approx(math.log2(0.5 / 6))
    assert details["users"]["probes"] == [2, 2, 2, None, None] and details["users"]["ap"][3:] == [None, None]


def test_the_controls_and_the_known_rounds(adversary):
    plain = adversary.closed_split()
    assert plain.aux.tolist() == [0, 2, 4, 6, 8, 10] and plain.probe.tolist() == [1, 3, 5, 7, 9, 11]
    permutation = np.random.default_rng([4, 9]).permutation(3)
    assert permutation.tolist() != [0, 1, 2]
    for control, aux, probe in (
        ("permuted-labels", permutation[[0, 1, 2] * 2], [0, 1, 2] * 2),
        ("permuted-devices", [0, 1, 2] * 2, permutation[[0, 1, 2] * 2]),
    ):
        split = Adversary(adversary.store, 3, 4, Settings(control=control)).closed_split()
        assert split.aux_labels.tolist() == list(aux) and split.probe_labels.tolist() == list(probe)
    few = Adversary(adversary.store, 3, 4, Settings(deltas_per_user=1)).closed_split()
    assert few.aux.tolist() == [0, 2, 4] and few.aux_labels.tolist() == [0, 1, 2] and len(few.probe) == 6
    later = Adversary(adversary.store, 3, 4, Settings(aux_until=1)).closed_split()
    assert later.aux.tolist() == [0, 2, 4] and later.probe.tolist() == [7, 9, 11]


def test_all_devices_are_matched_by_their_means(adversary, monkeypatch):
    """Devices 0 and 1, 2 and 3 point the same way; 4 and 5 do not, and 5 looks like 0."""
    directions = np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1], [1, 0, 0.4]])
    monkeypatch.setattr(Adversary, "features", np.concatenate([directions, directions]))
    metrics, details = adversary.all_pairs()
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    scores = unit[::2] @ unit[1::2].T
    ranked = np.argsort(-scores.ravel())
    same = np.eye(3, dtype=bool).ravel()[ranked]
    hits = np.cumsum(same) / np.arange(1, 10)
    assert metrics["matching_ap"] == pytest.approx(100 * hits[same].mean())
    assert metrics["times_prevalence"] == pytest.approx(3 * hits[same].mean()) and metrics["assigned"] == 100
    above = sum(1 for i in np.flatnonzero(same) for j in np.flatnonzero(~same) if i < j)
    assert metrics["matching_auc"] == pytest.approx(100 * above / 18)
    assert metrics["tpr_at_1"] == pytest.approx(100 * np.cumprod(same).sum() / 3)
    for number, count in enumerate(user_resamples(3, 4)):  # a pair of one user counts as often as the user is drawn
        weight = np.where(np.eye(3, dtype=bool), count, np.outer(count, count)).ravel()[ranked]
        precision = np.cumsum(weight * same) / np.maximum(np.cumsum(weight), 1)
        drawn = (precision * weight)[same].sum() / weight[same].sum() if weight[~same].any() else None
        for name, unit in (("matching_ap", 100), ("times_prevalence", 3)):
            found = details["replicates"][name][number]
            assert found is None if drawn is None else found == pytest.approx(unit * drawn, abs=0.005)
    assert len(details["replicates"]["matching_ap"]) == evaluate.REPLICATES


def test_the_protocol_gathers_all_measurements(adversary, monkeypatch):
    perfect = 10 * np.eye(3)
    monkeypatch.setattr(Adversary, "features", np.concatenate([np.repeat(np.eye(3), 2, 0)] * 2))
    monkeypatch.setattr(Adversary, "scores", lambda self, split: perfect[:, : len(split.known)][_columns(split)])
    metrics, details = adversary.protocol()
    assert metrics["mAP_macro"] == metrics["matching_ap"] == metrics["open_auroc"] == metrics["dir_at_10"] == 100
    assert metrics["same_device_top1"] == 100
    assert details["users"]["same_device_top1"] == [1, 1, 1] and details["users"]["same_device_probes"] == [1, 1, 1]
    opened, more = adversary.open()
    assert opened == {"open_auroc": 100, "dir_at_1": 100, "dir_at_10": 100}
    assert set(more["replicates"]) == set(opened) and len(more["replicates"]["dir_at_1"]) == evaluate.REPLICATES


def _columns(split):
    """The row of perfect scores for each probe; who is not known resembles nobody, as the third of two known."""
    return np.where(split.probe_labels < 0, 2, split.probe_labels)


def test_balanced_pairs_are_scored_and_weighted_by_their_users(adversary, monkeypatch):
    """One pair in ten of one user scores low, all others high: the pairs of two users lie between."""
    n = 10
    rows_a, rows_b = (
        np.array([0, 2, 4, 0, 2, 4, 0, 2, 4, 0] * 2),
        np.array([1, 3, 5, 1, 3, 5, 1, 3, 5, 1] + [3, 5, 1] * 3 + [3]),
    )
    same = np.arange(2 * n) < n
    scores = np.where(same, 3.0, 2.0)
    scores[0] = 1
    monkeypatch.setattr(evaluate, "split_matching", lambda store, seed: (rows_a, rows_b, same))
    monkeypatch.setattr(evaluate, "pair_scorer", lambda *each: lambda a, b: scores)
    metrics, details = adversary.pairs()
    assert metrics == {"matching_ap": pytest.approx(100 * (9 + 10 / 20) / 10)}
    user_a, user_b = (rows_a // 2) % 3, (rows_b // 2) % 3
    for count, found in zip(user_resamples(3, 4), details["replicates"]["matching_ap"], strict=True):
        own, two = count[user_a][same], (count[user_a] * count[user_b])[~same].sum()
        if not own.any() or not two:
            assert found is None
        else:
            high = own[1:].sum()
            expected = 100 * (high + own[0] * own.sum() / (own.sum() + two)) / own.sum()
            assert found == pytest.approx(expected, abs=0.006)


def test_hits_of_words_and_errors_of_numbers():
    """Seven words, of which the five likeliest are tried; what is not asked does not count."""

    class Given(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.outputs = nn.Parameter(outputs)

        def forward(self, x):
            return self.outputs[x.long().flatten()]

    ranked = torch.arange(7.0).expand(2, 3, 7)  # word 6 is the likeliest, words 0 and 1 are not tried
    model, x = Given(ranked), torch.tensor([[0.0], [1.0]])
    words = torch.tensor([[6, 2, 1], [1, NOTHING, 5]])
    hits, count = evaluate._points(model, dict(model.named_parameters()), x, words)
    assert hits.tolist() == [2, 1] and count.tolist() == [3, 2] and hits.dtype == torch.float64
    model = Given(torch.tensor([1.5, -2.0]))
    hits, count = evaluate._points(model, dict(model.named_parameters()), x, torch.tensor([1.0, 2.0]))
    assert hits.tolist() == [0.5, 4] and count.tolist() == [1, 1]
    model = Given(torch.tensor([[0.0, 1.0], [3.0, 1.0]]))
    hits, count = evaluate._points(model, dict(model.named_parameters()), x, torch.tensor([1, 1]))
    assert hits.tolist() == [1, 0] and count.tolist() == [1, 1]


def test_matching_by_hand():
    """Of four pairs the two of one user have 4 and 2: the others have 3 and 1."""
    found = matching_metrics(np.array([[4.0, 3], [1, 2]]), np.array([7, 9]), np.array([7, 9]))
    assert found == {
        "AP": pytest.approx((1 + 2 / 3) / 2), "AUC": 0.75, "prevalence": 0.5, "times_prevalence": pytest.approx(5 / 3),
        "tpr_at_fpr_0p01": 0.5, "tpr_at_fpr_0p1": 0.5, "assignment_accuracy": 1,
    }  # fmt: skip
    alone = matching_metrics(np.array([[4.0, 3], [1, 2]]), np.array([7, 9]), np.array([1, 2]))
    assert alone.keys() == found.keys() and (alone["prevalence"], alone["assignment_accuracy"]) == (0, 0)
    assert all(math.isnan(alone[name]) for name in set(found) - {"prevalence", "assignment_accuracy"})
    with pytest.raises(ValueError, match="labels must lie in -1 .. 1, got -2 .. 0"):
        open_world_metrics(np.ones((2, 2)), np.array([0, -2]))
    no_stranger = open_world_metrics(np.eye(2), np.array([0, 1]), far=(0.1,))["dir_at_far_0.1"]
    assert all(math.isnan(no_stranger[name]) for name in ("tau", "far", "dir"))


def test_averages_of_utility():
    points = [
        {"user": 50.0, "population": 40.0, "by_user": [1.0, 2.0]},
        {"user": 60.0, "population": 50.0, "by_user": [2.0, 4.005]},
    ]
    metrics, details = mean_utility(points)
    assert metrics == {"user_accuracy": 55, "population_accuracy": 45} and details["user_accuracy"] == [1.5, 3.0]
    del points[0]["by_user"]
    assert mean_utility(points)[1] == {"user_accuracy": []}
    assert math.isnan(macro_ap(np.ones((2, 2)), np.zeros((2, 2))))
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.2, 0.7]])
    assert macro_ap(scores, np.array([[0, 0, 0], [1, 1, 0], [1, 0, 0]])) == pytest.approx(
        100 * ((1 / 2 + 2 / 3) / 2 + 1) / 2
    )


def test_resamples_of_users():
    counts = user_resamples(5, 3, 50)
    assert counts.shape == (50, 5) and (counts.sum(1) == 5).all() and 0 in counts and 2 in counts
    assert (counts == user_resamples(5, 3, 50)).all() and (counts != user_resamples(5, 4, 50)).any()
    assert len(user_resamples(5, 3)) == 200
    same, scores = np.array([True, False, True, False]), np.array([4.0, 3, 2, 1])
    assert weighted_ap(same, scores, np.array([1, 3, 1, 9])) == pytest.approx((1 + 2 / 5) / 2)
    assert math.isnan(weighted_ap(same, scores, np.array([0, 3, 0, 9])))
    assert math.isnan(weighted_ap(same, scores, np.array([1, 0, 1, 0])))
