"""`make campaign MINUTES=10`: run what fits into the time, from the top of campaign.toml, and show the new results.

A unit is one command: one seed of an entry, or all its seeds if one process trains them stacked. Units of one or more
entries run in parallel as long as their shares of the GPU add up to at most one (small networks leave a GPU idle).
A unit starts only if it should end in time; units still running at the limit are interrupted, and the next campaign
resumes from their checkpoints. Runs that are already in runs/ or results/ are not repeated.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shared_utils.report import duration, print_table
from shared_utils.runlog import RunLog
from shared_utils.tables import Run, Table, load_tables
from workspace import ROOT, projects

POLL_SECONDS = 0.2
GRACE_SECONDS = 20  # from the interrupt at the limit to the kill


@dataclass
class Entry:
    """One entry of the campaign: rows of tables, and the expected time of a unit."""

    project: str
    tables: list[str]
    scale: str
    minutes: float
    """expected time of one unit on one GPU"""
    why: str
    rows: list[str] | None = None
    seeds: list[int] | None = None
    together: int = 1
    """number of units that one GPU can run in parallel"""
    jobs: int | None = None
    """number of processes of a single unit that trains all seeds stacked; None: one unit per seed"""
    root: Path = ROOT
    package: str = field(init=False)
    found: list[Table] = field(init=False)
    measured: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        by_name = {each["name"]: each["package"] for each in projects(root=self.root)}
        if self.project not in by_name:
            raise ValueError(f"no built project {self.project!r}; built: {', '.join(by_name)}")
        self.package = by_name[self.project]
        known = {each.id: each for each in load_tables(self.root / self.project / "tables")}
        there = [name for name, table in known.items() if self.scale in table.scales]
        for name in self.tables:
            if name not in there:
                found = ", ".join(there) or "none"
                raise ValueError(f"{self.project} has no {name} at scale {self.scale}; tables at this scale: {found}")
        self.found = [known[name] for name in self.tables]
        self.seeds = self.seeds or list(self.found[0].scales[self.scale].seeds)
        if not self.runs(self.seeds):  # this also raises for an unknown row
            raise ValueError(f"none of the rows {', '.join(self.rows or [])} is at scale {self.scale}")

    @property
    def units(self) -> list[list[int]]:
        """Seeds of each unit."""
        seeds = self.seeds or []
        return [seeds] if self.jobs else [[seed] for seed in seeds]

    def runs(self, seeds: list[int]) -> list[Run]:
        """All runs of the entry with these seeds."""
        return [run for table in self.found for run in table.runs(self.scale, self.rows, seeds)]

    def log(self, folder: str) -> RunLog:
        """The run log at this scale, in runs or results."""
        return RunLog(self.root / self.project / folder / f"{self.scale}.jsonl")

    def missing(self, seeds: list[int]) -> list[Run]:
        """Runs of the entry with these seeds that are in no log."""
        known = self.log("runs").keys() | self.log("results").keys()
        return [run for run in self.runs(seeds) if run.key not in known]

    def expected(self, seeds: list[int]) -> float:
        """Expected seconds for a unit's missing runs: as measured in this campaign, otherwise as listed."""
        usual = max(self.measured) if self.measured else self.minutes * 60 / len(self.runs(seeds))
        return usual * len(self.missing(seeds))

    def name(self, seeds: list[int]) -> str:
        """Start of an output line about this unit."""
        return f"{self.project} {' '.join(self.tables)} {self.scale} seed {' '.join(map(str, seeds))}"

    @property
    def output(self) -> Path:
        """Output of this project's commands."""
        return self.log("runs").path.with_name("campaign.log")

    def start(self, seeds: list[int]) -> subprocess.Popen:
        """Start the project's command line, in a separate session."""
        sources = [str(self.root / name / "src") for name in (self.project, "shared-utils")]
        path = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", self.package, "run", *self.tables, "--scale", self.scale]
        command += ["--jobs", str(self.jobs or 1), "--seeds", *map(str, seeds)]
        command += ["--rows", *self.rows] if self.rows else []
        threads = max(1, (os.cpu_count() or 1) // (self.together * (self.jobs or 1)))
        self.output.parent.mkdir(exist_ok=True)
        with open(self.output, "a") as out:
            return subprocess.Popen(
                command,
                cwd=self.root / self.project,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONPATH": path, "CI": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored under nohup ... &
            )


@dataclass
class Unit:
    """A running command of an entry."""

    entry: Entry
    seeds: list[int]
    runs: int = field(init=False)
    started: float = field(init=False)
    child: subprocess.Popen = field(init=False)
    interrupted: bool = field(default=False, init=False)
    """the campaign ended it at its limit"""

    def __post_init__(self) -> None:
        self.runs = len(self.entry.missing(self.seeds))
        self.started = time.monotonic()
        self.child = self.entry.start(self.seeds)

    def ended(self) -> bool:
        """Print how the unit ended; return whether it failed."""
        if self.child.returncode == 0:
            seconds = time.monotonic() - self.started
            self.entry.measured.append(seconds / self.runs)
            print(f"{self.entry.name(self.seeds)}: {self.runs} runs in {duration(seconds)}", flush=True)
            return False
        if self.interrupted and self.child.returncode in (-signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGINT):
            print(f"{self.entry.name(self.seeds)}: interrupted at the limit; the next campaign resumes it")
            return False
        printed = self.entry.output.read_text(errors="replace")[-2000:]
        print(f"{self.entry.name(self.seeds)}: exit code {self.child.returncode}\n{printed}", file=sys.stderr)
        return True


def read_entries(path: Path, root: Path = ROOT) -> list[Entry]:
    """The entries, in order. ValueError for no entry, or a missing or unknown key, project, table, row or scale."""
    needed = ["project", "tables", "scale", "minutes", "why"]
    known = [*needed, "rows", "seeds", "together", "jobs"]
    entries: list[Entry] = []
    listed = tomllib.loads(path.read_text())
    if listed.keys() != {"entry"}:
        raise ValueError(f"{path.name}: expected [[entry]] and nothing else, got {', '.join(listed) or 'nothing'}")
    for number, body in enumerate(listed["entry"], start=1):
        where = f"{path.name}, entry {number}"
        if unknown := [key for key in body if key not in known]:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        if missing := [key for key in needed if key not in body]:
            raise ValueError(f"{where}: {missing[0]} is missing")
        try:
            entries.append(Entry(**body, root=root))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return entries


def campaign(entries: list[Entry], seconds: float) -> int:
    """Run units until the time is over; exit code 1 if a unit failed, otherwise 0."""
    end = time.monotonic() + seconds
    before = {id(entry): entry.log("runs").keys() for entry in entries}
    waiting = [(entry, seeds) for entry in entries for seeds in entry.units if entry.missing(seeds)]
    running: list[Unit] = []
    failed = False
    while waiting or running:
        while waiting and sum(1 / unit.entry.together for unit in running) + 1 / waiting[0][0].together < 1.001:
            entry, seeds = waiting.pop(0)
            expected = entry.expected(seeds)
            if time.monotonic() + expected <= end:
                print(f"{entry.name(seeds)}: {duration(expected)}; {entry.why}", flush=True)
                running.append(Unit(entry, seeds))
            else:
                print(f"{entry.name(seeds)}: left for a longer campaign ({duration(expected)})")
        time.sleep(POLL_SECONDS)
        if time.monotonic() > end:
            _interrupt(running)
        for unit in [unit for unit in running if unit.child.poll() is not None]:
            running.remove(unit)
            failed |= unit.ended()
    _show(entry for entry in entries if entry.log("runs").keys() - before[id(entry)])
    return int(failed)


def _interrupt(units: list[Unit]) -> None:
    for unit in units:
        unit.interrupted = True
        unit.child.send_signal(signal.SIGINT)
    for unit in units:
        try:
            unit.child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(unit.child.pid, signal.SIGKILL)
            unit.child.wait()


def _show(entries: Iterable[Entry]) -> None:
    for entry in entries:
        for table in entry.found:
            print_table(table, entry.scale, entry.log("results"), entry.log("runs"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--list", type=Path, default=ROOT / "campaign.toml")
    given = parser.parse_args()
    try:
        sys.exit(campaign(read_entries(given.list), given.minutes * 60))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
