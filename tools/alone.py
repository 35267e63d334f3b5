"""`make alone`: each project in environments of its own, as users who want only that one would have it.

Once from a checkout: `make -C <project> install`, editable. Once as a wheel: `pip install` from a git URL with the
project's subdirectory, used in an empty folder. Both must bring everything that the project needs and no other project;
then the package is imported, `--help` shown, every table that has a smoke scale run, and the wheel's tables drawn. All
of it happens beside a temporary worktree of HEAD: the user's own environments and runs are not touched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workspace import chosen, projects, worktree

SMOKE = ["run", "--scale", "smoke", "--jobs", "1"]


def checks(entry: dict, python: Path, root: Path) -> dict[str, list[str]]:
    """Name and command of what must work once the project is installed."""
    others = [each["package"] for each in projects(root=root) if each["name"] != entry["name"]]
    find = f"import importlib.util as u; print(*(n for n in {others} if u.find_spec(n)))"
    module = [str(python), "-m", entry["package"]]
    return {
        "import": [str(python), "-c", f"import {entry['package']}"],
        "other projects": [str(python), "-c", find],
        "--help": [*module, "--help"],
        "smoke tables": [*module, *SMOKE],
    }


def editable(entry: dict, root: Path) -> str:
    """What went wrong in the checkout; empty where nothing did."""
    folder = root / entry["name"]
    python = folder / ".venv" / "bin" / "python"
    steps = {"install": ["make", "-C", str(folder), "install"]}
    return problem(steps | checks(entry, python, root), folder)


def wheel(entry: dict, root: Path) -> str:
    """What went wrong outside the checkout; empty where nothing did."""
    folder = root.parent / f"{entry['name']}-installed"
    folder.mkdir()
    python = folder / ".venv" / "bin" / "python"
    address = f"{entry['name']} @ git+file://{root}#subdirectory={entry['name']}"
    steps = {
        "environment": [sys.executable, "-m", "venv", str(folder / ".venv")],
        "uv": [str(python), "-m", "pip", "install", "-q", "uv"],
        "install": [str(python), "-m", "uv", "pip", "install", "-q", "--python", str(python), address],
    }
    tables = {"tables": [str(python), "-m", entry["package"], "tables"]}
    return problem(steps | checks(entry, python, root) | tables, folder)


def problem(steps: dict[str, list[str]], folder: Path) -> str:
    """The first step that fails, and what it printed."""
    for step, command in steps.items():
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return f"{step}: exit code {done.returncode}\n{done.stderr[-2000:]}"
        if step == "other projects" and done.stdout.strip():
            return f"{step} in the environment: {done.stdout.strip()}"
    return ""


if __name__ == "__main__":
    failed = 0
    for each in chosen(sys.argv[1:]):
        with worktree() as copy:
            found = {way.__name__: way(each, copy) for way in (editable, wheel)}
        for way, wrong in found.items():
            print(f"{each['name']}, {way}: {wrong or 'installed alone, imported, --help, smoke tables'}", flush=True)
        failed += any(found.values())
    sys.exit(failed > 0)
