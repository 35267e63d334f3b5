"""A finished run is one JSON line. Logs survive killed processes and several writers; lines are never edited."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch

from shared_utils.files import not_written
from shared_utils.logging import get_logger, progress
from shared_utils.preflight import Need, require
from shared_utils.tables import Run

logger = get_logger(__name__)

CODE = (":/", ":(top,exclude,glob)**/results/**", ":(top,exclude)RESULTS.md", ":(top,exclude,glob)**/README.md")


@dataclass(frozen=True)
class Outcome:
    """What a run returns."""

    metrics: dict[str, float]
    """the table's metrics"""
    details: dict[str, Any] = field(default_factory=dict)
    """further facts, such as integer counts"""
    dataset: dict[str, Any] = field(default_factory=dict)
    """name, number of images (per class for a subset) and checksum"""
    weights: dict[str, str] = field(default_factory=dict)
    """name and SHA-256 of pretrained weights"""
    precision: str = "32-true"
    """precision, by Fabric's name"""
    caveats: Sequence[str] = ()
    """reasons why the figures cannot be compared with the paper's, such as "3 files skipped" """


def key_of(record: dict) -> tuple:
    """What makes two records the same run."""
    return tuple(record[name] for name in ("table", "row", "scale", "seed", "settings_hash"))


class RunLog:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def append(self, *records: dict, force: bool = False) -> int:
        """Add records in one locked write; returns their number.

        A run that is already there is skipped, unless `force` is given: then the new record replaces the old one when
        the log is read. ValueError for NaN or infinite metrics; OSError naming the log if it cannot be written; the
        log is then unchanged.
        """
        lines = {key_of(record): json.dumps(record, allow_nan=False).encode() + b"\n" for record in records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = set() if force else self.keys()
            new = [line for key, line in lines.items() if key not in known]
            length = file.seek(0, os.SEEK_END)
            if length:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    new.insert(0, b"\n")  # the last line was cut off by a kill: keep it separate
            try:
                left = b"".join(new)
                while left:
                    left = left[os.write(file.fileno(), left) :]
                os.fsync(file.fileno())
            except OSError as error:
                os.ftruncate(file.fileno(), length)
                raise not_written(self.path, error) from error
        return len([line for line in new if line != b"\n"])

    def records(self) -> list[dict]:
        """All records, only the last of each run; lines that are not records are reported and skipped."""
        found: dict[tuple, dict] = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
                try:
                    record = json.loads(line)
                    found[key_of(record)] = record
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s line %d is cut off or not a record; skipped", self.path.name, number)
        return list(found.values())

    def keys(self) -> set[tuple]:
        """The runs in the log."""
        return {key_of(record) for record in self.records()}

    def frame(self) -> pd.DataFrame:
        """One row per record, with metrics as columns."""
        return pd.DataFrame([{**record, **record["metrics"]} for record in self.records()])


def provenance(repository: Path, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Device, versions, git commit and whether all code was committed (None and False outside a checkout).

    Packages that are not installed are omitted. Files generated from run logs do not count as code, so several projects
    may be recorded one after the other.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cuda = torch.cuda.is_available()
    versions = {name: _version(name) for name in ("torch", *packages)}
    ours = git("ls-files", "--error-unmatch", "pyproject.toml") is not None  # not some other repository around it
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({_processor()})",
        "versions": {"python": platform.python_version()} | {name: text for name, text in versions.items() if text},
        "commit": git("rev-parse", "HEAD") if ours else None,
        "clean": ours and git("status", "--porcelain", "--", *CODE) == "",
    }


def run_missing(
    project: str,
    runs: Sequence[Run],
    log: RunLog,
    execute: Callable[..., Outcome | Sequence[Outcome]],
    *,
    repository: Path,
    packages: Sequence[str] = (),
    force: bool = False,
    jobs: int = 1,
    group: Callable[[Run], Hashable] | None = None,
    needs: Callable[[dict[str, Any]], Iterable[Need]] | None = None,
) -> list[dict]:
    """Execute the runs that the log lacks and append each record as soon as it is finished.

    Args:
        project: name written into the records.
        runs: from `Table.runs`.
        log: run log to read and to append to.
        execute: (settings, seed) -> `Outcome`; with `group`: (list of settings, list of seeds) -> list of outcomes.
        repository: checkout whose commit is recorded.
        packages: further packages to record the versions of.
        force: run all, replacing existing records.
        jobs: number of parallel processes, each with its share of the cores; 0: one per core, or a single one with
            CUDA. With more than one, `execute` must be picklable.
        group: runs that it maps to the same value are executed in one call (models trained with stacked
            parameters); each record then holds its share of the time.
        needs: settings -> all that a run needs; lists everything missing for any run before the first one starts.

    Returns:
        The new records. `seconds` and `cpu_seconds` are those of this process: a run that resumed counts its last part.

    Raises:
        Missing: lists everything that is missing.
    """
    done = set() if force else log.keys()
    units: dict[Hashable, list[Run]] = {}
    for run in {run.key: run for run in runs}.values():  # two tables may show the same run
        if run.key not in done:
            units.setdefault(group(run) if group else run.key, []).append(run)
    if needs:
        require(need for runs_together in units.values() for run in runs_together for need in needs(run.settings))
    source = provenance(repository, packages)
    source["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    workers = joblib.Parallel(
        n_jobs=max(1, min(jobs, len(units))), return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
    )
    finished = []
    with progress() as bar:
        task = bar.add_task(project, total=sum(map(len, units.values())))
        measured = workers(
            joblib.delayed(_measure)(project, unit, execute, group is not None) for unit in units.values()
        )
        for records in measured:
            records = [record | source for record in records]
            log.append(*records, force=force)
            finished += records
            last = records[-1]
            bar.update(task, description=f"{project} {last['table']} {last['row']} seed {last['seed']}")
            bar.advance(task, len(records))
    return finished


def _measure(project: str, runs: list[Run], execute: Callable, together: bool) -> list[dict]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    wall, cpu = time.perf_counter(), time.process_time()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if together:
        outcomes = execute([run.settings for run in runs], [run.seed for run in runs])
    else:
        outcomes = [execute(run.settings, run.seed) for run in runs]
    cost = {
        "seconds": round((time.perf_counter() - wall) / len(runs), 3),
        "cpu_seconds": round((time.process_time() - cpu) / len(runs), 3),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        cost["peak_cuda_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    records = []
    for run, outcome in zip(runs, outcomes, strict=True):
        lacking = set(run.metrics) - set(outcome.metrics)
        if lacking:
            raise ValueError(f"{run.table}, {run.row}: the run did not return {', '.join(sorted(lacking))}")
        record = {"project": project, "table": run.table, "row": run.row, "scale": run.scale, "seed": run.seed}
        record |= {"metrics": outcome.metrics, "details": outcome.details, "dataset": outcome.dataset}
        record |= {"weights": outcome.weights, "precision": outcome.precision, "caveats": list(outcome.caveats)}
        record |= {"settings": run.settings, "settings_hash": run.key[-1], "started": started}
        records.append(record | cost)
    return records


def record(moves: Sequence[tuple[RunLog, RunLog]], repository: Path) -> int:
    """Move finished runs from the user's logs to the committed ones; returns their number.

    A kill in between loses or duplicates nothing: records are copied first, then removed.

    Args:
        moves: (from, to), one pair per scale.
        repository: must have no uncommitted changes except in files generated from run logs.

    Raises:
        RuntimeError: the working tree is not clean, or a run was measured on uncommitted code.
    """
    if not provenance(repository)["clean"]:
        raise RuntimeError("the working tree has uncommitted changes: commit the code, then record")
    finished = {source: source.records() for source, _ in moves}
    unclean = sum(not item["clean"] for records in finished.values() for item in records)
    if unclean:
        raise RuntimeError(f"{unclean} runs were measured on uncommitted code: run them again with --force")
    for source, target in moves:
        known = target.records()
        target.append(*(item for item in finished[source] if item not in known), force=True)
        source.path.unlink(missing_ok=True)
    return sum(map(len, finished.values()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
