"""Rows that are computed from the records of other runs: means over combinations (table 2), failures of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_utils.runlog import Outcome, RunLog, key_of
from shared_utils.tables import Table
from str_benchmark.config import STAGES
from str_benchmark.metrics import failure_intersection


def records_of(table: Table, scale: str, seed: int, rows: Sequence[str], logs: Sequence[RunLog]) -> list[dict]:
    """The record of each row at a scale and seed; a later log counts before an earlier one.

    Raises:
        ValueError: a row that was not run with this seed.
    """
    known = {key_of(record): record for log in logs for record in log.records()}
    found = []
    for run in table.runs(scale, rows, [seed]):
        if run.key not in known:
            raise ValueError(
                f"{table.id}, {run.row}, seed {seed} was not run yet: run {table.id} at scale {scale} first"
            )
        found.append(known[run.key])
    return found


def mean_of_runs(table: Table, scale: str, seed: int, of: Sequence[str], logs: Sequence[RunLog]) -> Outcome:
    """Mean of every metric over the combinations with one stage's choice, such as "trans=TPS" (table 2)."""
    stage, _, choice = of[0].partition("=")
    if choice not in STAGES.get(stage, ()):
        raise ValueError(f"of: expected a stage's choice such as trans=TPS, got {of[0]!r}")
    position = list(STAGES).index(stage)
    rows = [row.name for row in table.rows_at(scale) if row.name.split(" ")[0].split("-")[position] == choice]
    records = records_of(table, scale, seed, rows, logs)
    metrics = {name: float(np.mean([r["metrics"][name] for r in records])) for name in records[0]["metrics"]}
    return Outcome(metrics, {"of": rows})


def failures_of_runs(table: Table, scale: str, seed: int, of: Sequence[str], logs: Sequence[RunLog]) -> Outcome:
    """Share of words that all of the rows miss, against what independent models would leave (section 4.5), in %."""
    records = records_of(table, scale, seed, of, logs)
    correct = np.stack([unpack(record["details"]) for record in records])
    shares = {name: 100 * share for name, share in failure_intersection(correct).items()}
    shares["ratio"] = shares["missed_by_all"] / shares["expected"]
    missed = np.flatnonzero((~correct).all(0)).tolist()
    return Outcome(shares, {"of": list(of), "missed": missed[:64], "sets": records[0]["details"]["n"]})


def unpack(details: dict) -> np.ndarray:
    """Which words a run read, all sets in a row, (n,) bool."""
    parts = []
    for name, bits in details["correct"].items():
        packed = np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)
        parts.append(np.unpackbits(packed, count=details["n"][name]).astype(bool))
    return np.concatenate(parts)
