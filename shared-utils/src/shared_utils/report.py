"""Published | measured, and the verdict on each claim, from a table file and run logs alone."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rich.table
from rich.text import Text
from scipy import stats

from shared_utils.logging import console
from shared_utils.runlog import RunLog
from shared_utils.tables import Claim, Table

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """A claim judged at one scale: mean effect over paired seeds; low and high end its 95 % t interval.

    `verdict` is "holds" or "fails" where the whole interval lies on that side, else "undecided" (one seed has no
    interval), or "not measured".
    """

    claim: Claim
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    n_seeds: int
    scale: str


def samples(table: Table, scale: str, log: RunLog | None) -> dict[tuple[str, str], dict[int, float]]:
    """(row, metric) -> seed -> value, from the records whose settings are the table's present ones."""
    hashes = {run.row: run.key for run in table.runs(scale)} if log else {}
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in log.records() if log else ():
        key = record["table"], record["row"], record["scale"], record["settings_hash"]
        if key in hashes:
            for metric, value in record["metrics"].items():
                found.setdefault((record["row"], metric), {})[record["seed"]] = value
    return found


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval; NaN for the half width of one value."""
    values = np.fromiter(values, dtype=float)
    if len(values) == 1 or np.ptp(values) == 0:  # equal values: no rounding error of the mean may decide a claim
        return float(values[0]), 0.0 if len(values) > 1 else math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def measured(table: Table, scale: str, log: RunLog) -> pd.DataFrame:
    """Rows by (metric, "mean" | "half_width" | "n"): half width of the 95 % t interval over n seeds; NaN, NaN, 0 if none."""
    found = samples(table, scale, log)
    lines = {
        row.name: {
            (metric, name): value
            for metric in table.metrics
            for name, value in _statistics(found.get((row.name, metric), {})).items()
        }
        for row in table.rows_at(scale)
    }
    return pd.DataFrame.from_dict(lines, orient="index")
