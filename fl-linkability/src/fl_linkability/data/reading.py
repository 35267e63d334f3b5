"""Where data sets are read from and how; what is prepared once (decoded images, features) is kept in a cache folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


def cache_folder() -> Path:
    """FL_LINKABILITY_CACHE, else fl-linkability/prepared in the user's cache: the data root may be read-only."""
    own = os.environ.get("FL_LINKABILITY_CACHE")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fl-linkability/prepared"
    )


@dataclass(frozen=True)
class Reading:
    """How data are read."""

    root: Path = Path(".")
    """folder of all data sets"""
    workers: int = 0
    """threads that decode images; 0: one per core"""
    skip_broken: bool = False
    """leave out images that cannot be decoded, instead of stopping at the first"""
    cache: Path = field(default_factory=cache_folder)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Only one process at a time prepares this file; the others wait, and then find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
