"""`make doctor`: what this machine and .venv have, what is wrong, and the command that fixes it.

It needs only the standard library, because it is needed most when the installation is broken: it queries .venv through
.venv's Python.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
DISK_GB = 12  # .venv with the CUDA build of torch, and a demo's runs
MEMORY_GB = 8
REINSTALL = ".venv/bin/uv pip install --python .venv/bin/python --reinstall -r requirements.lock"


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, what was found, and how to fix it (empty: nothing to fix)."""

    what: str
    found: str
    mend: str = ""
    optional: bool = False  # a data set that only some tables need


def diagnose(root: Path = ROOT) -> Iterator[Finding]:
    """All findings: first the machine, then .venv, then the data sets."""
    yield from _machine(root)
    if sys.version_info < OLDEST_PYTHON:
        return
    python = root / ".venv" / "bin" / "python"
    if not python.exists():
        yield Finding(".venv", "missing", "make setup")
    else:
        yield from _packages(root, python)
        yield from _torch(python)
    yield from _data_sets(root)


def _machine(root: Path) -> Iterator[Finding]:
    old = sys.version_info < OLDEST_PYTHON
    yield Finding(
        "Python", platform.python_version(), "make PYTHON3=python3.11 setup (or a newer Python)" if old else ""
    )
    for tool in ("make", "git"):
        where = shutil.which(tool)
        yield Finding(tool, where or "missing", "" if where else f"install {tool} with the system's package manager")
    yield Finding("CPU cores", str(os.cpu_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    few = "make demo PROJECT=..., one project at a time" if memory < MEMORY_GB else ""
    yield Finding("memory", f"{memory:.0f} GB", few)
    free = shutil.disk_usage(root).free / 1e9
    full = "" if free > DISK_GB or (root / ".venv").exists() else f"free {DISK_GB - free:.0f} GB"
    yield Finding("free disk", f"{free:.0f} GB", full)


def _packages(root: Path, python: Path) -> Iterator[Finding]:
    """Compare installed versions with requirements.lock, and check that the built projects are installed."""
    uv: list[str | Path] = [python.with_name("uv"), "pip", "install", "--dry-run", "--offline", "--python", python]
    try:
        done = subprocess.run([*uv, "-r", root / "requirements.lock"], capture_output=True, text=True)
    except OSError as error:
        yield Finding(".venv", str(error), "rm -f .venv/stamp && make setup")
        return
    changes = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith(("+", "-", "~", "error"))]
    differ = bool(changes) or done.returncode != 0
    yield Finding("versions", "; ".join(changes) if differ else "as in requirements.lock", REINSTALL if differ else "")
    for entry in _entries(root):
        built = entry["status"] == "built"
        if built and _ask(python, f"import importlib.metadata as m; m.version({entry['name']!r})").returncode:
            yield Finding(entry["name"], "not installed", "rm -f .venv/stamp && make setup")


def _torch(python: Path) -> Iterator[Finding]:
    done = _ask(python, "import torch, torchvision; print(torch.__version__, 'with', torchvision.__version__)")
    if done.returncode:
        yield Finding("torch, torchvision", _last_line(done.stderr), REINSTALL)
        return
    yield Finding("torch, torchvision", _last_line(done.stdout))
    script = (
        "import torch\n"
        "ok = torch.cuda.is_available()\n"
        "gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if ok else []\n"
        "print(', '.join(gpus) or 'none', '| built for CUDA', torch.version.cuda)"
    )
    done = _ask(python, script)
    gpus = _last_line(done.stdout)
    unused = gpus.startswith("none") and shutil.which("nvidia-smi") is not None
    yield Finding("GPU", gpus, "UV_TORCH_BACKEND=auto " + REINSTALL if unused else "")


def _data_sets(root: Path) -> Iterator[Finding]:
    """Data sets that a user provides or downloads, looked for where their project looks."""
    for entry in _entries(root):
        data_root = Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / entry["name"])
        for data in entry["datasets"]:
            missing = [path for path in data.get("paths", []) if not (data_root / path).exists()]
            if "paths" in data:
                what = f"{entry['name']}: {data['name']}"
                found = f"not under {data_root}: {', '.join(missing)}" if missing else f"under {data_root}"
                fetch = " --download" if data["from"] == "torchvision" and len(data["paths"]) == 1 else ""
                yield Finding(what, found, f".venv/bin/{entry['name']} data{fetch}" if missing else "", optional=True)


def _entries(root: Path) -> list[dict]:
    import tomllib  # Python 3.11

    return tomllib.loads((root / "workspace.toml").read_text())["project"]


def _ask(python: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", script], capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def main() -> int:
    """Print all findings; exit code 1 if something other than a data set needs fixing."""
    findings = []
    for finding in diagnose():
        mark = "ok  " if not finding.mend else "--  " if finding.optional else "FIX "
        print(
            f"{mark} {finding.what}: {finding.found}" + (f"\n       {finding.mend}" if finding.mend else ""), flush=True
        )
        findings.append(finding)
    broken = sum(bool(finding.mend) and not finding.optional for finding in findings)
    absent = sum(bool(finding.mend) and finding.optional for finding in findings)
    print(f"\n{broken} to fix; {absent} data sets are missing, but the demo does not need them.")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
