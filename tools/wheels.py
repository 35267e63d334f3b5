"""`make wheels FOR=cp312 INTO=folder`: get what `make setup WHEELS=folder` needs on a machine without a network.

These are the dependencies of the projects, pytest and the build backend, as requirements.lock pins them for the
target's Python, without benchmark peers and tools. Packages listed in HAVE (`pip list --format=freeze` of that machine)
are skipped.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "hatchling\neditables\npytest\npytest-xdist\n"
GLIBC = ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def pins(version: str, machine: str, have: Iterable[str] = ()) -> list[str]:
    """`name==version` of each package for a Python such as "3.12" on a machine such as "x86_64"."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--python-version", version, "--python-platform", f"{machine}-manylinux_2_28"]
    command += ["--constraints", "requirements.lock", "-", *(str(path) for path in ROOT.glob("*/pyproject.toml"))]
    done = subprocess.run(command, input=EXTRA, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    known = {_normal(name) for name in have}
    found = [line for line in done.stdout.splitlines() if "==" in line]
    return [pin for pin in found if _normal(pin) not in known]


def _normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~\[; @]", requirement.strip())[0]).lower()


def download(wanted: list[str], version: str, machine: str, folder: Path) -> None:
    """Download the wheels of pinned packages; an error if any is missing."""
    if not wanted:
        return
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--implementation", "cp", "--python-version", version]
    for glibc in GLIBC:
        command += ["--platform", f"{glibc}_{machine}"]
    if subprocess.run([*command, *wanted]).returncode:
        raise SystemExit(f"some wheels for Python {version} on {machine} are not available; the last line says which")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", metavar="FOR", help="tag of the target's Python, such as cp312")
    parser.add_argument("folder", metavar="INTO", type=Path)
    parser.add_argument("--have", type=Path, help="output of pip list --format=freeze on that machine")
    parser.add_argument("--machine", default="x86_64", choices=["x86_64", "aarch64"])
    given = parser.parse_args()
    if not (tag := re.fullmatch(r"cp3(\d+)", given.python)):
        parser.error(f"FOR: expected a tag such as cp312, got {given.python!r}")
    version = f"3.{tag[1]}"
    wanted = pins(version, given.machine, given.have.read_text().splitlines() if given.have else ())
    download(wanted, version, given.machine, given.folder)
    size = sum(path.stat().st_size for path in given.folder.glob("*.whl"))
    print(f"{len(wanted)} wheels, {size / 1e6:.0f} MB, in {given.folder}")
    print(f"On that machine: make setup WHEELS={given.folder}")
