"""`make alone`: install each project in separate environments, as a user would who wants only that one.

Once from a checkout: `make -C <project> install`, editable. Once as a wheel: `pip install` from a git URL with the
project's subdirectory, used in an empty folder. Both must install everything that the project needs and no other
project; then the package is imported, `--help` shown, every table with a smoke scale run, and the wheel's tables drawn.
Everything happens in or next to a temporary worktree of HEAD: the user's environments and runs do not change.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workspace import chosen, projects, worktree

SMOKE = ["run", "--scale", "smoke", "--jobs", "1"]


def checks(entry: dict, python: Path, root: Path) -> dict[str, list[str]]:
    """Names and commands of the checks on an installed project."""
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
    """What went wrong in the checkout; empty if nothing did."""
    folder = root / entry["name"]
    python = folder / ".venv" / "bin" / "python"
    steps = {"install": ["make", "-C", str(folder), "install"]}
    return problem(steps | checks(entry, python, root), folder)


def wheel(entry: dict, root: Path) -> str:
    """What went wrong outside the checkout; empty if nothing did."""
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
    """The first step that fails, and its output."""
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
