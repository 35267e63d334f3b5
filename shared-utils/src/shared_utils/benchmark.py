"""Speed against a peer: measured in turn, shown as a table of ratios, saved with machine, versions and raw samples.

`bench.json` (on a GPU `bench-cuda.json`) is for a benchmark what the run log `<scale>.jsonl` is for a table.
"""

from __future__ import annotations

import json
import operator
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import rich.table
import torch
from rich.markup import escape
from torch.utils.flop_counter import FlopCounterMode

from shared_utils import runlog
from shared_utils.files import whole_file
from shared_utils.folders import is_installed, runs_folder
from shared_utils.logging import console, progress

SAMPLE_MS = 20.0  # shorter work is called several times per sample
CAPTION = (
    "ratio: how many times faster or smaller ours is, median (min .. max); a target of 1/1.4 allows ours 1.4 times "
    "the peer's cost. ms: CPU time with one thread on a CPU, otherwise wall time; s: wall time"
)


@dataclass(frozen=True)
class Timing:
    """Samples of ours and of a peer, or only ours: a figure such as steps per second."""

    what: str
    peer: str | None
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    """the peer's samples, the same number as ours; none without a peer"""
    unit: str = "ms"
    target: str = ""
    """bound on the ratio (on our median without a peer), ">= 2" or "<= 120"; ">= 1/1.4" allows an overhead"""
    note: str = ""

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Median, min and max of the peer's cost divided by ours, over pairs of samples; None without a peer."""
        if self.peer is None:
            return None
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None if there is no target."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        above, _, below = bound.partition("/")
        value = self.ratio[0] if self.ratio else statistics.median(self.ours)
        return {">=": operator.ge, "<=": operator.le}[sign](value, float(above) / float(below or 1))


def in_turn(
    ours: Callable[[], object], peer: Callable[[], object] | None, repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Milliseconds per call of both (without a peer, only of ours), measured in turn `repeats` times after a warm-up.

    On a CPU with one thread this is the process's CPU time, which other programs affect least; otherwise wall time.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def milliseconds(work: Callable[[], object], calls: int) -> float:
        wait()
        start = clock()
        for _ in range(calls):
            work()
        wait()
        return 1e3 * (clock() - start) / calls

    contenders = [work for work in (ours, peer) if work]
    calls = []
    for work in contenders:
        work()
        calls.append(max(1, round(SAMPLE_MS / max(milliseconds(work, 1), 1e-3))))
    samples: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for sample, work, times in zip(samples, contenders, calls, strict=False):
            sample.append(milliseconds(work, times))
    return samples


def share_of_peak(work: Callable[[], object], milliseconds: Sequence[float], dtype: torch.dtype) -> str:
    """The FLOP/s of matrix products and convolutions that a call reaches, as a share of the CUDA device's peak.

    Args:
        work: the work that was timed.
        milliseconds: its samples.
        dtype: data type of the matrix product (8192 x 8192 by 8192 x 8192) that defines the device's peak.

    Returns:
        For example "41 % of 790 TFLOP/s (bfloat16)"; empty without CUDA.
    """
    if not torch.cuda.is_available():
        return ""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product, _ = in_turn(lambda: left @ right, None, 5, torch.device("cuda"))
    peak = 2 * 8192**3 / statistics.median(product)
    with FlopCounterMode(display=False) as counter:
        work()
    share = counter.get_total_flops() / statistics.median(milliseconds) / peak
    return f"{100 * share:.0f} % of {peak / 1e9:.0f} TFLOP/s ({str(dtype).removeprefix('torch.')})"


def report(
    project: str, timings: Iterable[Timing], root: Path, packages: Sequence[str], settings: dict[str, Any]
) -> None:
    """Measure (if `timings` is a generator), write `<root>/runs/bench.json` or bench-cuda.json, print the table.

    Args:
        project: name, as on the command line.
        timings: in the order of the table.
        root: the project's folder, in the checkout whose commit is recorded.
        packages: packages to record the versions of, including peers; exit code 1 if one is not installed.
        settings: settings of this measurement, such as its repeats.
    """
    source = runlog.provenance(root, packages)
    missing = [name for name in packages if name not in source["versions"]]
    if missing:
        raise SystemExit(f"{project}: {missing[0]} is missing: pip install {missing[0]}")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with progress() as bar:
        measured = [asdict(timing) for timing in bar.track(timings, description=f"{project} bench")]
    found = {"project": project, "started": started, "command": shlex.join([project, *sys.argv[1:]])}
    found |= source | {"threads": torch.get_num_threads(), "settings": settings, "timings": measured}
    path = runs_folder(root) / ("bench-cuda.json" if torch.cuda.is_available() else "bench.json")
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print_summary(summary([path]))


def summary(paths: Iterable[Path]) -> pd.DataFrame:
    """One line per timing of these bench.json files, with cells as text; `device` and `versions` say where."""
    lines = []
    for path in paths:
        found = json.loads(path.read_text())
        where = {"device": f"{found['device']}, threads: {found['threads']}"}
        where["versions"] = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        for each in (Timing(**timing) for timing in found["timings"]):
            line = {"project": found["project"], "what": each.what, "peer": each.peer or ""}
            line |= {"ours": _median(each.ours, each.unit), "peer's": _median(each.theirs, each.unit)}
            line["ratio"] = "{} ({} .. {})".format(*map(_digits, each.ratio)) if each.ratio else ""
            line |= {"target": each.target, "met": {True: "yes", False: "no", None: ""}[each.met], "note": each.note}
            lines.append(line | where)
    return pd.DataFrame(lines)


def print_summary(frame: pd.DataFrame) -> None:
    """Print a `summary` to stdout without its empty columns, and where each project was measured."""
    places = frame[["project", "device"]].drop_duplicates()
    shown = frame.drop(columns=["device", "versions"])
    shown = shown.loc[:, shown.any()]
    table = rich.table.Table(title="bench", caption=CAPTION)
    for name in shown:
        table.add_column(name, no_wrap=name not in ("what", "peer", "note"))
    for cells in shown.itertuples(index=False):
        table.add_row(*map(escape, cells))
    console().print(table)
    for project, device in places.itertuples(index=False):
        console().print(f"{project}: {device}", highlight=False)


def record(root: Path) -> int:
    """Move a project's finished runs and its benchmarks from runs/ to results/; returns the number of runs.

    RuntimeError if the working tree is not clean, or if one of them was measured on uncommitted code; ValueError
    outside a source checkout.
    """
    if is_installed(root):
        raise ValueError("results are recorded in a source checkout: install it with `pip install -e`")
    benches = sorted((root / "runs").glob("bench*.json"))
    for path in benches:
        if not json.loads(path.read_text())["clean"]:
            raise RuntimeError(f"runs/{path.name} was measured on uncommitted code: run bench again")
    scales = [path for path in sorted((root / "runs").glob("*.jsonl")) if path.stem != "smoke"]
    moves = [(runlog.RunLog(path), runlog.RunLog(root / "results" / path.name)) for path in scales]
    count = runlog.record(moves, root)
    for path in benches:
        path.replace(root / "results" / path.name)
    return count


def _median(sample: Sequence[float], unit: str) -> str:
    return f"{_digits(statistics.median(sample))} {unit}" if sample else ""


def _digits(value: float) -> str:
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


if __name__ == "__main__":
    print_summary(summary(map(Path, sys.argv[1:])))
