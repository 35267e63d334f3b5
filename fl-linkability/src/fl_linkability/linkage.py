"""How well scores link updates to users: exact metrics of re-identification, matching and the open world.

Everything here is numpy in, numbers out. Ties count as random guesses, users without a probe are left out,
and undefined values are NaN, never 0. "times chance" is printed next to the number of users, its upper bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def identification_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Closed-world re-identification (section 6.1.1).

    Args:
        scores: (n_probes, n_users), higher means more likely.
        labels: (n_probes,) true user, a column index.

    Returns:
        top1, top5 (expected under random tie-breaking), mAP_macro (over users with a probe), AP_micro, auc_macro,
        chance_top1, chance_top5, times_chance_top1, times_chance_ap (mAP_macro over the mean share of probes per user),
        users, ap_per_user (NaN for a user without a probe).

    Raises:
        ValueError: wrong shapes, labels outside the columns, NaN scores.
    """
    scores, labels = _checked(scores, labels, lowest=0)
    users = scores.shape[1]
    ap = np.diag(ap_by_group(scores, labels, users))
    present = ~np.isnan(ap)
    top1, top5 = (float(top_k_hits(scores, labels, k).mean()) for k in (1, 5))
    hot = labels[:, None] == np.arange(users)
    both = present & ~hot.all(0)  # AUC needs a probe of another user as well
    return {
        "top1": top1,
        "top5": top5,
        "mAP_macro": float(ap[present].mean()),
        "AP_micro": float(average_precision_score(hot.ravel(), scores.ravel())),
        "auc_macro": float(roc_auc_score(hot[:, both], scores[:, both], average="macro"))
        if both.any()
        else float("nan"),
        "chance_top1": 1 / users,
        "chance_top5": min(5 / users, 1.0),
        "times_chance_top1": top1 * users,
        "times_chance_ap": float(ap[present].mean() * present.sum()),
        "users": users,
        "ap_per_user": ap,
    }


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Expected hit of each probe, (n,): clip((k - g) / e, 0, 1), where g scores are above the true user's, e equal."""
    own = scores[np.arange(len(labels)), labels][:, None]
    greater, equal = (scores > own).sum(1), (scores == own).sum(1)
    return np.clip((k - greater) / equal, 0, 1)


def ap_by_group(scores: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Step-wise average precision of every column, with each group's probes in turn as its positives.

    Args:
        scores: (n, K).
        groups: (n,) in 0 .. n_groups - 1.
        n_groups: how many there are; some may be empty.

    Returns:
        (K, n_groups); the diagonal is each user's AP if the groups are the users. NaN for an empty group.
    """
    n = len(groups)
    sizes = np.bincount(groups, minlength=n_groups).astype(float)
    out = np.empty((scores.shape[1], n_groups))
    for column, values in enumerate(scores.T):
        rank = np.unique(values, return_inverse=True)[1]  # equal scores share a rank
        above = _at_least(rank)
        within = _at_least(groups.astype(np.int64) * n + rank, groups, sizes)
        with np.errstate(invalid="ignore"):
            out[column] = np.bincount(groups, within / above, n_groups) / sizes
    return out


def _at_least(key: np.ndarray, groups: np.ndarray | None = None, sizes: np.ndarray | None = None) -> np.ndarray:
    """How many keys (of the same group, if groups are given) are at least as large as each one, itself included."""
    order = np.sort(key)
    below = np.searchsorted(order, key, side="left")
    if groups is None or sizes is None:
        return len(key) - below
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    return sizes[groups] - (below - start[groups])


def permuted_device_chance(
    scores: np.ndarray, users: np.ndarray, devices: np.ndarray, n: int = 200, seed: int = 0
) -> tuple[float, float]:
    """The floor of times_chance_ap: users permuted over whole devices, since a device's updates rank together.

    Args:
        scores: (n_probes, n_users).
        users: (n_probes,) true user of each probe.
        devices: (n_probes,) device of each probe; all its probes belong to one user.
        n: permutations.
        seed: of the permutations.

    Returns:
        mean and 99 % quantile of times_chance_ap.
    """
    scores, users = _checked(scores, users, lowest=0)
    names, device = np.unique(devices, return_inverse=True)
    owner = np.zeros(len(names), dtype=int)
    owner[device] = users
    if (owner[device] != users).any():
        raise ValueError("devices: the probes of a device must all belong to one user")
    present = np.unique(users)
    rng = np.random.default_rng(seed)
    if len(names) == len(present):  # one device per user: its AP for every user's scores, computed once
        table = ap_by_group(scores, device, len(names))
        draws = [table[owner[rng.permutation(len(names))], np.arange(len(names))].mean() for _ in range(n)]
    else:
        draws = []
        for _ in range(n):
            table = ap_by_group(scores, owner[rng.permutation(len(names))][device], scores.shape[1])
            draws.append(np.diag(table)[present].mean())
    times = np.array(draws) * len(present)
    return float(times.mean()), float(np.quantile(times, 0.99))


def matching_metrics(scores: np.ndarray, users_a: np.ndarray, users_b: np.ndarray) -> dict:
    """Were two updates sent by the same user? Over all pairs of two sets of devices.

    Args:
        scores: (n_a, n_b), higher means more likely.
        users_a: (n_a,) user of each row.
        users_b: (n_b,) user of each column.

    Returns:
        AP, AUC, prevalence, times_prevalence, tpr_at_fpr_0p01, tpr_at_fpr_0p1 (largest TPR among ROC points with at
        most that FPR), assignment_accuracy (of the one-to-one assignment with the largest summed score).
    """
    scores = np.asarray(scores, dtype=float)
    if scores.shape != (len(users_a), len(users_b)):
        raise ValueError(f"scores must be {(len(users_a), len(users_b))}, got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    same = np.asarray(users_a)[:, None] == np.asarray(users_b)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    result = {"prevalence": float(same.mean()), "assignment_accuracy": float(same[rows, columns].mean())}
    if same.all() or not same.any():
        return result | dict.fromkeys(
            ("AP", "AUC", "times_prevalence", "tpr_at_fpr_0p01", "tpr_at_fpr_0p1"), float("nan")
        )
    fpr, tpr, _ = roc_curve(same.ravel(), scores.ravel(), drop_intermediate=False)
    ap = float(average_precision_score(same.ravel(), scores.ravel()))
    return result | {
        "AP": ap,
        "AUC": float(roc_auc_score(same.ravel(), scores.ravel())),
        "times_prevalence": ap / result["prevalence"],
        "tpr_at_fpr_0p01": float(tpr[fpr <= 0.01].max()),
        "tpr_at_fpr_0p1": float(tpr[fpr <= 0.1].max()),
    }


def open_world_metrics(scores: np.ndarray, labels: np.ndarray, far: tuple[float, ...] = (0.01, 0.1)) -> dict:
    """Is the sender known at all, and who is it? Decided by the largest score.

    Args:
        scores: (n_probes, n_known).
        labels: (n_probes,) true user, -1 if not a known user.
        far: false alarm rates for the detection and identification rate (DIR).

    Returns:
        auroc, ap (with known probes as positives), and for each rate dir_at_far_<a>: {tau, far, dir}. tau is the
        smallest of the observed largest scores (or infinity) at which at most that share of unknown probes pass.
    """
    scores, labels = _checked(scores, labels, lowest=-1)
    known, largest, best = labels >= 0, scores.max(1), scores.argmax(1)
    result: dict[str, Any] = {"auroc": float("nan"), "ap": float("nan")}
    if known.any() and not known.all():
        result = {"auroc": float(roc_auc_score(known, largest)), "ap": float(average_precision_score(known, largest))}
    unknown = np.sort(largest[~known])
    candidates = np.append(np.unique(largest), np.inf)
    alarms = (len(unknown) - np.searchsorted(unknown, candidates, side="left")) / max(len(unknown), 1)
    for rate in far:
        at = int(np.argmax(alarms <= rate)) if len(unknown) else 0
        passed = (best == labels) & (largest >= candidates[at])
        dir_ = float(passed[known].mean()) if known.any() and len(unknown) else float("nan")
        tau, alarm = (float(candidates[at]), float(alarms[at])) if len(unknown) else (float("nan"), float("nan"))
        result[f"dir_at_far_{rate}"] = {"tau": tau, "far": alarm, "dir": dir_}
    return result


def _checked(scores: np.ndarray, labels: np.ndarray, lowest: int) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be (n_probes, n_users) and not empty, got {scores.shape}")
    if labels.shape != scores.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be {scores.shape[0]} integers, got {labels.shape} of {labels.dtype}")
    if labels.min() < lowest or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels must lie in {lowest} .. {scores.shape[1] - 1}, got {labels.min()} .. {labels.max()}")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    return scores, labels
