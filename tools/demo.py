"""`make demo`: run every project's tables at embedded scale, projects in parallel, with one progress display.

Each project is a separate command, `python -m <package> run --scale embedded`, which resumes from its runs/. So the
next demo continues one that was interrupted or killed.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared_utils.logging import quiet
from shared_utils.runlog import RunLog, key_of
from shared_utils.tables import load_tables
from workspace import ROOT, chosen

SCALE = "embedded"
POLL_SECONDS = 0.5
INTERRUPTED = 130


@dataclass
class Job:
    """One project's share of the demo."""

    name: str
    package: str
    root: Path = ROOT
    cost: dict[tuple, float] = field(init=False)  # seconds that each wanted run is expected to take
    _size: int = -1
    _left: float = 0.0

    def __post_init__(self) -> None:
        tables = [table for table in load_tables(self.root / self.name / "tables") if SCALE in table.scales]
        wanted = {run.key for table in tables for run in table.runs(SCALE)}
        ours = RunLog(self.root / self.name / "results" / f"{SCALE}.jsonl").records()
        known = {key_of(record): record["cpu_seconds"] for record in ours if key_of(record) in wanted}
        usual = statistics.fmean(known.values()) if known else 1.0
        self.cost = {key: known.get(key, usual) for key in wanted}

    @property
    def log(self) -> RunLog:
        """The user's runs."""
        return RunLog(self.root / self.name / "runs" / f"{SCALE}.jsonl")

    @property
    def output(self) -> Path:
        """Output of the project's last start."""
        return self.log.path.with_name("demo.log")

    @property
    def total(self) -> float:
        """Expected seconds of all runs."""
        return sum(self.cost.values())

    def left(self) -> float:
        """Expected seconds of the runs that are not in the log yet."""
        size = self.log.path.stat().st_size if self.log.path.exists() else 0
        if size != self._size:
            self._size, done = size, self.log.keys()
            self._left = sum(cost for key, cost in self.cost.items() if key not in done)
        return self._left

    def start(self, jobs: int) -> subprocess.Popen:
        """Run what is missing in `jobs` processes (0: the project decides), in a separate session."""
        self.output.parent.mkdir(exist_ok=True)
        sources = [str(self.root / name / "src") for name in (self.name, "shared-utils")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sources)}
        if jobs == 1:
            environment["OMP_NUM_THREADS"] = "1"
        with open(self.output, "w") as out:
            return subprocess.Popen(
                [sys.executable, "-m", self.package, "run", "--scale", SCALE, "--jobs", str(jobs)],
                cwd=self.root / self.name,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, and only through this process
            )


def side_by_side(projects: int) -> tuple[int, int]:
    """How many projects run in parallel, and the processes of each: one project at a time if there is a GPU."""
    cores = os.cpu_count() or 1
    beside = 1 if torch.cuda.is_available() else min(projects, cores)
    return beside, -(-cores // beside) if beside > 1 else 0


def demo(entries: list[dict], root: Path = ROOT) -> int:
    """Run the projects of these entries of workspace.toml; exit code of the first that fails, otherwise 0."""
    everyone = [Job(entry["name"], entry["package"], root) for entry in entries]
    waiting = sorted(everyone, key=Job.left, reverse=True)  # longest first, so that no long one runs alone at the end
    running: list[tuple[Job, subprocess.Popen]] = []
    codes: list[int] = []
    beside, jobs = side_by_side(len(everyone))
    with _display() as bar:
        overall = bar.add_task("demo", total=sum(job.total for job in everyone))
        lines = {job.name: bar.add_task(f"  {job.name}", total=job.total, start=False) for job in everyone}
        try:
            while waiting or running:
                while waiting and len(running) < beside:
                    job = waiting.pop(0)
                    last = len(waiting) < beside  # it may soon run alone: let it use every core
                    running.append((job, job.start(jobs * beside if last else jobs)))
                    bar.start_task(lines[job.name])
                time.sleep(POLL_SECONDS)
                for job in everyone:
                    bar.update(lines[job.name], completed=job.total - job.left())
                bar.update(overall, completed=sum(job.total - job.left() for job in everyone))
                for job, child in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, child))
                    codes.append(_shell_code(child.returncode))
                    bar.stop_task(lines[job.name])
                    print(job.output.read_text(errors="replace"), flush=True)
        except KeyboardInterrupt:
            _interrupt([child for _, child in running])
            print("Interrupted. Finished runs are kept: `make demo` continues.")
            return INTERRUPTED
    failed = next((code for code in codes if code), 0)
    _farewell([job.name for job in everyone], failed)
    return failed


def _display() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        disable=quiet(),
        speed_estimate_period=300,
    )


def _interrupt(children: list[subprocess.Popen]) -> None:
    """Pass on Ctrl-C and wait until every project has saved its state; a second Ctrl-C kills them."""
    try:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
    except KeyboardInterrupt:
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _farewell(names: list[str], code: int) -> None:
    print("\nWhere to look")
    print("  RESULTS.md                            every table and claim, as we measured them")
    for name in names:
        print(f"  {name + '/results/RESULTS.md':<37} published | ours, with figures")
        print(f"  {f'{name}/runs/{SCALE}.jsonl':<37} your own runs, one JSON line each; printed tables in demo.log")
    print("  make keep                             saves this machine's verdicts next to those of others")
    if code:
        print(f"A project failed (exit code {code}); see its message above.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(demo(chosen(sys.argv[1:])))
