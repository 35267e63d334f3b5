"""The list of projects in workspace.toml. make reads it before anything is installed: standard library alone."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def projects(built: bool = True, root: Path = ROOT) -> list[dict]:
    """Entries of workspace.toml, in its order; only the built ones unless told otherwise."""
    entries = tomllib.loads((root / "workspace.toml").read_text())["project"]
    return [entry for entry in entries if entry["status"] == "built" or not built]


def chosen(names: list[str]) -> list[dict]:
    """Entries of the named built projects, all of them for none; SystemExit 2 for a name that is not built."""
    built = projects()
    unknown = [name for name in names if name not in [entry["name"] for entry in built]]
    if unknown:
        print(f"no built project {unknown[0]!r}; built: {' '.join(e['name'] for e in built)}", file=sys.stderr)
        raise SystemExit(2)
    return [entry for entry in built if not names or entry["name"] in names]


if __name__ == "__main__":
    print(*(entry["name"] for entry in projects()))
