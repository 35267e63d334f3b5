"""`make rehearse`: run each table of a project at paper scale, end to end, on tiny archives in a temporary copy.

A table without that scale is rehearsed at the scale that rehearsal.toml names under [scales].

The copy is a separate git repository, in which the counts of the table files are reduced as rehearsal.toml says. There
the project's command line writes the archives, runs the tables, and records the runs, which also draws the pages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.table
import tomli_w

from shared_utils.logging import console
from shared_utils.report import NOT_MEASURED, duration, judge, values
from shared_utils.runlog import RunLog
from shared_utils.tables import load_tables

SCALE = "paper"


@dataclass(frozen=True)
class Rehearsed:
    """Result of rehearsing one table."""

    table: str
    seconds: float
    problem: str = ""
    """the first thing that went wrong"""
    impossible: str = ""
    """why it cannot be rehearsed"""

    @property
    def passed(self) -> bool:
        """Whether each row has its metrics, each claim has a verdict, and the figure was drawn."""
        return not (self.problem or self.impossible)


def rehearse(project: Path, tables: Sequence[str] = (), debug: bool = False) -> list[Rehearsed]:
    """Run a project's tables at scale paper, or as named, on tiny archives; nothing in the project itself changes.

    Args:
        project: the project's folder, with rehearsal.toml.
        tables: table ids; default: all tables with such a scale.
        debug: show tracebacks and all output of the commands.

    Raises:
        ValueError: a table that the project lacks, or that lacks this scale.
    """
    project = Path(project).resolve()
    plan = tomllib.loads((project / "rehearsal.toml").read_text())
    scales = plan.get("scales", {})
    known = {each.id for each in load_tables(project / "tables") if scales.get(each.id, SCALE) in each.scales}
    if unknown := [name for name in tables if name not in known]:
        raise ValueError(f"{project.name} rehearses no table {unknown[0]!r}; it rehearses {', '.join(sorted(known))}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / project.name
        ignored = shutil.ignore_patterns(".venv", "runs", "results", "tests", "__pycache__", ".*_cache")
        shutil.copytree(project, copy, ignore=ignored)
        for path in (copy / "tables").glob("*.toml"):
            raw, scale = tomllib.loads(path.read_text()), scales.get(path.stem, SCALE)
            if scale in raw["scale"]:
                own = plan.get("table", {}).get(path.stem, {})
                smaller = plan.get("counts", {}) | plan.get("networks", {}) | own
                path.write_text(tomli_w.dumps(shrunk(raw, smaller, plan.get("rows", {}), plan.get("seeds", 1), scale)))
        (copy / ".gitignore").write_text("runs/\n__pycache__/\n")
        author = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost"]
        for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "rehearsal"]):
            subprocess.run(["git", "-C", copy, *words], check=True)
        sources = [str(copy / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sources),
            # users' paths have spaces, commas and umlauts
            "DATA_ROOT": str(Path(folder) / "tiny archives, groß"),
        }
        figures = sorted(path.stem for path in (project / "results" / "figures").glob("*.png"))
        orders = {"tables": list(tables), "impossible": plan.get("impossible", {}), "figures": figures, "debug": debug}
        orders["scales"] = scales
        words = [sys.executable, "-m", "shared_utils.rehearsal", "--inside", json.dumps(orders), str(copy)]
        done = subprocess.run(words, env=environment, cwd=copy, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{project.name}: the rehearsal ended early: {done.stdout.strip()[-2000:]}")
        return [Rehearsed(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def shrunk(
    raw: dict[str, Any], smaller: dict[str, Any], in_rows: dict[str, Any], seeds: int, scale: str = SCALE
) -> dict[str, Any]:
    """A table file with only the first seeds, and with each named setting of one scale reduced if it is larger.

    Settings of in_rows are replaced in rows that have them; other rows do not get them.
    """

    def replaced(value: Any, new: dict[str, Any], name: str = "") -> Any:
        if name in new:
            both_counts = isinstance(value, int | float) and isinstance(new[name], int | float)
            return min(value, new[name]) if both_counts and not isinstance(value, bool) else new[name]
        if isinstance(value, dict):
            return {key: replaced(each, new, key) for key, each in value.items()}
        return [replaced(each, new) for each in value] if isinstance(value, list) else value

    whole = smaller | replaced(raw["scale"][scale], smaller)
    rows = [
        row
        | {
            part: replaced(row[part], smaller | in_rows)
            for part in ("run", scale)
            if part in row and "runs_of" not in row
        }
        for row in raw["row"]
    ]
    return raw | {"row": rows, "scale": raw["scale"] | {scale: whole | {"seeds": whole["seeds"][:seeds]}}}


def _inside(copy: Path, orders: dict[str, Any]) -> list[Rehearsed]:
    """Rehearse in the copy, with its command line."""
    package = next(path.parent.name for path in (copy / "src").glob("*/cli.py"))
    cli = importlib.import_module(f"{package}.cli")
    if not Path(cli.__file__ or "").is_relative_to(copy):
        raise RuntimeError(f"{package} was imported from {cli.__file__}, not from the copy")

    def call(*words: str) -> str:
        """Why the command failed; empty if it did not."""
        sys.argv = [package, *words, *(["--debug"] if orders["debug"] else [])]
        shown = io.StringIO()
        try:
            with contextlib.ExitStack() as stack:
                if orders["debug"]:
                    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                else:
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stderr(shown))
                cli.main()
        except SystemExit as end:
            if end.code:
                return f"`{' '.join(words)}` ended with {end.code}: {' '.join(shown.getvalue().split())[-500:]}"
        return ""

    problem = call("data", "--tiny", os.environ["DATA_ROOT"])
    if problem:
        raise RuntimeError(problem)
    root = Path(os.environ["DATA_ROOT"])
    for path in (root, *root.rglob("*")):  # archives are often where the user cannot write
        path.chmod(path.stat().st_mode & ~0o222)
    scale_of = {table.id: orders["scales"].get(table.id, SCALE) for table in load_tables(copy / "tables")}
    known = [table for table in load_tables(copy / "tables") if scale_of[table.id] in table.scales]
    chosen = [table for table in known if not orders["tables"] or table.id in orders["tables"]]
    jobs = ["--jobs", "1"] if "jobs" in cli.Run.__dataclass_fields__ else []
    seconds, problems = {}, {}
    for table in chosen:
        begin = time.perf_counter()
        if table.id not in orders["impossible"]:
            problems[table.id] = call("run", table.id, "--scale", scale_of[table.id], *jobs)
        seconds[table.id] = round(time.perf_counter() - begin, 1)
        told = problems.get(table.id) or "ran"
        print(f"{copy.name} {table.id}: {told}, {duration(seconds[table.id])}", file=sys.stderr, flush=True)
    closing = call("record")  # also draws the tables
    drawn = set(getattr(importlib.import_module(f"{package}.figures"), "DRAW", ())) | set(orders["figures"])
    found = []
    for table in chosen:
        if table.id in orders["impossible"]:
            found.append(Rehearsed(table.id, 0.0, impossible=orders["impossible"][table.id]))
            continue
        problem = problems[table.id] or closing or _lacking(table, scale_of[table.id], copy / "results")
        if not problem and table.id in drawn and not (copy / "results" / "figures" / f"{table.id}.png").exists():
            problem = "its figure was not drawn"
        found.append(Rehearsed(table.id, seconds[table.id], problem))
    return found


def _lacking(table: Any, scale: str, results: Path) -> str:
    """The first metric or verdict that is missing."""
    log = RunLog(results / f"{scale}.jsonl")
    measured = values(table, scale, log)
    for row in table.rows_at(scale):
        if row.name not in measured:
            return f"row {row.name!r} has no record"
        for metric in set(table.metrics) & set((row.home or table).metrics):
            if not all(math.isfinite(metrics.get(metric, math.nan)) for metrics in measured[row.name].values()):
                return f"row {row.name!r} has no finite {metric}"
    without = [verdict.claim.text for verdict in judge(table, scale, log) if verdict.verdict == NOT_MEASURED]
    return f"no verdict on {without[0]!r}" if without else ""


def main() -> None:
    """Exit code: 0 if all passed, 1 if one did not, 2 for an unknown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("project", type=Path, help="folder of the project")
    parser.add_argument("tables", nargs="*", help="table ids; default: all")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all output")
    parser.add_argument("--inside", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        print(json.dumps([asdict(each) for each in _inside(options.project, options.inside)]))
        return
    try:
        found = rehearse(options.project, options.tables, options.debug)
    except ValueError as error:
        parser.error(str(error))
    shown = rich.table.Table("table", "time", "rehearsed", title=options.project.resolve().name)
    for each in found:
        word = "passed" if each.passed else f"impossible: {each.impossible}" if each.impossible else each.problem
        shown.add_row(each.table, duration(each.seconds), word)
    console().print(shown)
    sys.exit(int(any(each.problem for each in found)))


if __name__ == "__main__":
    main()
