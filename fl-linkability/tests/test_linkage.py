"""Metrics against their slow definitions; attacks; splits; nothing but the features reaches an attack."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from fl_linkability import neural_attacks
from fl_linkability.attacks import IDENTIFY, MATCH, identify, match, pair_scorer
from fl_linkability.features import device_means, leave_one_out, unit
from fl_linkability.linkage import (
    ap_by_group,
    identification_metrics,
    matching_metrics,
    open_world_metrics,
    permuted_device_chance,
    top_k_hits,
)
from fl_linkability.neural_attacks import mlp_probabilities
from fl_linkability.splits import balanced_pairs, split_closed, split_matching, split_open, split_same_device
from fl_linkability.store import UpdateStore


@pytest.mark.parametrize("attack", MATCH)
def test_pairs_of_updates_that_are_not_finite_are_refused(attack):
    a = np.array([[1.0, np.nan]])
    with pytest.raises(ValueError, match="features must be finite"):
        match(a, np.ones((2, 2)), attack, np.eye(2), np.arange(2))


@st.composite
def tied_scores(draw):
    n, users = draw(st.integers(2, 30)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, draw(st.integers(1, 8)), (n, users)).astype(float), rng.integers(0, users, n)


@settings(deadline=None, max_examples=60)
@given(tied_scores())
def test_ap_and_hits_are_the_definitions(case):
    scores, labels = case
    users = scores.shape[1]
    table = ap_by_group(scores, labels, users)
    for user in range(users):
        for group in range(users):
            if (labels == group).any():
                expected = average_precision_score(labels == group, scores[:, user])
                assert table[user, group] == pytest.approx(expected, abs=1e-12)
            else:
                assert np.isnan(table[user, group])
    rng = np.random.default_rng(0)
    wins = np.zeros(len(labels))
    for _ in range(400):  # random tie-breaking
        order = np.lexsort((rng.random(scores.shape), -scores), axis=1)
        wins += order[:, 0] == labels
    assert np.abs(wins / 400 - top_k_hits(scores, labels, 1)).max() < 0.15


@settings(deadline=None, max_examples=30)
@given(tied_scores(), st.integers(0, 99))
def test_renaming_users_and_reordering_probes_changes_nothing(case, seed):
    scores, labels = case
    rng = np.random.default_rng(seed)
    columns, rows = rng.permutation(scores.shape[1]), rng.permutation(len(labels))
    renamed = np.argsort(columns)[labels]
    a, b = identification_metrics(scores, labels), identification_metrics(scores[rows][:, columns], renamed[rows])
    for name in ("top1", "top5", "mAP_macro", "AP_micro", "times_chance_ap"):
        assert a[name] == pytest.approx(b[name], abs=1e-12)


def test_floor_is_the_mean_over_permutations():
    rng = np.random.default_rng(1)
    owner = rng.permutation(5)
    device = np.repeat(np.arange(5), 6)
    scores = rng.normal(size=(30, 5))
    mean, q99 = permuted_device_chance(scores, owner[device], 10 + device, n=2000)
    slow = []
    for _ in range(600):
        labels = rng.permutation(owner)[device]
        slow.append(np.mean([average_precision_score(labels == u, scores[:, u]) for u in range(5)]) * 5)
    assert mean == pytest.approx(np.mean(slow), abs=0.05) and q99 == pytest.approx(np.quantile(slow, 0.99), abs=0.12)
    doubled = np.repeat(np.arange(10), 3)  # two devices per user take the general way
    mean, _ = permuted_device_chance(scores, np.repeat(owner, 2)[doubled], doubled, n=20)
    assert 0.8 < mean < 3
    with pytest.raises(ValueError, match="devices: the probes of a device must all belong to one user"):
        permuted_device_chance(scores, owner[device], np.zeros(30, int))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_dir_is_the_definition(seed, rate):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, (25, 4)) * 1.0, rng.integers(-1, 4, 25)
    if (labels >= 0).all() or (labels < 0).all():
        return
    found = open_world_metrics(scores, labels, far=(rate,))[f"dir_at_far_{rate}"]
    best = scores.max(1)
    taus = [tau for tau in [*sorted(best), np.inf] if np.mean(best[labels < 0] >= tau) <= rate]
    passed = (scores.argmax(1) == labels) & (best >= taus[0])
    assert found["tau"] == taus[0] and found["dir"] == pytest.approx(passed[labels >= 0].mean())


def test_what_is_not_defined_is_nan():
    scores = np.random.default_rng(0).normal(size=(6, 3))
    assert np.isnan(identification_metrics(scores, np.array([0] * 6))["ap_per_user"][1:]).all()
    assert np.isnan(identification_metrics(scores, np.zeros(6, int))["auc_macro"])
    assert np.isnan(open_world_metrics(scores, np.zeros(6, int))["auroc"])
    assert np.isnan(matching_metrics(scores[:3], np.arange(3), np.arange(3, 6))["AP"])


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        (np.zeros((3, 2)), np.array([0, 1]), "labels must be 3 integers, got"),
        (np.zeros((2, 2)), np.array([0, 2]), "labels must lie in 0 .. 1, got 0 .. 2"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "integers"),
        (np.array([[0.0, np.nan]]), np.array([0]), "scores must not be NaN"),
        (np.zeros((0, 2)), np.zeros(0, int), "not empty, got"),
    ],
)
def test_wrong_scores_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        identification_metrics(scores, labels)
    with pytest.raises(ValueError, match=r"scores must be \(2, 2\), got \(2, 3\)"):
        matching_metrics(np.zeros((2, 3)), [0, 1], [0, 1])
    with pytest.raises(ValueError, match="scores must not be NaN"):
        matching_metrics(np.full((2, 2), np.nan), [0, 1], [0, 1])


# ---- features, attacks -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 999))
def test_centring_is_its_definition_and_zero_stays_zero(n, rounds, seed):
    rng = np.random.default_rng(seed)
    deltas, number = rng.normal(size=(n, 3)), rng.integers(0, rounds, n)
    found = leave_one_out(deltas, number)
    for i in range(n):
        others = (number == number[i]) & (np.arange(n) != i)
        assert np.allclose(found[i], deltas[i] - (deltas[others].mean(0) if others.any() else 0))
    assert (unit(np.zeros((2, 3))) == 0).all()
    means, ids = device_means(deltas, number)
    assert np.allclose(means, [deltas[number == d].mean(0) for d in ids])


def blobs(seed=0, users=6, each=14, spread=0.25, d=12):
    """Users as directions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(users, d))
    labels = np.repeat(np.arange(users), each)
    return unit(centres[labels] + spread * rng.normal(size=(len(labels), d))), labels


@pytest.mark.parametrize("attack", sorted(set(IDENTIFY) - {"chance"}))
def test_every_attack_finds_what_is_there_and_not_what_is_not(attack):
    x, labels = blobs()
    aux, probe = np.arange(len(x)) % 2 == 0, np.arange(len(x)) % 2 == 1
    found = identification_metrics(identify(x[aux], labels[aux], x[probe], attack), labels[probe])
    assert found["top1"] > 0.9 and found["times_chance_ap"] > 5
    shuffled = np.random.default_rng(0).permutation(labels[aux])
    assert identification_metrics(identify(x[aux], shuffled, x[probe], attack), labels[probe])["mAP_macro"] < 0.6


def test_chance_is_chance():
    x, labels = blobs()
    found = identification_metrics(identify(x, labels, x, "chance"), labels)
    assert found["top1"] == pytest.approx(1 / 6) and found["times_chance_ap"] == pytest.approx(1)


@pytest.mark.parametrize("attack", sorted(IDENTIFY))
def test_scores_do_not_depend_on_the_order_of_probes(attack):
    x, labels = blobs(spread=1.0)
    order = np.random.default_rng(3).permutation(len(x))
    assert np.allclose(identify(x, labels, x, attack, 1)[order], identify(x, labels, x[order], attack, 1), atol=1e-6)


def test_two_users_and_one():
    x, labels = blobs(users=2)
    for attack in ("paper-svm", "logreg", "paper-svm-votes"):
        assert identification_metrics(identify(x, labels, x, attack), labels)["top1"] == 1
    assert (identify(x, np.zeros(len(x), int), x, "paper-mlp") == 1).all()


def test_mlp_gradient_against_autograd():
    import torch

    x, labels = blobs(spread=1.0)
    ours = mlp_probabilities(x, labels, 6, seed=5, epochs=2, batch_size=16)(x)
    generator = torch.Generator().manual_seed(5)

    def layer(inputs, outputs):
        weight = (2 * torch.rand(inputs, outputs, generator=generator) - 1) * (6 / (inputs + outputs)) ** 0.5
        return weight.requires_grad_(), torch.zeros(outputs, requires_grad=True)

    params = [*layer(12, 128), *layer(128, 6)]
    inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    step = 0
    for _ in range(2):
        order = torch.randperm(len(x), generator=generator)
        kept = (torch.rand(len(x), 128, generator=generator) >= 0.2) / 0.8
        for number, rows in enumerate(order.split(16)):
            hidden = (inputs[rows] @ params[0] + params[1]).relu() * kept[16 * number : 16 * number + len(rows)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(hidden @ params[2] + params[3], targets[rows]).backward()
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + 1e-6 * step)
            optimizer.step()
            step += 1
    expected = ((inputs @ params[0] + params[1]).relu() @ params[2] + params[3]).softmax(1).detach()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", sorted(set(MATCH) - {"chance"}))
def test_matching_attacks(attack):
    x, labels = blobs(spread=0.1)
    scores = match(x[::2], x[1::2], attack, x, labels)
    same = labels[::2, None] == labels[1::2]
    assert average_precision_score(same.ravel(), scores.ravel()) > 0.8
    assert np.allclose(scores[3], pair_scorer(attack, x, labels)(np.tile(x[6], (len(x) // 2, 1)), x[1::2]), atol=1e-6)


def test_wrong_arguments_of_attacks():
    x, labels = blobs()
    for arguments, message in (
        ((x, labels, x, "nearest"), "attack must be one of paper-knn"),
        ((x, labels, x[:, :3], "centroid"), "needed"),
        ((x, labels + 1, x, "centroid"), "each of 0 .. n_known - 1"),
        ((x, labels, np.full_like(x, np.nan), "centroid"), "features must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            identify(*arguments)
    with pytest.raises(ValueError, match="attack must be one of paper-mlp"):
        pair_scorer("nearest", x, labels)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 6), st.integers(0, 999))
def test_pairs_are_balanced_and_true(users, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, users, 20), np.append(rng.integers(0, users, 20), np.arange(users))
    (same_a, other_a), (same_b, other_b) = balanced_pairs(a, b, 15, rng)
    assert (a[same_a] == b[same_b]).all() and (a[other_a] != b[other_b]).all() and len(other_a) == 15
    with pytest.raises(ValueError, match="a user in both sets"):
        balanced_pairs(np.zeros(3, int), np.ones(3, int), 2, rng)


def test_within_one_set_no_update_is_paired_with_itself():
    users = np.array([0, 0, 0, 1, 1, 2])  # the third user has a single update
    (same_a, other_a), (same_b, other_b) = balanced_pairs(users, users, 400, np.random.default_rng(0), one_set=True)
    assert (same_a != same_b).all() and (users[same_a] == users[same_b]).all() and 2 not in users[same_a]
    assert (users[other_a] != users[other_b]).all()
    assert {(a, b) for a, b in zip(same_a, same_b, strict=True) if a == 0} == {(0, 1), (0, 2)}
    with pytest.raises(ValueError, match="a user with two updates"):
        balanced_pairs(np.arange(4), np.arange(4), 3, np.random.default_rng(0), one_set=True)


def test_the_siamese_network_learns_from_pairs_of_different_updates(monkeypatch):
    seen = []
    original = neural_attacks.balanced_pairs

    def spy(*arguments, **options):
        pairs = original(*arguments, **options)
        seen.append(pairs[0][0] != pairs[1][0])
        return pairs

    monkeypatch.setattr(neural_attacks, "balanced_pairs", spy)
    x, labels = blobs()
    neural_attacks.siamese(x, labels, seed=0, steps=3)
    assert seen[0].all()


# ---- splits ----------------------------------------------------------------------------------------------------


def small_store():
    store = UpdateStore({"fc": (0, 2)})
    for number in range(6):
        device = np.arange(8)
        store.append(np.ones((8, 2)), round=number, device=device, user=device // 2, role=device % 2, n_examples=3)
    return store


def test_splits():
    store = small_store()
    user, role, number = (store.column(name) for name in ("user", "role", "round"))
    split = split_closed(store, (0, 3), (3, None))
    assert (role[split.aux] == 0).all() and (number[split.aux] < 3).all() and len(split.aux) == 12
    assert (role[split.probe] == 1).all() and (number[split.probe] >= 3).all()
    assert (split.known[split.probe_labels] == user[split.probe]).all()
    opened = split_open(store, 0.5, seed=1)
    unknown = opened.probe_labels < 0
    assert len(opened.known) == 2 and not np.isin(user[opened.probe[unknown]], opened.known).any()
    tracked = split_same_device(store)
    assert number[tracked.aux].max() < 3 <= number[tracked.probe].min()
    rows_a, rows_b, same = split_matching(store, n_pairs=10)
    assert ((user[rows_a] == user[rows_b]) == same).all() and (role[rows_a] == 0).all() and (role[rows_b] == 1).all()
    with pytest.raises(ValueError, match="no update of a prior device"):
        split_closed(store, (9, None))
    with pytest.raises(ValueError, match="unknown_fraction must lie in"):
        split_open(store, 1.0)


def test_an_unknown_user_s_probes_are_left_out_of_the_closed_world():
    store = UpdateStore({"fc": (0, 2)})
    store.append(np.ones((3, 2)), round=0, device=[0, 1, 3], user=[0, 0, 1], role=[0, 1, 1], n_examples=1)
    assert split_closed(store).known.tolist() == [0] and len(split_closed(store).probe) == 1
