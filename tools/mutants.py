"""`make mutants PROJECT=`: how many small planted faults a project's tests notice, module by module, by mutmut.

With AGAIN=1, a module that has not changed since results/mutants.json was written gets only those of its faults that no
test noticed then and that still have no reason.

A project's mutants.toml names its idea modules, its training modules and the tests that must notice. Of each module's
possible faults a random sample of FAULTS is planted, in a temporary copy; the result goes into results/mutants.json.
Decorated functions and lines that only word a message are left out. A fault that no test notices is listed with its
line, and with a reason where it changes nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import tomli_w

from shared_utils.logging import get_logger
from shared_utils.runlog import provenance
from workspace import ROOT, chosen

FAULTS = 50  # of each module; the same ones every time
TARGETS = {"ideas": 90, "training": 75}  # per cent of the faults that must be noticed
WORDING = [r"^\s*(raise|logger\.|warnings\.warn)\b", r"^\s*f?\"[^\"]*\",?$"]  # lines that only word a message
SURVIVED = (0, 5, 33)  # mutmut's exit codes: the tests passed, or no test runs the function
SHOW = """
import json, sys
from mutmut.mutation.diff_apply import get_diff_for_mutant
print(json.dumps({name: get_diff_for_mutant(name) for name in json.load(sys.stdin)}))
"""
logger = get_logger("mutants")


def mutate(
    project: Path, package: str, workers: int, earlier: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Plant faults in a copy of the project and run the tests on each.

    Args:
        project: its folder.
        package: its package.
        workers: number of parallel processes.
        earlier: what this function returned for modules that are the same now: of these, only the faults that no test
            noticed and that have no reason are planted; the others keep their result.

    Returns:
        By module: its kind, how many faults are possible, were planted and were killed, and the survivors with their
        reasons.

    Raises:
        RuntimeError: the tests fail without a fault, or mutmut ends early.
    """
    plan = tomllib.loads((project / "mutants.toml").read_text())
    kinds = {module: kind for kind in TARGETS for module in plan[kind]}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / project.name
        shutil.copytree(project, copy, ignore=shutil.ignore_patterns(".venv", "runs", "__pycache__", ".*_cache"))
        content = tomllib.loads((copy / "pyproject.toml").read_text())
        content["tool"]["mutmut"] = {
            "source_paths": ["src/"],
            "only_mutate": [f"src/{package}/{module}.py" for module in kinds],
            "do_not_mutate_patterns": WORDING,
            "also_copy": sorted(path.name for path in copy.iterdir() if path.name not in ("src", "tests", "mutants")),
            "pytest_add_cli_args": ["-m", "not gpu"],
            "pytest_add_cli_args_test_selection": plan["tests"],
            "timeout_multiplier": 15.0,  # of wall time: on a busy machine a test may take several times as long
            "process_isolation": "forkserver",  # nothing of an earlier run stays in the process
        }
        content["tool"]["pytest"] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
        (copy / "pyproject.toml").write_text(tomli_w.dumps(content))
        _mutmut(copy, workers, ["none"])  # plants every fault and runs the tests without any; no fault has this name
        possible = {module: sorted(_exit_codes(copy, package, module)) for module in kinds}
        if empty := [module for module, names in possible.items() if not names]:
            raise RuntimeError(f"{project.name}: no fault is possible in {empty[0]}; is this a module?")
        draw = random.Random(0)
        sample = {module: draw.sample(names, min(FAULTS, len(names))) for module, names in possible.items()}
        changes = _changes(copy, [name for names in sample.values() for name in names])
        reasons = {module: plan.get("reasons", {}).get(module, {}) for module in kinds}
        kept = {module: (earlier or {}).get(module, {}).get("survivors") for module in kinds}
        planted = {
            module: [name for name in names if _open(changes[name], kept[module], reasons[module])]
            for module, names in sample.items()
        }
        names = [name for of_module in planted.values() for name in of_module]
        log = _mutmut(copy, workers, names) if names else []  # without a name mutmut plants all
        codes = {module: _exit_codes(copy, package, module) for module in kinds}
        if any(codes[module][name] is None for module, names in planted.items() for name in names):
            raise RuntimeError("\n".join([f"{project.name}: mutmut ended early", *log[-15:]]))
    found = {}
    for module, kind in kinds.items():
        new = {name: codes[module][name] in SURVIVED for name in planted[module]}
        survived = [name for name in sample[module] if new.get(name, changes[name] in (kept[module] or {}))]
        survivors = Counter(changes[name] for name in survived)
        found[module] = {
            "kind": kind,
            "possible": len(possible[module]),
            "planted": len(sample[module]),
            "killed": len(sample[module]) - len(survived),
            "survivors": {change: reasons[module].get(change, "") for change in survivors},
        }
    return found


def _open(change: str, survivors: dict[str, str] | None, reasons: dict[str, str]) -> bool:
    return survivors is None or (change in survivors and not reasons.get(change))


def _changes(copy: Path, names: list[str]) -> dict[str, str]:
    """Each fault in one line, by name."""
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=copy, input=json.dumps(names), capture_output=True, text=True, check=True
    )
    return {name: _changed(name, diff) for name, diff in json.loads(shown.stdout.splitlines()[-1]).items()}


def _mutmut(copy: Path, workers: int, names: list[str]) -> list[str]:
    """Run mutmut in the copy on the named faults, and return the lines that it prints."""
    words = [sys.executable, "-m", "mutmut", "run", "--max-children", str(workers), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}
    with open(copy / "mutmut.log", "w") as log:
        subprocess.run(words, cwd=copy, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return (copy / "mutmut.log").read_text(errors="replace").replace("\r", "\n").splitlines()


def _exit_codes(copy: Path, package: str, module: str) -> dict[str, int | None]:
    meta = copy / "mutants" / "src" / package / f"{module}.py.meta"
    return json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}


def _changed(name: str, diff: str) -> str:
    """A fault in one line: the function, and what became of its line."""
    function = name.rsplit(".", 1)[1].split("__mutmut_")[0].removeprefix("x_").replace("xǁ", "").replace("ǁ", ".")
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{function}: {before} -> {after}"


def share(module: dict[str, Any]) -> float:
    """Per cent of the faults that were noticed, those that change nothing left out."""
    harmless = sum(bool(reason) for reason in module["survivors"].values())
    counted = module["planted"] - harmless
    return 100 * module["killed"] / counted if counted else 100.0


def _unchanged(project: Path, package: str, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The modules of a record whose file is the same as at its commit."""

    def same(module: str) -> bool:
        words = ["git", "diff", "--quiet", record["commit"], "--", f"src/{package}/{module}.py"]
        return subprocess.run(words, cwd=project).returncode == 0

    return {module: found for module, found in record["modules"].items() if same(module)}


def main(names: list[str], again: bool) -> None:
    """Plant faults in the named projects, or in all that have a mutants.toml.

    Args:
        names: of projects.
        again: plant only the faults that no test noticed last time.
    """
    path = ROOT / "results" / "mutants.json"
    for entry in chosen(names):
        project = ROOT / entry["name"]
        if not (project / "mutants.toml").exists():
            logger.info("%s: no mutants.toml", entry["name"])
            continue
        begin, origin = time.perf_counter(), provenance(ROOT)
        if not origin["clean"]:
            raise RuntimeError("uncommitted changes: commit them first, so that the result belongs to a commit")
        known = json.loads(path.read_text()) if path.exists() else {}
        last = known.get(entry["name"]) if again else None
        earlier = _unchanged(project, entry["package"], last) if last else {}
        modules = mutate(project, entry["package"], joblib.cpu_count(), earlier)
        record = {"commit": origin["commit"], "date": date.today().isoformat(), "mutmut": version("mutmut")}
        record |= {"seconds": round(time.perf_counter() - begin), "modules": modules}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known | {entry["name"]: record}, indent=1, ensure_ascii=False) + "\n")
        for module, result in modules.items():
            logger.info("%s %s: %.0f %% of %d", entry["name"], module, share(result), result["planted"])


if __name__ == "__main__":
    try:
        main([word for word in sys.argv[1:] if word != "--again"], again="--again" in sys.argv)
    except RuntimeError as error:
        sys.exit(f"mutants: {error}")
