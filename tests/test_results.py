"""Counts without doubles, and verdicts that another machine turns."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import machines
import results
from shared_utils.runlog import RunLog
from shared_utils.tables import load_table

WORKSPACE = """
[[project]]
name = "toy"
package = "toy"
status = "built"
summary = "a toy"
datasets = []
hardware = {}
[[project.papers]]
arxiv = "0"
title = "T"
venue = "V"
headline = { table = "table-1", claim = "a beats b" }
"""
CLAIM = '[[claim]]\ntext = "a beats b"\nmetric = "error"\nbetter = "a"\nthan = "b"\n'
TABLE = """
title = "T"
source = "arXiv 0"
metrics = { error = "lower" }
[scale.embedded]
seeds = [20, 21, 22]
measured_on = "digits"
[scale.paper]
seeds = [0]
[[row]]
name = "a"
[[row]]
name = "b"
"""


def log_runs(root, folder, b):
    log = RunLog(root / "toy" / folder / "embedded.jsonl")
    for run in load_table(root / "toy" / "tables" / "table-1.toml").runs("embedded", seeds=range(20, 20 + len(b))):
        record = {
            "table": "table-1",
            "row": run.row,
            "scale": "embedded",
            "seed": run.seed,
            "settings_hash": run.key[-1],
        }
        metrics = {"error": 1.0 if run.row == "a" else b[run.seed - 20]}
        log.append(record | {"metrics": metrics, "device": "CPU (ours)", "clean": True})


@pytest.fixture
def root(tmp_path):
    (tmp_path / "workspace.toml").write_text(WORKSPACE)
    tables = tmp_path / "toy" / "tables"
    tables.mkdir(parents=True)
    (tables / "table-1.toml").write_text(TABLE + CLAIM)
    shown_again = TABLE.replace('name = "a"', 'name = "a"\nruns_of = "table-1"')
    (tables / "table-2.toml").write_text(shown_again.replace('name = "b"', 'name = "b"\nruns_of = "table-1"') + CLAIM)
    log_runs(tmp_path, "results", [2, 2.1, 1.9])
    return tmp_path


def project(root):
    return results.Project(results.projects(root=root)[0], root)


def test_a_claim_about_the_same_runs_counts_once_in_each_scale(root):
    assert results.counts(project(root)) == {"embedded": {"holds": 1}, "paper": {"not measured": 1}}


def test_a_headline_that_no_table_claims_is_an_error(root):
    path = root / "workspace.toml"
    path.write_text(path.read_text().replace('claim = "a', 'claim = "not a'))
    with pytest.raises(ValueError, match="workspace.toml: toy has no claim 'not a beats b' in table-1"):
        results.overview_part(root)


@pytest.mark.parametrize("table", ("table-1", "table-2"))
@pytest.mark.parametrize(
    "devices, standing", ((("ours",), "holds"), (("ours", "other"), "holds on 2 kinds of machine"))
)
def test_a_demo_on_the_record_s_own_kind_of_machine_is_no_other_kind(root, monkeypatch, table, devices, standing):
    """Also for a table that shows another table's runs."""
    log_runs(root, "runs", [2, 2.2, 1.9])
    for device in devices:
        origin = {"device": f"CPU ({device})", "commit": "c0ffee", "versions": {}}
        monkeypatch.setattr(machines, "provenance", lambda *_, origin=origin: origin)
        machines.keep(root)
    toy = project(root)
    chosen = next(each for each in toy.tables if each.id == table)
    (verdict,) = (v for v in results.judge(chosen, "embedded", toy.logs["embedded"]))
    assert toy.standing(chosen, verdict) == standing


@pytest.mark.parametrize(
    "b, standing",
    [([2, 2.2, 1.9], "holds on 2 kinds of machine"), ([9, 0, 1], "undecided on CPU (other)")],
)
def test_a_headline_says_on_how_many_kinds_of_machine_it_stands(root, monkeypatch, b, standing):
    with pytest.raises(RuntimeError, match="make demo"):
        machines.keep(root)
    log_runs(root, "runs", b)
    monkeypatch.setattr(
        machines, "provenance", lambda *_: {"device": "CPU (other)", "commit": "c0ffee", "versions": {}}
    )
    assert json.loads(machines.keep(root).read_text())["device"] == "CPU (other)"
    line = results.overview([project(root)], with_summary=False).splitlines()[-1]
    assert standing in line and "| digits |" in line
    assert ("holds; there undecided" in results.other_machines(root)) == ("undecided" in standing)


def test_fewer_seeds_are_not_another_machine(root, monkeypatch):
    """The demo ran one seed, too few for a verdict; on that one the record is undecided as well."""
    log_runs(root, "runs", [2])
    monkeypatch.setattr(
        machines, "provenance", lambda *_: {"device": "CPU (other)", "commit": "c0ffee", "versions": {}}
    )
    assert json.loads(machines.keep(root).read_text())["seeds"] == {"toy": {"table-1": [20]}}
    line = results.overview([project(root)], with_summary=False).splitlines()[-1]
    assert "| holds |" in line
    assert "| CPU (other) | c0ffee | 1 | 0 |" in results.other_machines(root)


@pytest.mark.parametrize("commit", ["c0ffee", "decaf"])
def test_the_demo_of_one_project_takes_no_other_s_verdicts_away(root, monkeypatch, commit):
    log_runs(root, "runs", [2, 2.2, 1.9])
    monkeypatch.setattr(
        machines, "provenance", lambda *_: {"device": "CPU (other)", "commit": "c0ffee", "versions": {}}
    )
    path = machines.keep(root)
    saved = json.loads(path.read_text())
    others = {"other": {"table-1": {"c beats d": "holds"}}}
    path.write_text(json.dumps(saved | {"commit": commit, "verdicts": others}))
    if commit == "c0ffee":
        assert json.loads(machines.keep(root).read_text())["verdicts"] == others | saved["verdicts"]
    else:
        with pytest.raises(RuntimeError, match="your demo lacks other, which cpu-other.json has"):
            machines.keep(root)


def test_verdicts_on_uncommitted_code_are_not_kept(root):
    log_runs(root, "runs", [2, 2.2, 1.9])
    path = root / "toy" / "runs" / "embedded.jsonl"
    path.write_text(path.read_text().replace('"clean": true', '"clean": false'))
    with pytest.raises(RuntimeError, match="uncommitted"):
        machines.keep(root)
