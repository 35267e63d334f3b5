"""`make drill`: SIGKILL every project's demo at five random times, restart it, and compare the final metrics.

The undisturbed run is the user's demo (runs/embedded.jsonl), which make completes first. The disturbed one starts
from scratch in a temporary worktree of the same commit. Metrics that are times (names ending in _ms or _seconds) differ
between any two runs and are excluded; all others must be bit-equal.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

from demo import SCALE, Job, side_by_side
from shared_utils.logging import get_logger, progress
from shared_utils.runlog import key_of, provenance
from workspace import ROOT, chosen, worktree

KILLS = 5
TIMES = ("_ms", "_seconds")
logger = get_logger("drill")


def drill(entries: list[dict], root: Path = ROOT) -> int:
    """Drill the projects of these entries of workspace.toml; exit code 0 if all final metrics are equal, otherwise 1.

    Appends one JSON line per project to runs/drill.jsonl.

    Raises:
        RuntimeError: uncommitted changes, or an undisturbed run that is not finished or used other code.
    """
    origin = provenance(root)
    if not origin["clean"]:
        raise RuntimeError("the working tree has uncommitted changes: commit them, then drill")
    for entry in entries:
        _check_undisturbed(Job(entry["name"], entry["package"], root), origin["commit"])
    origin["command"] = shlex.join(["make", "drill"])
    log, failures = root / "runs" / "drill.jsonl", 0
    beside, jobs = side_by_side(len(entries))
    with worktree(root) as copy, progress() as bar, ThreadPoolExecutor(beside) as pool:
        task = bar.add_task("drill", total=len(entries))
        pairs = [(Job(e["name"], e["package"], root), Job(e["name"], e["package"], copy)) for e in entries]
        for future in as_completed([pool.submit(_kill_and_compare, *pair, jobs) for pair in pairs]):
            line = future.result() | origin
            log.parent.mkdir(exist_ok=True)
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            failures += not line["equal"]
            bar.advance(task)
            logger.info("%s: %s", line["project"], "equal" if line["equal"] else f"DIFFERS: {line['differing']}")
    return int(failures > 0)


def _check_undisturbed(job: Job, commit: str) -> None:
    records = job.log.records()
    if job.left():
        raise RuntimeError(f"{job.name}: the undisturbed run is not finished: make demo PROJECT={job.name}")
    if any(record["commit"] != commit or not record["clean"] for record in records):
        raise RuntimeError(f"{job.name}: runs/{SCALE}.jsonl holds runs of other code: remove it, then run make demo")


def _kill_and_compare(undisturbed: Job, disturbed: Job, jobs: int) -> dict:
    """Kill at times drawn uniformly from the undisturbed duration; the last start runs to the end."""
    records = undisturbed.log.records()
    # excludes time spent waiting for other programs; otherwise the last kill could come after the end
    duration = sum(min(r["seconds"], r["cpu_seconds"]) for r in records) / (jobs or os.cpu_count() or 1)
    instants = sorted(random.uniform(0, duration) for _ in range(KILLS))
    runs_at_kill: list[int] = []
    for gap in (b - a for a, b in pairwise([0.0, *instants])):
        child = disturbed.start(jobs)
        try:
            child.wait(timeout=gap)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            runs_at_kill.append(len(disturbed.log.keys()))
    code = disturbed.start(jobs).wait()
    if code:
        logger.error("%s: exit code %d\n%s", disturbed.name, code, disturbed.output.read_text(errors="replace"))
    expected, found = ({key_of(r): r["metrics"] for r in rs} for rs in (records, disturbed.log.records()))
    differing = [
        f"{key[0]}, {key[1]}, seed {key[3]}: {metric}"
        for key, metrics in expected.items()
        for metric, value in metrics.items()
        if not metric.endswith(TIMES) and found.get(key, {}).get(metric) != value
    ]
    return {
        "project": undisturbed.name,
        "killed_at_seconds": [round(instant, 1) for instant in instants],
        "runs_at_kill": runs_at_kill,
        "runs": len(expected),
        "differing": differing,
        "equal": not code and not differing and len(runs_at_kill) == KILLS,
    }


if __name__ == "__main__":
    try:
        sys.exit(drill(chosen(sys.argv[1:])))
    except RuntimeError as error:
        sys.exit(f"drill: {error}")
