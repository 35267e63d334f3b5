"""The store of trainings and evaluations: one file each, named by everything that determines its result."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


def place(store: Path, kind: str, seed: int, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Path (without a suffix) for results of this identity and this code, and the complete identity."""
    identity = {"kind": kind, "code": code_hash()} | identity
    name = hashlib.sha256(json.dumps([identity, seed], sort_keys=True).encode()).hexdigest()[:16]
    return store / f"{kind}-{seed}-{name}", identity


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Lock a path for one process at a time; others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def goal_code(goal: str) -> str:
    """Hash of the file of a user's goal, module:function, because it changes what is learned; "" for built-in goals."""
    if ":" not in goal:
        return ""
    source = importlib.import_module(goal.partition(":")[0]).__file__ or ""
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of this package's source, so that results of another version are not reused."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
