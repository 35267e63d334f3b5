"""The paper's other questions about the same updates: open world, training stage, raw images; and secure aggregation.

Each study takes an `Adversary` (or the data) and returns metrics and details, as the adversary's own methods do.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score

from fl_linkability.attacks import identify, pair_scorer
from fl_linkability.data.bundle import ANONYMOUS, PRIOR, FederatedBundle
from fl_linkability.evaluate import Adversary
from fl_linkability.features import unit
from fl_linkability.linkage import identification_metrics, permuted_device_chance
from fl_linkability.mitigations import group_sums
from fl_linkability.neural_attacks import mlp_probabilities
from fl_linkability.splits import balanced_pairs
from fl_linkability.train import as_input


def _shares(adversary: Adversary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users held out for the attack's training (a third), the seen users, and all users of the other two thirds."""
    order = np.random.default_rng([adversary.seed, 7]).permutation(adversary.n_users)
    held_out, rest = np.split(order, [round(adversary.n_users / 3)])
    return held_out, np.sort(rest[: round(adversary.settings.seen * len(rest))]), rest


def open_reid(adversary: Adversary) -> tuple[dict, dict]:
    """Figure 4, re-identification: a class per seen user and one for "unseen", learned from the held-out third.

    Raises:
        ValueError: no seen user.
    """
    held_out, seen, rest = _shares(adversary)
    if len(seen) == 0:
        raise ValueError("re-identification needs a seen user: seen is too small")
    role, user, device = (adversary.store.column(name) for name in ("role", "user", "device"))
    aux = np.flatnonzero((role == PRIOR) & np.isin(user, np.concatenate([held_out, seen])))
    probe = np.flatnonzero((role == ANONYMOUS) & np.isin(user, rest))
    label = np.where(np.isin(user, seen), np.searchsorted(seen, user), len(seen))
    f = adversary.features
    scores = identify(f[aux], label[aux], f[probe], adversary.settings.attack, adversary.seed)
    found = identification_metrics(scores, label[probe])
    mean, q99 = permuted_device_chance(scores, label[probe], device[probe], n=50)
    times = found["times_chance_ap"]
    metrics = {"mAP_macro": 100 * found["mAP_macro"], "times_chance_ap": times, "floor": mean, "floor_q99": q99}
    return metrics | {"above_floor": times - q99, "seen_users": len(seen)}, {}


def open_matching(adversary: Adversary) -> tuple[dict, dict]:
    """Figure 4, matching: trained on held-out and seen users, tested on balanced pairs of the other two thirds."""
    held_out, seen, rest = _shares(adversary)
    role, user = adversary.store.column("role"), adversary.store.column("user")
    known = np.sort(np.concatenate([held_out, seen]))
    aux = np.flatnonzero((role == PRIOR) & np.isin(user, known))
    score = pair_scorer(
        adversary.settings.attack, adversary.features[aux], np.searchsorted(known, user[aux]), adversary.seed
    )
    a, b = (np.flatnonzero((role == kind) & np.isin(user, rest)) for kind in (PRIOR, ANONYMOUS))
    pairs_a, pairs_b = balanced_pairs(user[a], user[b], 2000, np.random.default_rng([adversary.seed, 8]))
    rows_a, rows_b = a[np.concatenate(pairs_a)], b[np.concatenate(pairs_b)]
    scores = score(adversary.features[rows_a], adversary.features[rows_b])
    ap = average_precision_score(np.arange(len(scores)) < 2000, scores)
    return {"matching_ap": 100 * float(ap), "seen_users": len(seen)}, {}


def stage(adversary: Adversary) -> tuple[dict, dict]:
    """Figure 8: known updates of one fifth of the rounds against probes of another, times chance."""
    parts = 5
    split, rounds = adversary.closed_split(), adversary.store.column("round")
    bounds = np.linspace(0, rounds.max() + 1, parts + 1)
    bucket = np.digitize(rounds, bounds[1:-1])
    matrix = np.full((parts, parts), np.nan)
    for i in range(parts):
        rows = bucket[split.aux] == i
        known, labels = np.unique(split.aux_labels[rows], return_inverse=True)
        asked = np.isin(split.probe_labels, known)
        probe, f = split.probe[asked], adversary.features
        scores = identify(f[split.aux[rows]], labels, f[probe], adversary.settings.attack, adversary.seed)
        targets = np.searchsorted(known, split.probe_labels[asked])
        for j in range(parts):
            part = bucket[probe] == j
            matrix[i, j] = identification_metrics(scores[part], targets[part])["times_chance_ap"]
    metrics = {"stage_lowest": float(matrix.min()), "stage_highest": float(matrix.max())}
    metrics["stage_ratio"] = metrics["stage_highest"] / metrics["stage_lowest"]
    return metrics, {"matrix": matrix.round(2).tolist(), "rounds": bounds.round().astype(int).tolist()}


def groups(adversary: Adversary) -> tuple[dict, dict]:
    """Secure aggregation: is the best match of a sum of k anonymous updates of one round among its senders?"""
    k, settings = adversary.settings.set_size, adversary.settings
    split, rounds = adversary.closed_split(), adversary.store.column("round")
    rows: list[int] = []
    labels: list[int] = []
    group_of: list[int] = []  # the sum that each row goes into
    for number in np.unique(rounds[split.probe]):
        of_round = np.flatnonzero(rounds[split.probe] == number)
        for start in range(0, len(of_round) - k + 1, k):
            members = of_round[start : start + k]
            group_of += [group_of[-1] + 1 if group_of else 0] * k
            rows += split.probe[members].tolist()
            labels += split.probe_labels[members].tolist()
    if not rows:
        raise ValueError(f"set_size: no round has {k} anonymous updates")
    group = np.array(group_of)
    raw = adversary.store.features(settings.layers, settings.center, normalize=False)[rows]
    sums, f = unit(group_sums(raw, group)), adversary.features
    scores = identify(f[split.aux], split.aux_labels, sums, settings.attack, adversary.seed)
    inside = np.zeros(scores.shape, dtype=bool)
    inside[group, labels] = True
    best = scores == scores.max(1, keepdims=True)
    hits = (best & inside).sum(1) / best.sum(1)
    hit, chance = float(hits.mean()), float(inside.mean())
    metrics = {"hit": 100 * hit, "chance": 100 * chance, "times_chance": hit / chance}
    metrics["log2_hit"] = float(np.log2(max(hit, 0.5 / len(sums))))
    user_hits, user_sums = np.zeros(adversary.n_users), np.zeros(adversary.n_users)  # a sum counts for each sender
    np.add.at(user_hits, split.known[labels], hits[group])
    np.add.at(user_sums, split.known[labels], 1)
    shares = [round(h / n, 4) if n else None for h, n in zip(user_hits, user_sums, strict=True)]
    return metrics, {"users": {"hit": shares, "sums": user_sums.tolist()}, "groups": len(sums)}


def image_scores(bundle: FederatedBundle, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's MLP on raw pixels of prior devices: log-probabilities (n, users) of anonymous images, and owners.

    Raises:
        ValueError: texts instead of images.
    """
    if bundle.vocabulary:
        raise ValueError(f"measure images compares images, but {bundle.name} has texts")
    users = bundle.users
    rows = {role: np.flatnonzero(users.device_role[users.device.numpy()] == role) for role in (PRIOR, ANONYMOUS)}
    pixels = {role: as_input(users.x[r]).flatten(1).numpy() for role, r in rows.items()}
    owner = {role: users.user[r].numpy() for role, r in rows.items()}
    probability = mlp_probabilities(pixels[PRIOR], owner[PRIOR], users.n_users, seed)
    return np.log(probability(pixels[ANONYMOUS]) + 1e-12), owner[ANONYMOUS]


def image_sets(single: np.ndarray, owner: np.ndarray, set_size: int, seed: int) -> tuple[dict, dict]:
    """Figure 10: raw images instead of updates. A set's score is the mean log-probability of its images.

    Args:
        single: (n, users) of each image, from `image_scores`.
        owner: (n,) user of each image.
        set_size: images per set.
        seed: of the sets.

    Raises:
        ValueError: no user has that many images.
    """
    scores, labels = [], []
    for user in range(single.shape[1]):
        mine = np.random.default_rng([seed, 10, user]).permutation(np.flatnonzero(owner == user))
        for start in range(0, len(mine) - set_size + 1, set_size):
            scores.append(single[mine[start : start + set_size]].mean(0))
            labels.append(user)
    if not scores:
        raise ValueError(f"set_size: no anonymous device has {set_size} images")
    found = identification_metrics(np.array(scores), np.array(labels))
    metrics = {name: 100 * found[name] for name in ("mAP_macro", "top1", "top5")}
    return metrics | {"times_chance_ap": found["times_chance_ap"]}, {"sets": len(labels)}
