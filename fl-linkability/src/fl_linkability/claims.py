"""Claims judged by a cluster bootstrap over users, in addition to every project's interval over seeds.

A record keeps what each user contributed to a metric, or the metric for each resample of the users. Users are resampled
within each seed, in the same way in all rows of a seed, so differences between rows stay paired; the effect is the mean
over seeds and its interval runs from the 2.5 % to the 97.5 % quantile. Metrics without contributions of single users
(accuracy on the population test set) are judged over seeds only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from fl_linkability.evaluate import user_resamples
from shared_utils.report import number
from shared_utils.runlog import RunLog, key_of
from shared_utils.tables import Claim, Table

MIN_SEEDS = 3
Sample = tuple[float, np.ndarray]  # a metric as measured, and for each resample of the users (R,)


@dataclass(frozen=True)
class BootstrapVerdict:
    """A claim at a scale: mean over seeds and 95 % bootstrap interval over users."""

    claim: Claim
    verdict: str  # holds | fails | undecided | not measured | seeds only
    effect: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    def __str__(self) -> str:
        if self.verdict in ("not measured", "seeds only"):
            return self.verdict
        return f"{self.verdict}: {number(self.effect)} [{number(self.low)}, {number(self.high)}]"


def replicates(record: dict, metric: str) -> Sample | None:
    """A metric as measured and for each resample of the users, (R,); None if users do not contribute to it."""
    details, metrics = record["details"], record["metrics"]
    if metric in details.get("replicates", {}):
        return metrics[metric], np.array(details["replicates"][metric], dtype=float)
    users = {name: np.array(value, dtype=float) for name, value in details.get("users", {}).items()}
    if metric not in FROM_USERS or any(len(users.get(name, [])) == 0 for name in FROM_USERS[metric][0]):
        return None
    names, combine = FROM_USERS[metric]
    counts = user_resamples(len(users[names[0]]), record["seed"])
    return metrics[metric], combine(metrics, counts, *(users[name] for name in names))


def _mean(counts: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the resampled users, (R,); users without a value are skipped."""
    has = np.isfinite(values)
    weight = counts[:, has] * (1 if weights is None else weights[has])
    return weight @ values[has] / weight.sum(1)


def _times(metrics: dict, counts: np.ndarray, ap: np.ndarray) -> np.ndarray:
    return _mean(counts, ap) * np.isfinite(ap).sum()


def _log2(values: np.ndarray, least: float) -> np.ndarray:
    return np.log2(np.maximum(values, least))


FROM_USERS: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "mAP_macro": (("ap",), lambda m, c, ap: 100 * _mean(c, ap)),
    "times_chance_ap": (("ap",), _times),
    "log2_times_chance": (("ap",), lambda m, c, ap: np.log2(_times(m, c, ap))),
    "above_floor": (("ap",), lambda m, c, ap: _times(m, c, ap) - m["floor_q99"]),
    "top1": (("top1", "probes"), lambda m, c, top1, n: 100 * _mean(c, top1, n)),
    "times_chance_top1": (("top1", "probes"), lambda m, c, top1, n: _mean(c, top1, n) * m["known_users"]),
    "log2_top1": (("top1", "probes"), lambda m, c, top1, n: _log2(_mean(c, top1, n), 0.5 / np.nansum(n))),
    "same_device_top1": (("same_device_top1", "same_device_probes"), lambda m, c, top1, n: 100 * _mean(c, top1, n)),
    "hit": (("hit", "sums"), lambda m, c, hit, n: 100 * _mean(c, hit, n)),
    "log2_hit": (("hit", "sums"), lambda m, c, hit, n: _log2(_mean(c, hit, n), 0.5 / np.nansum(n))),
    "user_accuracy": (("user_accuracy",), lambda m, c, accuracy: _mean(c, accuracy)),
}


def judge(table: Table, scale: str, log: RunLog) -> list[BootstrapVerdict]:
    """A verdict on every claim that is judged at this scale; it needs at least three seeds."""
    claims = [claim for claim in table.claims if claim.scales is None or scale in claim.scales]
    records = {key_of(record): record for record in log.records()} if claims and scale in table.scales else {}
    return [_judge(table, scale, claim, records) for claim in claims]


def _judge(table: Table, scale: str, claim: Claim, records: dict) -> BootstrapVerdict:
    found: dict[int, dict[str, dict]] = {}
    seeds = sorted({key[3] for key in records if key[0] == table.id})
    rows = [row.name for row in table.rows_at(scale) if row.name in claim.named_rows]
    for run in table.runs(scale, rows, seeds) if seeds and rows else []:
        if run.key in records:
            found.setdefault(run.seed, {})[run.row] = records[run.key]
    complete = [rows for rows in found.values() if set(claim.named_rows) <= set(rows)]
    if len(complete) < MIN_SEEDS:
        return BootstrapVerdict(claim, "not measured")
    names = set(claim.named_rows)
    samples = [{name: s for name in names if (s := replicates(rows[name], claim.metric))} for rows in complete]
    if any(sample.keys() != names for sample in samples):
        return BootstrapVerdict(claim, "seeds only")
    effects, draws = zip(*(_effect(table, claim, rows) for rows in samples), strict=True)
    shortest = min(map(len, draws))
    low, high = np.nanquantile(np.mean([draw[:shortest] for draw in draws], axis=0), [0.025, 0.975])
    low_bound, high_bound = _bounds(claim)
    if low > low_bound and high < high_bound:
        verdict = "holds"
    else:
        verdict = "fails" if high < low_bound or low > high_bound else "undecided"
    return BootstrapVerdict(claim, verdict, float(np.mean(effects)), float(low), float(high))


def _effect(table: Table, claim: Claim, rows: dict[str, Sample]) -> Sample:
    """What the claim bounds, as measured and for each resample."""
    if claim.better and claim.than:
        sign = -1 if table.metrics[claim.metric] == "lower" else 1
        effect, draws = _minus(rows[claim.better], rows[claim.than])
        return sign * effect, sign * draws
    if claim.row:
        if not claim.minus:
            return rows[claim.row]
        return _minus(rows[claim.row], rows[claim.minus])
    sign = 1 if claim.trend == "rises" else -1
    order = np.stack([rows[name][1] for name in claim.rows])  # (rows, R)
    rank = [stats.spearmanr(range(len(claim.rows)), column).statistic for column in order.T]
    measured = stats.spearmanr(range(len(claim.rows)), [rows[name][0] for name in claim.rows]).statistic
    return sign * float(measured), sign * np.array(rank)


def _minus(a: Sample, b: Sample) -> Sample:
    return a[0] - b[0], a[1] - b[1]


def _bounds(claim: Claim) -> tuple[float, float]:
    if claim.better:
        return claim.margin, np.inf
    if claim.trend:
        return 0.0, np.inf
    return (-np.inf if claim.at_least is None else claim.at_least), (np.inf if claim.at_most is None else claim.at_most)


def section(tables: list[Table], results: Path) -> str:
    """Markdown: every claim with its bootstrap verdict, for the results page."""
    lines = [
        {"table": table.id, "scale": scale, "claim": v.claim.text, "verdict (bootstrap over users)": str(v)}
        for table in tables
        for scale in table.scales
        if scale != "smoke"
        for v in judge(table, scale, RunLog(results / f"{scale}.jsonl"))
    ]
    head = "## Claims by cluster bootstrap over users\n\n" + __doc__.split("\n\n")[1].replace("\n", " ")
    return head + "\n\n" + pd.DataFrame(lines).to_markdown(index=False) + "\n"
