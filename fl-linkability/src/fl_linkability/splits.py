"""Which stored updates the adversary knows the sender of, and which are to be linked (section 6.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_linkability.data.bundle import ANONYMOUS, PRIOR
from fl_linkability.store import UpdateStore


@dataclass(frozen=True)
class Split:
    """Rows of a store. Labels count the known users from 0; -1 where the user is not among them."""

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
    from fl_linkability.neural_attacks import balanced_pairs

    role, user = store.column("role"), store.column("user")
    prior, anonymous = np.flatnonzero(role == PRIOR), np.flatnonzero(role == ANONYMOUS)
    a, b = balanced_pairs(user[prior], user[anonymous], n_pairs, np.random.default_rng([seed, 8]))
    same = np.arange(2 * n_pairs) < n_pairs
    return prior[np.concatenate(a)], anonymous[np.concatenate(b)], same


def _within(store: UpdateStore, rounds: tuple) -> np.ndarray:
    first, last = rounds
    number = store.column("round")
    return (number >= first) & (number < (np.inf if last is None else last))
