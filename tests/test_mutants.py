"""Planted faults: which are noticed, which survive, and what a reason changes."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import mutants
import results

RULE = """
def clipped(x, low):
    if x < low:
        raise ValueError(f"{x} is too small")
    return x + low
"""
PLAN = """
ideas    = ["rule"]
training = []
tests    = ["tests/test_rule.py"]
[reasons.rule]
"clipped: if x < low: -> if x <= low:" = "no test compares equal numbers on purpose"
"""


@pytest.fixture
def toy(tmp_path):
    files = {
        "pyproject.toml": '[project]\nname = "toy"\nversion = "0"\n[tool.other]\n',
        "mutants.toml": PLAN,
        "src/toy/__init__.py": "",
        "src/toy/rule.py": RULE,
        "tests/test_rule.py": "from toy.rule import clipped\n\n\ndef test_sum():\n    assert clipped(3, 2) == 5\n",
    }
    for name, content in files.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "toy"


def test_a_fault_is_noticed_or_listed_with_its_line(toy):
    found = mutants.mutate(toy, "toy", 2)["rule"]
    reason = {"clipped: if x < low: -> if x <= low:": "no test compares equal numbers on purpose"}
    assert found == {"kind": "ideas", "possible": 2, "planted": 2, "killed": 1, "survivors": reason}
    assert mutants.share(found) == 100, "a fault that changes nothing does not count"
    assert mutants.share(found | {"survivors": {name: "" for name in reason}}) == 50
    assert not (toy / "mutants").exists(), "faults are planted in a copy"


def test_only_what_survived_without_a_reason_is_planted_again(toy, monkeypatch):
    """Its new test notices it now; the fault noticed before keeps its result."""
    (toy / "mutants.toml").write_text(PLAN.split("[reasons")[0])
    earlier = {"kind": "ideas", "possible": 2, "planted": 2, "killed": 1}
    earlier["survivors"] = {"clipped: if x < low: -> if x <= low:": ""}
    test = toy / "tests" / "test_rule.py"
    test.write_text("from toy.rule import clipped\n\n\ndef test_equal():\n    clipped(2, 2)\n")
    planted, run = [], mutants._mutmut
    monkeypatch.setattr(
        mutants, "_mutmut", lambda copy, workers, names: planted.append(names) or run(copy, workers, names)
    )
    found = mutants.mutate(toy, "toy", 2, {"rule": earlier})["rule"]
    assert (found["planted"], found["killed"], found["survivors"]) == (2, 2, {})
    assert [len(names) for names in planted] == [1, 1], "the first call plants nothing"
    assert mutants.mutate(toy, "toy", 2, {"rule": found})["rule"] == found and len(planted) == 3, "nothing is left"


def test_of_many_faults_a_sample_is_planted(toy, monkeypatch):
    monkeypatch.setattr(mutants, "FAULTS", 1)
    found = mutants.mutate(toy, "toy", 2)["rule"]
    assert (found["possible"], found["planted"], found["killed"] + len(found["survivors"])) == (2, 1, 1)


def test_tests_that_fail_without_a_fault_end_the_search(toy):
    (toy / "src" / "toy" / "rule.py").write_text(RULE.replace("x + low", "x - low"))
    with pytest.raises(RuntimeError, match="toy: mutmut ended early"):
        mutants.mutate(toy, "toy", 2)


def test_the_page_says_which_modules_reach_the_target(tmp_path):
    assert results.mutants(tmp_path) == "not measured"
    rule = {"possible": 30, "planted": 20, "killed": 17, "survivors": {"a": "", "b": "", "c": "same"}}
    modules = {"rule": {"kind": "ideas"} | rule}
    modules |= {"train": {"kind": "training", "possible": 4, "planted": 4, "killed": 3, "survivors": {"d": ""}}}
    record = {"commit": "0123456789abcdef", "date": "2026-11-28", "mutmut": "3", "seconds": 1, "modules": modules}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mutants.json").write_text(json.dumps({"second": record, "toy": record}))
    entries = [f'[[project]]\nname = "{name}"\nstatus = "built"\n' for name in ("toy", "unmeasured", "second")]
    (tmp_path / "workspace.toml").write_text("\n".join(entries))
    text = " ".join(results.mutants(tmp_path).split())
    assert "| toy | rule (ideas) | 30 | 20 | 17 | 1 | 89 | no | 0123456789ab |" in text
    assert "| toy | train (training) | 4 | 4 | 3 | 0 | 75 | yes | 0123456789ab |" in text
    assert text.index("| toy |") < text.index("| second |") and "unmeasured" not in text, "the workspace's order"
