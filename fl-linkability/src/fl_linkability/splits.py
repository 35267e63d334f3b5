"""Which stored updates have a sender that the adversary knows, and which are to be linked (section 6.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_linkability.data.bundle import ANONYMOUS, PRIOR
from fl_linkability.store import UpdateStore


@dataclass(frozen=True)
class Split:
    """Rows of a store. Labels count the known users from 0; -1 if the user is not among them."""

    aux: np.ndarray
    aux_labels: np.ndarray
    probe: np.ndarray
    probe_labels: np.ndarray
    known: np.ndarray
    """users, by label"""


def split_closed(store: UpdateStore, aux_rounds: tuple = (0, None), probe_rounds: tuple = (0, None)) -> Split:
    """The paper's closed world: prior devices train the attack, anonymous ones are probed.

    Args:
        store: updates.
        aux_rounds: rounds of prior devices, from (included) and to (excluded; None: all).
        probe_rounds: rounds of anonymous devices. Probes of users without a known update are left out.

    Raises:
        ValueError: no known update, or nothing to probe.
    """
    role, user = store.column("role"), store.column("user")
    aux = np.flatnonzero((role == PRIOR) & _within(store, aux_rounds))
    if len(aux) == 0:
        raise ValueError("the store has no update of a prior device in these rounds")
    known = np.unique(user[aux])
    probe = np.flatnonzero((role == ANONYMOUS) & _within(store, probe_rounds) & np.isin(user, known))
    if len(probe) == 0:
        raise ValueError("the store has no update of an anonymous device of a known user in these rounds")
    return Split(aux, np.searchsorted(known, user[aux]), probe, np.searchsorted(known, user[probe]), known)


def split_open(store: UpdateStore, unknown_fraction: float = 1 / 3, seed: int = 0) -> Split:
    """An open world: this share of the users has no known update; all anonymous updates are probed."""
    if not 0 < unknown_fraction < 1:
        raise ValueError(f"unknown_fraction must lie in (0, 1), got {unknown_fraction}")
    role, user = store.column("role"), store.column("user")
    everyone = np.unique(user)
    n_unknown = max(1, round(unknown_fraction * len(everyone)))
    unknown = np.random.default_rng([seed, 7]).choice(everyone, n_unknown, replace=False)
    aux = np.flatnonzero((role == PRIOR) & ~np.isin(user, unknown))
    known = np.unique(user[aux])
    probe = np.flatnonzero(role == ANONYMOUS)
    labels = np.where(np.isin(user[probe], known), np.searchsorted(known, user[probe]), -1)
    return Split(aux, np.searchsorted(known, user[aux]), probe, labels, known)


def split_same_device(store: UpdateStore) -> Split:
    """Tracking: the first half of the rounds of each anonymous device against its second half; labels are devices."""
    rounds, device = store.column("round"), store.column("device")
    half, mine = rounds < (rounds.max() + 1) // 2, store.column("role") == ANONYMOUS
    aux = np.flatnonzero(mine & half)
    known = np.unique(device[aux])
    probe = np.flatnonzero(mine & ~half & np.isin(device, known))
    if len(probe) == 0:
        raise ValueError("no anonymous device takes part in both halves of the rounds")
    return Split(aux, np.searchsorted(known, device[aux]), probe, np.searchsorted(known, device[probe]), known)


def split_matching(store: UpdateStore, seed: int = 0, n_pairs: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced pairs of one prior and one anonymous update (Table 4): rows, rows, and whether one user sent both."""
    role, user = store.column("role"), store.column("user")
    prior, anonymous = np.flatnonzero(role == PRIOR), np.flatnonzero(role == ANONYMOUS)
    a, b = balanced_pairs(user[prior], user[anonymous], n_pairs, np.random.default_rng([seed, 8]))
    same = np.arange(2 * n_pairs) < n_pairs
    return prior[np.concatenate(a)], anonymous[np.concatenate(b)], same


def balanced_pairs(
    users_a: np.ndarray, users_b: np.ndarray, n: int, rng: np.random.Generator, one_set: bool = False
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows, n of one user and n of two users, drawn with replacement.

    Args:
        users_a: (n_a,) user of each row of the first set.
        users_b: (n_b,) of the second.
        n: pairs of each kind.
        rng: of the draw.
        one_set: both sets are the same rows: none is paired with itself, users with a single row make no pairs.

    Returns:
        (rows of a in same-user pairs, in other pairs), (rows of b in the same, in other pairs), each (n,).

    Raises:
        ValueError: no user in both sets (one_set: no user with two rows), or only one user.
    """
    common = np.intersect1d(users_a, users_b)
    if one_set:
        common = common[np.array([(users_a == user).sum() > 1 for user in common], dtype=bool)]
    if len(common) == 0 or len(np.union1d(users_a, users_b)) < 2:
        needed = "a user with two updates" if one_set else "a user in both sets"
        raise ValueError(f"pairs need {needed} and at least two users")
    rows_b = {user: np.flatnonzero(users_b == user) for user in common}
    same_a = rng.choice(np.flatnonzero(np.isin(users_a, common)), n)
    same_b = np.empty(n, dtype=np.int64)
    for pair, row in enumerate(same_a):
        rows = rows_b[users_a[row]]
        if one_set:  # a draw among the others: the row's own index is skipped
            place = rng.integers(len(rows) - 1)
            same_b[pair] = rows[place + (place >= np.searchsorted(rows, row))]
        else:
            same_b[pair] = rows[rng.integers(len(rows))]
    other_a, other_b = rng.integers(0, len(users_a), n), rng.integers(0, len(users_b), n)
    while len(clash := np.flatnonzero(users_a[other_a] == users_b[other_b])):
        other_a[clash] = rng.integers(0, len(users_a), len(clash))
        other_b[clash] = rng.integers(0, len(users_b), len(clash))
    return (same_a, other_a), (same_b, other_b)


def _within(store: UpdateStore, rounds: tuple) -> np.ndarray:
    first, last = rounds
    number = store.column("round")
    return (number >= first) & (number < (np.inf if last is None else last))
