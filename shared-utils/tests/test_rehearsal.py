"""The rehearsal of a project of ten lines: what passes, and each way in which a table can fail."""

import subprocess
import sys

import pytest

from shared_utils.rehearsal import rehearse, shrunk

TABLE = """
title = "T"
source = "arXiv 0"
metrics = { error = "lower" }
[scale.paper]
seeds = [0, 1, 2]
epochs = 300
[[row]]
name = "a"
[[row]]
name = "b"
run = { epochs = 90 }
[[claim]]
text = "a beats b"
metric = "error"
better = "a"
than = "b"
"""
CLI = """
import json, os, sys
from dataclasses import dataclass
from pathlib import Path
from shared_utils.runlog import Outcome, RunLog, record, run_missing
from shared_utils.tables import load_tables
PROJECT = Path(__file__).parents[2]
@dataclass
class Run:
    scale: str = "embedded"
def execute(settings, seed):
    if (Path(os.environ["DATA_ROOT"]) / "images").read_text() != "tiny" or settings["epochs"] > 2:
        raise SystemExit("wrong data or counts")
    return Outcome({"error": settings["epochs"] + seed + 0.5})
def main():
    verb, *rest = sys.argv[1:]
    tables = load_tables(PROJECT / "tables", ["epochs"])
    log, results = RunLog(PROJECT / "runs" / "paper.jsonl"), RunLog(PROJECT / "results" / "paper.jsonl")
    if verb == "data":
        Path(rest[1]).mkdir()
        (Path(rest[1]) / "images").write_text("tiny")
    if verb == "run":
        runs = [run for table in tables if table.id == rest[0] for run in table.runs("paper")]
        run_missing("p", runs, log, execute, repository=PROJECT)
    if verb == "record":
        record([(log, results)], PROJECT)
        (PROJECT / "results" / "figures").mkdir(parents=True)
        (PROJECT / "results" / "figures" / "table-1.png").touch()
"""


@pytest.fixture
def project(tmp_path):
    home = tmp_path / "toy"
    for folder in ("tables", "src/toy", "results/figures"):
        (home / folder).mkdir(parents=True)
    (home / "pyproject.toml").touch()
    (home / "tables" / "table-1.toml").write_text(TABLE)
    (home / "rehearsal.toml").write_text("seeds = 2\n[counts]\nepochs = 1\n")
    (home / "src" / "toy" / "__init__.py").touch()
    (home / "src" / "toy" / "cli.py").write_text(CLI)
    (home / "src" / "toy" / "figures.py").write_text('DRAW = {"table-1": None}')
    return home


def test_a_table_passes_and_the_project_stays_as_it_was(project):
    before = sorted(str(path) for path in project.rglob("*"))
    (found,) = rehearse(project)
    assert found.passed and found.table == "table-1"
    assert sorted(str(path) for path in project.rglob("*")) == before


@pytest.mark.parametrize(
    "file, old, new, problem",
    [
        ("src/toy/cli.py", '"error": settings', '"eror": settings', "did not return error"),
        ("src/toy/cli.py", '"table-1.png"', '"table-2.png"', "figure was not drawn"),
        ("rehearsal.toml", "epochs = 1", "epochs = 3", "wrong data or counts"),
        ("src/toy/cli.py", "record([(log, results)], PROJECT)", "pass", "row 'a' has no record"),
        ("rehearsal.toml", "seeds = 2", "[impossible]\ntable-1 = 'captioning is not built'", ""),
    ],
)
def test_each_way_to_fail_is_told(project, file, old, new, problem):
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new))
    (project / "src" / "toy" / "cli.py").write_text(
        (project / "src" / "toy" / "cli.py").read_text().replace("def main():", "def act():")
        + "def main():\n    try:\n        act()\n    except ValueError as error:\n        sys.exit(str(error))\n"
    )
    (found,) = rehearse(project)
    assert not found.passed and problem in found.problem
    assert bool(found.impossible) == (not problem)


def test_counts_shrink_and_never_grow():
    raw = {
        "scale": {"paper": {"seeds": [3, 4, 5], "epochs": 300, "decay": True}, "embedded": {"epochs": 9, "seeds": [1]}},
        "row": [
            {"name": "a", "run": {"parts": [{"epochs": 50}, {"epochs": 1}], "warmup": 30}, "embedded": {"epochs": 7}},
            {"name": "b", "runs_of": "table-9"},
            {"name": "c", "paper": {"model": "resnet50"}},
        ],
    }
    small = shrunk(raw, {"epochs": 2, "images": 8, "model": "resnet18"}, {"warmup": 1}, seeds=1)
    expected = {"seeds": [3], "epochs": 2, "decay": True, "images": 8, "model": "resnet18"}
    assert small["scale"] == {"paper": expected, "embedded": raw["scale"]["embedded"]}
    run = {"parts": [{"epochs": 2}, {"epochs": 1}], "warmup": 1}
    assert small["row"][0] == {"name": "a", "run": run, "embedded": {"epochs": 7}}
    assert small["row"][1:] == [raw["row"][1], {"name": "c", "paper": {"model": "resnet18"}}]


def test_the_command_ends_with_1_where_a_table_fails(project):
    words = [sys.executable, "-m", "shared_utils.rehearsal", str(project)]
    (project / "rehearsal.toml").write_text("[counts]\nepochs = 3\n")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "wrong data or counts" in " ".join(done.stdout.split())
    done = subprocess.run([*words, "table-11"], capture_output=True, text=True)
    assert done.returncode == 2 and "rehearses no table 'table-11'" in done.stderr


def test_a_table_is_rehearsed_at_the_scale_that_is_named_for_it(project):
    for file in ("tables/table-1.toml", "src/toy/cli.py"):
        path = project / file
        path.write_text(path.read_text().replace("scale.paper", "scale.own").replace('"paper', '"own'))
    assert rehearse(project) == []
    with open(project / "rehearsal.toml", "a") as file:
        file.write('[scales]\ntable-1 = "own"\n')
    (found,) = rehearse(project)
    assert found.passed, found.problem
