"""A finished run is one JSON line in a log that survives kills and many writers."""

import fcntl
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import torch
from rich.progress import Progress

from shared_utils.logging import get_logger, progress, rank
from shared_utils.tables import Run

KEY = ("table", "row", "scale", "seed", "settings_hash")
logger = get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run returns: the table's metrics, further facts (such as integer counts), and the data it ran on."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)


def key_of(record: dict) -> tuple:
    """The run that a record belongs to, as `Run.key`."""
    return tuple(record[name] for name in KEY)


@dataclass(frozen=True)
class RunLog:
    """A file of JSON lines that is only appended to; it need not exist yet."""

    path: Path | str
    _reported: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def append(self, record: dict, *, force: bool = False) -> bool:
        """Add a record and sync it to disk; safe among threads and processes.

        A run that is there already is left alone (False), unless `force` makes the new record supersede the old one.
        ValueError for a NaN or an infinity.
        """
        try:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
        except ValueError as error:
            raise ValueError(f"record of {key_of(record)}: {error}") from error
        with self._locked() as file:
            text = file.read()
            if not force and key_of(record) in self._parse(text):
                return False
            torn = text and not text.endswith(b"\n")  # by a kill: keep that line apart
            file.write(b"\n" + line if torn else line)
            file.flush()
            os.fsync(file.fileno())
        return True

    def records(self) -> list[dict]:
        """The last record of each run; lines that are no record are reported once and skipped."""
        if not Path(self.path).exists():
            return []
        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return list(self._parse(file.read()).values())

    def keys(self) -> set[tuple]:
        """The runs in the log."""
        return {key_of(record) for record in self.records()}

    def frame(self) -> pd.DataFrame:
        """One line per record, a column per field and per metric (which wins over a field of its name)."""
        return pd.DataFrame([record | record["metrics"] for record in self.records()]).drop(
            columns="metrics", errors="ignore"
        )

    def _parse(self, text: bytes) -> dict[tuple, dict]:
        found = {}
        for number, line in enumerate(text.split(b"\n"), 1):
            try:
                if line:
                    record = json.loads(line)
                    found[key_of(record)] = record | {"metrics": dict(record["metrics"])}
            except (ValueError, KeyError, TypeError):
                if number not in self._reported:
                    logger.warning("%s: line %d is torn or no record, skipped", self.path, number)
                self._reported.add(number)
        return found

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file under an exclusive lock; opened anew if `record` replaced it while we waited for the lock."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        while True:
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samefile(file.fileno(), self.path):
                    file.seek(0)
                    yield file
                    return


def provenance(repository: Path, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Device, versions (None: not installed), commit (None outside git) and whether the tree is clean."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "versions": versions,
        "commit": _git(repository, "rev-parse", "HEAD"),
        "clean": _git(repository, "status", "--porcelain") == "",
    }


def run_missing(
    project: str,
    runs: Sequence[Run],
    log: RunLog,
    execute: Callable[[dict, int], Outcome],
    *,
    repository: Path,
    packages: Sequence[str] = (),
    force: bool = False,
    bar: Progress | None = None,
) -> list[dict]:
    """Execute the runs that the log lacks (with `force`, all) and append each as soon as it is finished.

    `execute` gets settings and seed. Code of `repository` and versions of `packages` are recorded as they are at the
    start. `bar` takes the place of an own progress display. Returns the new records; ValueError when an outcome lacks a
    metric of its table.
    """
    done = set() if force else log.keys()
    missing = [run for run in runs if run.key not in done]
    source = provenance(repository, packages) | {"command": _command()}
    finished = []
    with nullcontext(bar) if bar else progress() as shown:
        task = shown.add_task(project, total=len(missing))
        for run in missing:
            shown.update(task, description=f"{run.table}, {run.row}, seed {run.seed}")
            finished.append({"project": project} | source | _measure(run, execute))
            if rank() == 0:
                log.append(finished[-1], force=force)
            shown.advance(task)
    return finished


def _measure(run: Run, execute: Callable[[dict, int], Outcome]) -> dict[str, Any]:
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    started, wall, cpu = datetime.now(UTC), time.perf_counter(), sum(os.times()[:4])
    outcome = execute(run.settings, run.seed)
    seconds, cpu_seconds = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    lacking = [name for name in run.metrics if name not in outcome.metrics]
    if lacking:
        raise ValueError(f"{run.table}, {run.row}: the outcome lacks {', '.join(lacking)}")
    record = dict(zip(KEY, run.key, strict=True)) | {"settings": run.settings, "dataset": outcome.dataset}
    record |= {"metrics": {name: float(value) for name, value in outcome.metrics.items()}, "details": outcome.details}
    record |= {"started": started.isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
    record |= {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}  # cpu: with workers that have ended
    record["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)  # MiB, whole process
    peak = max(map(torch.cuda.max_memory_allocated, gpus), default=0)
    if peak:
        record["peak_cuda_memory_mb"] = round(peak / 2**20, 1)
    elif gpus:
        record["device"] = _processor()  # a GPU was there and the run left it alone
    return record


def record(moves: Sequence[tuple[RunLog, RunLog]], repository: Path) -> int:
    """Move finished runs from the user's logs to the committed ones; returns how many.

    A kill in between loses and doubles nothing: records are copied first and removed after.

    Args:
        moves: (from, to), one pair per scale.
        repository: must have no uncommitted changes.

    Raises:
        RuntimeError: the working tree is not clean, or a run was measured on one that was not.
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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"CPU ({names[0] if names else platform.machine()})"


def _command() -> str:
    """The command line as typed, less the folders of absolute paths."""
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join(words + [re.sub(r"^(-[^=]*=)?/(.*/)?(?=.)", r"\1", word) for word in sys.argv[1:]])
