"""`make alone`: each project in an environment of its own, as a user who wants only that one would have it.

`make -C <project> install` must bring everything that the project needs and no other project; then the package is
imported, `--help` shown, and every table that has a smoke scale run. All of it happens in a temporary worktree of HEAD:
the user's own environments and runs are not touched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workspace import chosen, projects, worktree


def alone(entry: dict, root: Path) -> str:
    """What went wrong; empty where nothing did."""
    name, package, folder = entry["name"], entry["package"], root / entry["name"]
    python = folder / ".venv" / "bin" / "python"
    others = [each["package"] for each in projects(root=root) if each["name"] != name]
    find = f"import importlib.util as u; print(*(n for n in {others} if u.find_spec(n)))"
    steps = {
        "install": ["make", "-C", str(folder), "install"],
        "import": [str(python), "-c", f"import {package}"],
        "other projects": [str(python), "-c", find],
        "--help": [str(python), "-m", package, "--help"],
        "smoke tables": [str(python), "-m", package, "run", "--scale", "smoke", "--jobs", "1"],
    }
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
            problem = alone(each, copy)
        print(f"{each['name']}: {problem or 'installed alone, imported, --help, smoke tables'}", flush=True)
        failed += bool(problem)
    sys.exit(failed > 0)
