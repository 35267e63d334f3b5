"""The paper's protocol on a finished federation: what each attack finds, and how useful the model is to its users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.func import functional_call

from fl_linkability.attacks import IDENTIFY, MATCH, identify, pair_scorer
from fl_linkability.data.bundle import ANONYMOUS, NOTHING, PRIOR, FederatedBundle, Rows, task_of
from fl_linkability.features import cosine, device_means
from fl_linkability.linkage import (
    identification_metrics,
    matching_metrics,
    open_world_metrics,
    permuted_device_chance,
    top_k_hits,
)
from fl_linkability.settings import Settings
from fl_linkability.splits import Split, split_closed, split_matching, split_open, split_same_device
from fl_linkability.store import UpdateStore
from fl_linkability.train import State, as_input

REPLICATES = 200
WORDS_TRIED = 5  # top-5 accuracy, as in the paper


def predict(model: nn.Module, state: State, x: Tensor | Rows, batch_size: int = 1024) -> Tensor:
    """Outputs float32 (n, ...) on the CPU, in evaluation mode."""
    return torch.cat(list(_outputs(model, state, x, batch_size)))


def _outputs(model: nn.Module, state: State, x: Tensor | Rows, batch_size: int) -> Iterator[Tensor]:
    model.eval()
    device = next(iter(state.values())).device
    with torch.no_grad():
        for part in x.split(batch_size):
            yield functional_call(model, state, (as_input(part.to(device)),)).float().cpu()


def utility(bundle: FederatedBundle, model: nn.Module, state: State) -> dict:
    """Utility on held-out samples of the users, by user, and on the population test set.

    In %: accuracy for one class per image, mean AP over the labels that occur (not split by user), top-5 accuracy for
    words. For numbers, the mean absolute error.
    """
    x, y, user = bundle.user_test
    if bundle.task == "labels":
        tests = {"user": (x, y), "population": bundle.test}
        return {name: macro_ap(predict(model, state, x).double().numpy(), y.numpy()) for name, (x, y) in tests.items()}
    unit = 1 if bundle.task == "number" else 100
    hits, count = _points(model, state, x, y)
    all_hits, all_count = (hits, count) if bundle.test[0] is x else _points(model, state, *bundle.test)
    of_user, per_user = (
        torch.zeros(bundle.users.n_users, dtype=torch.float64).index_add_(0, user, each) for each in (hits, count)
    )
    return {
        "user": unit * (hits.sum() / count.sum()).item(),
        "population": unit * (all_hits.sum() / all_count.sum()).item(),
        "by_user": (unit * of_user / per_user).tolist(),
    }


def _points(model: nn.Module, state: State, x: Tensor | Rows, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample, float64 (n,): hits (for a number, its absolute error), and how many there could be."""
    task = task_of(y)
    size = 64 if task == "words" else 1024  # a text has an output for each word of the vocabulary at each position
    parts = []
    for outputs, target in zip(_outputs(model, state, x, size), y.split(size), strict=True):
        count = torch.ones(len(target))
        if task == "words":
            best, asked = outputs.topk(min(WORDS_TRIED, outputs.shape[2]), 2).indices, target != NOTHING
            hits, count = ((best == target.unsqueeze(2)).any(2) & asked).sum(1), asked.sum(1)
        elif task == "number":
            hits = (outputs - target).abs()
        else:
            hits = outputs.argmax(1) == target
        parts.append(torch.stack([hits.double(), count.double()]))
    hits, count = torch.cat(parts, 1)
    return hits, count


def macro_ap(scores: np.ndarray, y: np.ndarray) -> float:
    """Mean AP in % over the labels (columns) that occur; NaN if none does."""
    present = (y > 0).any(0)
    if not present.any():
        return float("nan")
    return 100 * float(average_precision_score(y[:, present], scores[:, present], average="macro"))


def mean_utility(points: list[dict]) -> tuple[dict, dict]:
    """Metrics user_accuracy and population_accuracy (means over the last rounds), and each user's mean."""
    metrics = {f"{name}_accuracy": float(np.mean([p[name] for p in points])) for name in ("user", "population")}
    by_user = np.mean([p["by_user"] for p in points], axis=0) if "by_user" in points[0] else []
    return metrics, {"user_accuracy": _rounded(by_user, 2)}


def user_resamples(n_users: int, seed: int, n: int = REPLICATES) -> np.ndarray:
    """Cluster bootstrap: how often each user is drawn, int (n, n_users); the same for every row of a seed."""
    return np.random.default_rng([seed, 99]).multinomial(n_users, [1 / n_users] * n_users, size=n)


def weighted_ap(same: np.ndarray, scores: np.ndarray, weight: np.ndarray) -> float:
    """Average precision of weighted pairs; NaN if a resample of few users leaves out all pairs of a kind."""
    if not (weight[same].any() and weight[~same].any()):
        return np.nan
    return average_precision_score(same, scores, sample_weight=weight)


@dataclass
class Adversary:
    """What the server can find out from one federation's updates; metrics that are shares are in %.

    Every method returns metrics and details. `details["users"]` holds values by user and `details["replicates"]` the
    metric for each resample of the users: the bootstrap of claims.py needs them.

    Raises:
        ValueError: an unknown attack in the settings.
    """

    store: UpdateStore
    n_users: int
    seed: int
    settings: Settings

    def __post_init__(self) -> None:
        known = dict.fromkeys([*IDENTIFY, *MATCH])
        if self.settings.attack not in known:
            raise ValueError(f"attack must be one of {', '.join(known)}, got {self.settings.attack!r}")

    @cached_property
    def features(self) -> np.ndarray:
        """Features of all stored updates."""
        return self.store.features(self.settings.layers, self.settings.center)

    def closed_split(self) -> Split:
        """Known and probed updates under the settings, controls included."""
        s = self.settings
        rounds = ((0, s.aux_until), (s.aux_until, None)) if s.aux_until else ((0, None), (0, None))
        split = split_closed(self.store, *rounds)
        keep = np.arange(len(split.aux))
        if s.deltas_per_user:
            by_user = (np.flatnonzero(split.aux_labels == user) for user in range(len(split.known)))
            keep = np.concatenate([rows[: s.deltas_per_user] for rows in by_user])
        aux, aux_labels, probe_labels = split.aux[keep], split.aux_labels[keep], split.probe_labels
        permutation = np.random.default_rng([self.seed, 9]).permutation(len(split.known))
        if s.control == "permuted-labels":
            aux_labels = permutation[aux_labels]
        elif s.control == "permuted-devices":
            probe_labels = permutation[probe_labels]
        return Split(aux, aux_labels, split.probe, probe_labels, split.known)

    def scores(self, split: Split) -> np.ndarray:
        """Scores of the probes for each known user."""
        f = self.features
        return identify(f[split.aux], split.aux_labels, f[split.probe], self.settings.attack, self.seed)

    def reid(self) -> tuple[dict, dict]:
        """Closed-world re-identification (Table 3) with its floor."""
        split = self.closed_split()
        scores = self.scores(split)
        found = identification_metrics(scores, split.probe_labels)
        mean, q99 = permuted_device_chance(scores, split.probe_labels, self.store.column("device")[split.probe])
        times, n = found["times_chance_ap"], len(split.probe)
        metrics = {name: 100 * found[name] for name in ("mAP_macro", "top1", "top5", "AP_micro", "auc_macro")}
        metrics |= {
            "times_chance_ap": times,
            "log2_times_chance": float(np.log2(times)),
            "times_chance_top1": found["times_chance_top1"],
            "log2_top1": float(np.log2(max(found["top1"], 0.5 / n))),
            "floor": mean,
            "floor_q99": q99,
            "above_floor": times - q99,
            "known_users": found["users"],
        }
        hits = top_k_hits(scores, split.probe_labels, 1)
        count = np.bincount(split.probe_labels, minlength=len(split.known))
        with np.errstate(invalid="ignore"):
            top1 = np.bincount(split.probe_labels, hits, len(split.known)) / count
        users = {"ap": found["ap_per_user"], "top1": top1, "probes": count}
        return metrics, {"users": {name: self._by_user(split.known, value) for name, value in users.items()}}

    def _by_user(self, known: np.ndarray, values: np.ndarray) -> list:
        everyone = np.full(self.n_users, np.nan)
        everyone[known] = values
        return _rounded(everyone, 4)

    def pairs(self) -> tuple[dict, dict]:
        """Matching on balanced pairs of a prior and an anonymous update (Table 4)."""
        split = split_closed(self.store)
        rows_a, rows_b, same = split_matching(self.store, self.seed)
        score = pair_scorer(self.settings.attack, self.features[split.aux], split.aux_labels, self.seed)
        scores = score(self.features[rows_a], self.features[rows_b])
        ap = 100 * float(average_precision_score(same, scores))
        user_a, user_b = (self.store.column("user")[rows] for rows in (rows_a, rows_b))
        draws = []
        for count in user_resamples(self.n_users, self.seed):
            weight = np.where(same, count[user_a], count[user_a] * count[user_b])
            draws.append(100 * weighted_ap(same, scores, weight))
        return {"matching_ap": ap}, {"replicates": {"matching_ap": _rounded(draws, 2)}}

    def all_pairs(self) -> tuple[dict, dict]:
        """Matching every prior device with every anonymous one by the cosine of their mean features (T3)."""
        found, scores, users_a, users_b = self._device_matching()
        same = users_a[:, None] == users_b
        metrics = {
            "matching_ap": 100 * found["AP"],
            "matching_auc": 100 * found["AUC"],
            "tpr_at_1": 100 * found["tpr_at_fpr_0p01"],
            "assigned": 100 * found["assignment_accuracy"],
        }
        metrics |= {"times_prevalence": found["times_prevalence"]}
        draws = []
        for count in user_resamples(self.n_users, self.seed):
            a, b = count[users_a][:, None], count[users_b]
            weight = np.where(same, a, a * b)  # copies of a user make no new same-user pairs
            draws.append(weighted_ap(same.ravel(), scores.ravel(), weight.ravel()))
        prevalence = found["prevalence"]
        replicates = {"matching_ap": 100 * np.array(draws), "times_prevalence": np.array(draws) / prevalence}
        return metrics, {"replicates": {name: _rounded(value, 2) for name, value in replicates.items()}}

    def _device_matching(self) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
        """Metrics, cosine of every prior with every anonymous device, and the users of both."""
        role, device, user = (self.store.column(name) for name in ("role", "device", "user"))
        owner = dict(zip(device.tolist(), user.tolist(), strict=True))
        means, users = [], []
        for kind in (PRIOR, ANONYMOUS):
            rows = np.flatnonzero(role == kind)
            mean, ids = device_means(self.features[rows], device[rows])
            means.append(mean)
            users.append(np.array([owner[d] for d in ids.tolist()]))
        scores = cosine(*means)
        return matching_metrics(scores, *users), scores, users[0], users[1]

    def open(self) -> tuple[dict, dict]:
        """Open world, a third of the users unknown: is the sender known, and who is it (T4)."""
        split = split_open(self.store, 1 / 3, self.seed)
        scores = self.scores(split)

        def metrics(rows: np.ndarray) -> dict:
            found = open_world_metrics(scores[rows], split.probe_labels[rows])
            return {
                "open_auroc": 100 * found["auroc"],
                "dir_at_1": 100 * found["dir_at_far_0.01"]["dir"],
                "dir_at_10": 100 * found["dir_at_far_0.1"]["dir"],
            }

        users = self.store.column("user")[split.probe]
        everything = np.arange(len(scores))
        draws = [metrics(np.repeat(everything, count[users])) for count in user_resamples(self.n_users, self.seed)]
        replicates = {name: _rounded([d[name] for d in draws], 2) for name in draws[0]}
        return metrics(everything), {"replicates": replicates}

    def protocol(self) -> tuple[dict, dict]:
        """All our measurements at once (T5): re-identification, matching, tracking of a device, open world."""
        metrics, details = self.reid()
        matching = self._device_matching()[0]
        split = split_open(self.store, 1 / 3, self.seed)
        opened = open_world_metrics(self.scores(split), split.probe_labels)
        tracked = split_same_device(self.store)
        hits = top_k_hits(self.scores(tracked), tracked.probe_labels, 1)
        metrics |= {
            "matching_ap": 100 * matching["AP"],
            "open_auroc": 100 * opened["auroc"],
            "dir_at_10": 100 * opened["dir_at_far_0.1"]["dir"],
            "same_device_top1": 100 * float(hits.mean()),
        }
        owner = self.store.column("user")[tracked.probe]
        count = np.bincount(owner, minlength=self.n_users)
        with np.errstate(invalid="ignore"):
            details["users"]["same_device_top1"] = _rounded(np.bincount(owner, hits, self.n_users) / count, 4)
        details["users"]["same_device_probes"] = count.tolist()
        return metrics, details


def _rounded(values: Sequence[float] | np.ndarray, digits: int) -> list:
    """For a run record: None if the value is undefined."""
    return [None if not np.isfinite(v) else round(float(v), digits) for v in values]
