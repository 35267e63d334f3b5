"""Published | measured, and the verdict on each claim, from a table file and run logs only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from scipy import stats

from shared_utils.logging import console
from shared_utils.preflight import Need, unmet
from shared_utils.runlog import RunLog, key_of
from shared_utils.tables import Claim, Table

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """A claim judged at one scale: mean effect over seeds with its 95 % t interval."""

    claim: Claim
    scale: str
    verdict: str  # holds | fails | undecided | not measured
    effect: float | None = None
    low: float = float("-inf")
    high: float = float("inf")
    n_seeds: int = 0
    remark: str = ""
    """caveats of the claim's runs, and what Holm's correction changed"""
    p_value: float = 1.0
    """two-sided: of a t test for the nearest bound, or of Page's test for a trend"""

    @property
    def figures(self) -> str:
        """Effect, its interval and the number of seeds; empty if not measured."""
        if self.effect is None:
            return ""
        interval = f" [{number(self.low)}, {number(self.high)}]" if self.n_seeds > 1 else ""
        return f"{number(self.effect)}{interval}, n={self.n_seeds}"

    def __str__(self) -> str:
        parts = "; ".join(filter(None, [self.figures, self.remark, self.claim.note]))
        return f"{self.verdict}: {parts}" if self.figures else self.verdict


def number(value: float) -> str:
    """Three decimals below 100, fewer above, none from 1,000 on."""
    if abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def values(table: Table, scale: str, log: RunLog | None) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics by row and seed."""
    found = measured(table, scale, log)
    return {row: {seed: record["metrics"] for seed, record in seeds.items()} for row, seeds in found.items()}


def measured(table: Table, scale: str, log: RunLog | None) -> dict[str, dict[int, dict[str, Any]]]:
    """Records by row and seed; excludes those whose settings differ from the table's current ones."""
    if log is None or scale not in table.scales:
        return {}
    homes = {table.id, *(row.home.id for row in table.rows if row.home)}
    records = {key_of(record): record for record in log.records() if record["table"] in homes}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in table.rows_at(scale):
        home = row.home.id if row.home else table.id
        seeds = sorted({key[3] for key in records if key[:2] == (home, row.name)})
        for run in table.runs(scale, [row.name], seeds) if seeds else []:
            if run.key in records:
                found.setdefault(row.name, {})[run.seed] = records[run.key]
    return found


def interval(sample: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half width of the 95 % t interval; infinite half width for one value."""
    array = np.asarray(sample, dtype=float)
    if len(array) < 2:
        return float(array.mean()), float("inf")
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(half)


def judge(table: Table, scale: str, log: RunLog | None) -> list[Verdict]:
    """A verdict on every claim that the table makes at this scale, with Holm's correction over them."""
    found = measured(table, scale, log)
    claims = [claim for claim in table.claims if claim.scales is None or scale in claim.scales]
    return _holm([_judged(table, claim, scale, found) for claim in claims])


def _judged(table: Table, claim: Claim, scale: str, found: dict[str, dict[int, dict[str, Any]]]) -> Verdict:
    """The verdict on a claim by itself, before Holm's correction."""
    by_row = {row: _sample(found, row, claim.metric) for row in claim.named_rows}
    seeds = sorted(set.intersection(*map(set, by_row.values())))
    if not seeds:
        return Verdict(claim, scale, NOT_MEASURED)

    def metric(row: str) -> np.ndarray:
        return np.array([by_row[row][seed] for seed in seeds])

    low_bound, high_bound = -np.inf, np.inf
    if claim.better and claim.than:
        effect = metric(claim.better) - metric(claim.than)
        effect, low_bound = (-effect if table.metrics[claim.metric] == "lower" else effect), claim.margin
    elif claim.row:
        effect = metric(claim.row) - (metric(claim.minus) if claim.minus else 0)
        low_bound = -np.inf if claim.at_least is None else claim.at_least
        high_bound = np.inf if claim.at_most is None else claim.at_most
    else:
        order = np.array([metric(row) for row in claim.rows]).T  # (seeds, rows)
        sign = 1 if claim.trend == "rises" else -1
        effect = sign * np.array([_rank_correlation(each) for each in order])
        low_bound = 0.0
    mean, half = interval(effect)
    low, high = mean - half, mean + half
    rounding = 1e-9  # the mean of equal values may differ from them in the last digit
    open_below = bool(claim.better or claim.trend)
    reached = (effect > low_bound if open_below else effect >= low_bound - rounding) & (effect <= high_bound + rounding)
    records = [found[row][seed] for row in by_row for seed in seeds]
    remark = "; ".join(dict.fromkeys(caveat for record in records for caveat in record.get("caveats", ())))
    if claim.exact or (half == 0 and not claim.trend) or (claim.every_seed and not reached.all()):
        verdict, p_value = ("holds" if reached.all() else "fails"), 0.0
        low, high = (float(effect.min()), float(effect.max())) if claim.exact else (low, high)
    elif len(seeds) < 2:
        verdict, p_value = "undecided", 1.0
    elif claim.trend:
        verdict = "holds" if mean > 0 else "fails"
        p_value = 2 * float(stats.page_trend_test(sign * order if mean > 0 else -sign * order).pvalue)
    else:
        inside = min(mean - low_bound, high_bound - mean)
        verdict = "holds" if inside > 0 else "fails"
        error = half / stats.t.ppf(0.975, len(seeds) - 1)
        p_value = 2 * float(stats.t.sf(abs(inside) / error, len(seeds) - 1))
    return Verdict(claim, scale, verdict, mean, low, high, len(seeds), remark, p_value)


def _rank_correlation(values: np.ndarray) -> float:
    """Spearman's rho of the values against their order; 0 where all are equal, since they neither rise nor fall."""
    return float(stats.spearmanr(range(len(values)), values).statistic) if np.ptp(values) else 0.0


def _holm(alone: list[Verdict], level: float = 0.05) -> list[Verdict]:
    """Holm's correction: if a table makes several claims, only those are decided that survive it over all of them."""
    judged = [number for number, verdict in enumerate(alone) if verdict.effect is not None]
    corrected, decided = list(alone), True
    for rank, number in enumerate(sorted(judged, key=lambda number: alone[number].p_value)):
        verdict = alone[number]
        decided = decided and verdict.p_value <= level / (len(judged) - rank)
        if not decided:
            by_itself = verdict.p_value <= level
            remark = (
                f"{verdict.verdict} by itself, but not after Holm's correction for {len(judged)} claims"
                if by_itself
                else ""
            )
            remark = "; ".join(filter(None, [verdict.remark, remark]))
            corrected[number] = replace(verdict, verdict="undecided", remark=remark)
    return corrected


def comparison(table: Table, scale: str, ours: RunLog | None, yours: RunLog | None = None) -> pd.DataFrame:
    """One line per row and metric: published, ours, yours, agreement.

    Published figures are omitted at scales other than paper that do not say what they are `measured_on`. Runs with
    caveats have separate lines, with the caveats after the row's name and without a published figure.
    Agreement is "same" if common seeds give equal values (1e-6 relative), "agrees" if the 95 % intervals
    overlap, otherwise "differs"; empty if either is missing.
    """
    mine, other = measured(table, scale, ours), measured(table, scale, yours)
    beside_published = scale == "paper" or (scale in table.scales and table.scales[scale].measured_on)
    lines = []
    for row in table.rows_at(scale):
        records = [*mine.get(row.name, {}).values(), *other.get(row.name, {}).values()]
        kinds = dict.fromkeys([(), *(tuple(record.get("caveats", ())) for record in records)])
        for caveats, metric in itertools.product(kinds, table.metrics):
            a, b = (_sample(found, row.name, metric, caveats) for found in (mine, other))
            published, error = row.published.get(metric), row.published_error.get(metric)
            if caveats or not beside_published:
                published = None
            lines.append(
                {
                    "row": f"{row.name} ({'; '.join(caveats)})" if caveats else row.name,
                    "metric": metric,
                    "published": "" if published is None else _plus_minus(published, error),
                    "ours": _cell(a),
                    "yours": _cell(b),
                    "agreement": _agreement(a, b),
                }
            )
    return pd.DataFrame(lines, columns=["row", "metric", "published", "ours", "yours", "agreement"])


def _sample(
    found: dict[str, dict[int, dict[str, Any]]], row: str, metric: str, caveats: tuple[str, ...] | None = None
) -> dict[int, float]:
    """Values by seed of the runs with exactly these caveats; a row that another table runs may lack a metric."""
    records = {
        seed: record
        for seed, record in found.get(row, {}).items()
        if caveats is None or tuple(record.get("caveats", ())) == caveats
    }
    return {seed: record["metrics"][metric] for seed, record in records.items() if metric in record["metrics"]}


def _cell(sample: dict[int, float]) -> str:
    if not sample:
        return NOT_MEASURED
    mean, half = interval(list(sample.values()))
    return _plus_minus(mean, None if half == float("inf") else half)


def _plus_minus(value: float, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def _agreement(a: dict[int, float], b: dict[int, float]) -> str:
    if not a or not b:
        return ""
    common = a.keys() & b.keys()
    if common and all(np.isclose(a[seed], b[seed], rtol=1e-6, atol=1e-12) for seed in common):
        return "same"
    (mean_a, half_a), (mean_b, half_b) = interval(list(a.values())), interval(list(b.values()))
    return "agrees" if abs(mean_a - mean_b) <= half_a + half_b else "differs"


def print_table(table: Table, scale: str, ours: RunLog | None, yours: RunLog | None = None) -> None:
    """Print published | ours | yours with verdicts to stdout."""
    frame = comparison(table, scale, ours, yours)
    where = "; ".join(filter(None, [table.source, f"scale {scale}", *_heads(table, scale).values()]))
    shown = rich.table.Table(title=f"{table.id}: {table.title} ({where})", show_lines=False)
    shown.add_column("row", no_wrap=True)
    for metric in table.metrics:
        shown.add_column(f"{metric.replace('_', ' ')}\npublished | ours | yours", justify="right")
    shown.add_column("yours\nvs ours")
    for row, lines in frame.groupby("row", sort=False):
        cells = [f"{_short(x.published)} | {_mean(x.ours)} | {_mean(x.yours)}" for x in lines.itertuples()]
        words = set(lines.agreement) - {""}
        shown.add_row(row, *cells, next((word for word in ("differs", "agrees", "same") if word in words), ""))
    out = console()
    out.print(shown)
    for verdict in judge(table, scale, yours if yours is not None else ours):
        out.print(f"  {verdict.verdict.upper():<12} {verdict.claim.text} ({verdict})", highlight=False)


def _heads(table: Table, scale: str) -> dict[str, str]:
    """Column headings with what the published and our figures were measured on."""
    on = table.scales[scale].measured_on if scale in table.scales else ""
    return {
        "published": f"published: {table.published_on}" if table.published_on else "",
        "measured": f"measured: {on}" if on else "",
    }


def duration(seconds: float) -> str:
    """A readable duration: "3 d 4 h", "2 h 5 min", "12 min", "8 s"."""
    left, parts = max(1, round(seconds if seconds < 600 else seconds / 60)), []
    left = left if seconds < 600 else left * 60
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def print_missing(
    tables: Sequence[Table],
    scale: str,
    rows: Sequence[str],
    seeds: Sequence[int],
    log: RunLog,
    needs: Callable[[dict[str, Any]], Iterable[Need]] | None = None,
    *,
    force: bool = False,
) -> None:
    """Print for --dry-run: how many runs of each table a log lacks, how long they may take and what is missing.

    Args:
        tables: tables to run.
        scale: for example "embedded".
        rows: run only these rows; default: all.
        seeds: use these seeds; default: those of the tables.
        log: where finished runs are.
        needs: see `run_missing`.
        force: count all runs, also those in the log.
    """
    done, total, lacking = set() if force else log.keys(), 0.0, []
    shown = rich.table.Table("table", "missing runs", "expected time")
    for table in tables:  # a run that two tables show is counted at the first of them
        missing = {run.key: run for run in table.runs(scale, rows, seeds or None) if run.key not in done}
        homes = {home.id: home.scales[scale] for home in (row.home or table for row in table.rows_at(scale))}
        seconds = sum(homes[run.table].expected_seconds or 0 for run in missing.values())
        done, total = done | missing.keys(), total + seconds
        shown.add_row(table.id, str(len(missing)), duration(seconds) if seconds else "")
        lacking += [need for run in missing.values() for need in needs(run.settings)] if needs else []
    shown.add_row("all", "", duration(total) if total else "")
    out = console()
    out.print(shown)
    for line in unmet(lacking):
        out.print(f"missing: {line}", highlight=False)


def _short(cell: str) -> str:
    return "-" if cell in (NOT_MEASURED, "") else cell


def _mean(cell: str) -> str:
    return _short(cell.split(" ±")[0])


def results_page(title: str, tables: Sequence[Table], results: Path, command: str) -> str:
    """The whole RESULTS.md of a project.

    Args:
        title: title of the page.
        tables: all tables of the project.
        results: folder with <scale>.jsonl and figures/<table>.png.
        command: for example "prdc-metrics run".
    """
    parts = [
        f"# {title}: results",
        "Generated from the run logs in this folder by `make tables`; edits are overwritten. "
        "Measured cells are means over seeds ± half the 95 % t interval.",
    ]
    for table in tables:
        parts.append(f"## {table.id}: {table.title}\n\n{table.source}." + (f" {table.note}" if table.note else ""))
        if (results / "figures" / f"{table.id}.png").exists():
            parts.append(f"![{table.id}](figures/{table.id}.png)")
        for scale in table.scales:
            if scale != "smoke":
                parts.append(_section(table, scale, RunLog(results / f"{scale}.jsonl"), command))
    return "\n\n".join(parts) + "\n\n" + _origin(results)


def _section(table: Table, scale: str, log: RunLog, command: str) -> str:
    how = f"### {table.id}, scale {scale}\n\n`{command} {table.id} --scale {scale}`"
    found = values(table, scale, log)
    verdicts = pd.DataFrame([{"claim": v.claim.text, "verdict": str(v)} for v in judge(table, scale, log)])
    claims = "" if verdicts.empty else "\n\n" + verdicts.to_markdown(index=False)
    if not found and not any(row.published for row in table.rows_at(scale)):
        return f"{how}\n\nNot measured.{claims}"
    frame = comparison(table, scale, log)
    frame["metric"] = frame["metric"].str.replace("_", " ")
    heads = _heads(table, scale)
    wide = pd.DataFrame({"row": frame.row.unique()})
    for metric, lines in frame.groupby("metric", sort=False):
        if frame.published.any():
            wide[f"{metric}: {heads['published'] or 'published'}"] = lines.published.replace("", "–").to_numpy()
        wide[f"{metric}: {heads['measured'] or 'measured'}"] = lines.ours.to_numpy()
    seeds = sorted({len(each) for each in found.values()})
    count = f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'}" if seeds else NOT_MEASURED
    return f"{how} ({count})\n\n{wide.to_markdown(index=False, disable_numparse=True)}{claims}"


def _origin(results: Path) -> str:
    lines = []
    for path in sorted(results.glob("*.jsonl")):
        records = RunLog(path).records()
        for name in sorted({(r["device"], r["threads"], r["commit"], tuple(r["versions"].items())) for r in records}):
            device, threads, commit, versions = name
            packages = ", ".join(f"{package} {version}" for package, version in versions)
            lines.append(f"- {path.name}: {device}, {threads} threads, {packages}, commit {str(commit)[:12]}")
    return "## Where the numbers come from\n\n" + "\n".join(lines or ["No run is recorded yet."]) + "\n"
