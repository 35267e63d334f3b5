"""Rows computed from the records of other runs: means (table 2), common failures, subsets with one name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shared_utils.runlog import Outcome, RunLog, key_of
from shared_utils.tables import Run, Table
from str_benchmark.config import STAGES
from str_benchmark.data.sets import SETS
from str_benchmark.metrics import failure_intersection
from str_benchmark.settings import Settings

EXAMPLES = 24


def rows_of(table: Table, scale: str, of: Sequence[str]) -> list[str]:
    """Rows of a table that an aggregate uses: those named, those with a stage's choice such as "trans=TPS", or all.

    Raises:
        ValueError: a stage or choice that does not exist.
    """
    if len(of) != 1 or "=" not in of[0]:
        return list(of) or [row.name for row in table.rows_at(scale)]
    stage, _, choice = of[0].partition("=")
    if choice not in STAGES.get(stage, ()):
        raise ValueError(f"of: expected a stage's choice such as trans=TPS, got {of[0]!r}")
    position = list(STAGES).index(stage)
    return [row.name for row in table.rows_at(scale) if row.name.split(" ")[0].split("-")[position] == choice]


def runs_behind(tables: Sequence[Table], combined: Sequence[Run]) -> list[Run]:
    """The runs from whose records the aggregates are computed. ValueError for a table that does not exist."""
    known, found = {table.id: table for table in tables}, []
    for run in combined:
        name, *of = run.settings["of"]
        if name not in known:
            raise ValueError(f"{run.table}, {run.row}: of: there is no table {name!r}")
        found += known[name].runs(run.scale, rows_of(known[name], run.scale, of), [run.seed])
    return found


def records_of(runs: Sequence[Run], logs: Sequence[RunLog]) -> list[dict]:
    """The record of each run; a later log takes precedence over an earlier one.

    Raises:
        ValueError: a run is still missing.
    """
    known = {key_of(record): record for log in logs for record in log.records()}
    for run in runs:
        if run.key not in known:
            raise ValueError(
                f"{run.table}, {run.row}, seed {run.seed} is still missing: run {run.table} at scale {run.scale} first"
            )
    return [known[run.key] for run in runs]


def mean_of_runs(runs: Sequence[Run], logs: Sequence[RunLog]) -> Outcome:
    """Mean over the runs of every metric that all of them have (table 2)."""
    records = records_of(runs, logs)
    shared = set.intersection(*(set(record["metrics"]) for record in records))
    metrics = {name: float(np.mean([r["metrics"][name] for r in records])) for name in sorted(shared)}
    return Outcome(metrics, {"of": [run.row for run in runs]}, caveats=_caveats(records))


def failures_of_runs(runs: Sequence[Run], logs: Sequence[RunLog]) -> Outcome:
    """Share of words that all models miss, compared with independent models (section 4.5), in %.

    The words are those of the total accuracy, each counted once: sets such as IC13_857 and IC13_1015 overlap.
    """
    records = records_of(runs, logs)
    s = Settings(**runs[0].settings)
    correct = {
        name: np.stack([_unpack(record["details"], name) for record in records]) for name in s.regular + s.irregular
    }
    metrics = {name: 100 * share for name, share in failure_intersection(correct).items()}
    metrics["ratio"] = metrics["missed_by_all"] / metrics["expected"] if metrics["expected"] else 1.0
    by_set = {}
    for name, part in correct.items():
        shares = failure_intersection({name: part})
        missed = np.flatnonzero((~part).all(0)).tolist()
        by_set[name] = {"n": part.shape[1]} | {key: round(100 * share, 3) for key, share in shares.items()}
        by_set[name]["missed"] = missed[:EXAMPLES]
    return Outcome(metrics, {"of": [run.row for run in runs], "sets": by_set}, caveats=_caveats(records))


def subset_of_runs(runs: Sequence[Run], logs: Sequence[RunLog], part: str, whole: str) -> Outcome:
    """The effect of leaving words out on the same readings: accuracy on a part of a set and on the whole, in %.

    The part is what its rule keeps of the whole (`filters.SUBSET_RULES`). If the part is a hand-made list, it is
    the released set of that name.

    Returns:
        metrics part, whole and effect (part - whole), means over the runs; empty if the whole was not evaluated.
    """
    records, sets = records_of(runs, logs), (part, whole)
    details: dict[str, Any] = {"of": [run.row for run in runs], "part": part, "whole": whole}
    if not all(whole in record["metrics"] for record in records):
        return Outcome({}, details, caveats=[f"{whole} was not there"])
    ruled = [record["details"]["by_rule"].get(whole, {}).get(part) for record in records]
    scores = np.array([[record["metrics"].get(name, np.nan) for name in sets] for record in records])
    if all(ruled):
        scores[:, 0] = [100 * correct / n for n, correct in ruled]
    n = ruled[0][0] if all(ruled) else records[0]["details"]["n"][part]
    details |= {"n": [n, records[0]["details"]["n"][whole]], "by_rule": all(ruled)}
    caveats = _caveats(records)
    if part in SETS and SETS[part].n != n:
        caveats.append(f"{part}: {n:,} words are left")
    mean = scores.mean(0)
    metrics = {"part": float(mean[0]), "whole": float(mean[1]), "effect": float(mean[0] - mean[1])}
    return Outcome(metrics, details, caveats=caveats)


def _caveats(records: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(caveat for record in records for caveat in record.get("caveats", ())))


def _unpack(details: dict, name: str) -> np.ndarray:
    """Which words of a set a run read, (n,) bool."""
    packed = np.frombuffer(bytes.fromhex(details["correct"][name]), dtype=np.uint8)
    return np.unpackbits(packed, count=details["n"][name]).astype(bool)
