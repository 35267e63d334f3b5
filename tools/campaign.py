"""`make campaign MINUTES=10`: from the top of campaign.toml, run what fits into the time, and show what is new.

A unit is one seed of an entry. Units of one entry run side by side where it says so (small networks leave a GPU idle).
No unit starts that would not end in time; what still runs at the limit is interrupted, and the next campaign goes on
from its checkpoint. What is in runs/ or results/ is not run again.
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
    """One line of the campaign: rows of a table, and what a seed of them is expected to take."""

    project: str
    table: str
    scale: str
    minutes: float
    """of one seed of all rows, on one GPU"""
    why: str
    rows: list[str] | None = None
    seeds: list[int] | None = None
    together: int = 1
    """seeds that run side by side"""
    root: Path = ROOT
    package: str = field(init=False)
    found: Table = field(init=False)
    measured: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        by_name = {each["name"]: each["package"] for each in projects(root=self.root)}
        if self.project not in by_name:
            raise ValueError(f"campaign.toml: no built project {self.project!r}; built: {', '.join(by_name)}")
        self.package = by_name[self.project]
        tables = {each.id: each for each in load_tables(self.root / self.project / "tables")}
        if self.table not in tables or self.scale not in tables[self.table].scales:
            raise ValueError(f"campaign.toml: {self.project} has no {self.table} at scale {self.scale}")
        self.found = tables[self.table]
        self.seeds = self.seeds or list(self.found.scales[self.scale].seeds)
        self.found.runs(self.scale, self.rows, self.seeds)  # an unknown row is an error before anything runs

    def log(self, folder: str) -> RunLog:
        """The run log at this scale, in runs or results."""
        return RunLog(self.root / self.project / folder / f"{self.scale}.jsonl")

    def missing(self, seed: int) -> list[Run]:
        """Its runs of a seed that are in no log."""
        known = self.log("runs").keys() | self.log("results").keys()
        return [run for run in self.found.runs(self.scale, self.rows, [seed]) if run.key not in known]

    def expected(self, seed: int) -> float:
        """Seconds for what is missing of a seed: as measured in this campaign, else as listed."""
        runs = len(self.found.runs(self.scale, self.rows, [seed]))
        usual = max(self.measured) if self.measured else self.minutes * 60 / runs
        return usual * len(self.missing(seed))

    @property
    def output(self) -> Path:
        """What the commands of this project printed."""
        return self.log("runs").path.with_name("campaign.log")

    def start(self, seed: int) -> subprocess.Popen:
        """The project's own command line, in a session of its own."""
        sources = [str(self.root / name / "src") for name in (self.project, "shared-utils")]
        command = [sys.executable, "-m", self.package, "run", self.table, "--scale", self.scale, "--jobs", "1"]
        command += ["--seeds", str(seed), *(["--rows", *self.rows] if self.rows else [])]
        self.output.parent.mkdir(exist_ok=True)
        with open(self.output, "a") as out:
            return subprocess.Popen(
                command,
                cwd=self.root / self.project,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sources), "CI": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored under nohup ... &
            )


@dataclass
class Unit:
    """A seed of an entry that is running."""

    entry: Entry
    seed: int
    runs: int = field(init=False)
    started: float = field(init=False)
    child: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.runs = len(self.entry.missing(self.seed))
        self.started = time.monotonic()
        self.child = self.entry.start(self.seed)

    def ended(self) -> bool:
        """Say how it ended; whether it failed."""
        if self.child.returncode == 0:
            self.entry.measured.append((time.monotonic() - self.started) / self.runs)
            return False
        if self.child.returncode in (-signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGINT):
            print(f"{_name(self.entry, self.seed)}: interrupted at the limit; the next campaign goes on")
            return False
        printed = self.entry.output.read_text(errors="replace")[-2000:]
        print(f"{_name(self.entry, self.seed)}: exit code {self.child.returncode}\n{printed}", file=sys.stderr)
        return True


def read_entries(path: Path, root: Path = ROOT) -> list[Entry]:
    """The list, in its order. ValueError for an unknown key, project, table or scale."""
    known = ["project", "table", "scale", "minutes", "why", "rows", "seeds", "together"]
    entries = []
    for body in tomllib.loads(path.read_text())["entry"]:
        if unknown := [key for key in body if key not in known]:
            raise ValueError(f"{path.name}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        entries.append(Entry(**body, root=root))
    return entries


def campaign(entries: list[Entry], seconds: float) -> int:
    """Run units until the time is over; 0, or 1 when a unit failed."""
    end = time.monotonic() + seconds
    before = {id(entry): entry.log("runs").keys() for entry in entries}
    failed = False
    for entry in entries:
        waiting = [seed for seed in entry.seeds or [] if entry.missing(seed)]
        running: list[Unit] = []
        while waiting or running:
            for seed in list(waiting):
                if len(running) >= entry.together:
                    break
                waiting.remove(seed)
                if time.monotonic() + entry.expected(seed) <= end:
                    print(f"{_name(entry, seed)}: {duration(entry.expected(seed))}; {entry.why}", flush=True)
                    running.append(Unit(entry, seed))
                else:
                    print(f"{_name(entry, seed)}: left for a longer campaign ({duration(entry.expected(seed))})")
            time.sleep(POLL_SECONDS)
            if time.monotonic() > end:
                _interrupt([unit.child for unit in running])
            for unit in [unit for unit in running if unit.child.poll() is not None]:
                running.remove(unit)
                failed |= unit.ended()
        if time.monotonic() > end:
            break
    _show(entry for entry in entries if entry.log("runs").keys() - before[id(entry)])
    return int(failed)


def _name(entry: Entry, seed: int) -> str:
    return f"{entry.project} {entry.table} {entry.scale} seed {seed}"


def _interrupt(children: list[subprocess.Popen]) -> None:
    for child in children:
        child.send_signal(signal.SIGINT)
    for child in children:
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _show(entries: Iterable[Entry]) -> None:
    for entry in entries:
        print_table(entry.found, entry.scale, entry.log("results"), entry.log("runs"))


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
