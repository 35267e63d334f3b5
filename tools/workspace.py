"""The projects in workspace.toml, and checkouts of them. Used before anything is installed: standard library only."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def projects(built: bool = True, root: Path = ROOT) -> list[dict]:
    """Entries of workspace.toml, in order; by default only those of built projects."""
    entries = tomllib.loads((root / "workspace.toml").read_text())["project"]
    return [entry for entry in entries if entry["status"] == "built" or not built]


def chosen(names: list[str]) -> list[dict]:
    """Entries of the named built projects, or of all if none is named; SystemExit 2 for a project that is not built."""
    built = projects()
    unknown = [name for name in names if name not in [entry["name"] for entry in built]]
    if unknown:
        print(f"no built project {unknown[0]!r}; built: {' '.join(e['name'] for e in built)}", file=sys.stderr)
        raise SystemExit(2)
    return [entry for entry in built if not names or entry["name"] in names]


@contextmanager
def worktree(root: Path = ROOT) -> Iterator[Path]:
    """A temporary checkout of HEAD, without environments or runs."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "-C", root, "worktree", "add", "--quiet", "--detach", copy, "HEAD"], check=True)
        try:
            yield copy
        finally:
            subprocess.run(["git", "-C", root, "worktree", "remove", "--force", copy], check=True)


if __name__ == "__main__":
    print(*(entry["name"] for entry in projects()))
