"""The demo, the kill drill and the doctor on a small workspace whose projects need no training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import demo  # noqa: E402
import doctor  # noqa: E402
import drill  # noqa: E402
from shared_utils.tables import load_tables  # noqa: E402

TABLE = """
title = "t"
source = "none"
metrics = { value = "higher" }
[scale.embedded]
seeds = [20, 21, 22, 23, 24]
[[row]]
name = "a"
"""

# Does what is missing of plan.json, a run in 0.1 s; its metric is the seed, or where asked one that nothing can repeat.
PROGRAM = """
import json, sys, time
from pathlib import Path
assert sys.argv[1:4] == ["run", "--scale", "embedded"] and sys.argv[4] == "--jobs", sys.argv
log = Path("runs/embedded.jsonl")
if Path("broken").exists():
    sys.exit("broken on purpose")
done = {json.loads(line)["seed"] for line in log.read_text().splitlines()} if log.exists() else set()
for record in json.loads(Path("plan.json").read_text()):
    if record["seed"] not in done:
        time.sleep(0.1)
        value = time.time() if Path("forgetful").exists() else record["seed"]
        record["metrics"] = {"value": value, "work_ms": time.time()}
        with open(log, "a") as file:
            file.write(json.dumps(record) + "\\n")
print("table of", Path.cwd().name)
"""


def git(root: Path, *words: str) -> str:
    settings = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", "-C", root, *settings, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def workspace_root(tmp_path):
    """Two projects under git, committed."""
    root = tmp_path / "workspace"
    for name in ("one", "two"):
        package = root / name / "src" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(PROGRAM)
        (root / name / "tables").mkdir()
        (root / name / "tables" / "table-1.toml").write_text(TABLE)
        keys = [run.key for table in load_tables(root / name / "tables") for run in table.runs("embedded")]
        names = ("table", "row", "scale", "seed", "settings_hash")
        plan = [dict(zip(names, key, strict=True)) | {"seconds": 0.2, "cpu_seconds": 0.05} for key in keys]
        (root / name / "plan.json").write_text(json.dumps(plan))
    (root / ".gitignore").write_text("runs/\n__pycache__/\n")
    (root / "pyproject.toml").touch()
    git(root, "init", "-q")
    commit(root)
    return root


def commit(root: Path) -> None:
    """Commit, and let the plans carry that commit as records do."""
    git(root, "add", "-A")
    git(root, "commit", "-qm", "c")


def entries(*names: str) -> list[dict]:
    return [{"name": name, "package": name} for name in names]


def finish(root: Path, names: tuple[str, ...]) -> None:
    """Run the demo, and give the records the commit that a real project writes."""
    assert demo.demo(entries(*names), root) == 0
    head = git(root, "rev-parse", "HEAD")
    for name in names:
        log = root / name / "runs" / "embedded.jsonl"
        records = [json.loads(line) | {"commit": head, "clean": True} for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_demo_runs_every_project_prints_its_tables_and_goes_on_where_it_was(workspace_root, capsys):
    assert demo.demo(entries("one", "two"), workspace_root) == 0
    shown = capsys.readouterr().out
    assert "table of one" in shown and "table of two" in shown and "one/results/RESULTS.md" in shown
    job = demo.Job("one", "one", workspace_root)
    assert job.left() == 0 and job.total == 5
    job.log.path.write_text("".join(job.log.path.read_text().splitlines(keepends=True)[:3]))
    assert job.left() == 2
    assert demo.demo(entries("one"), workspace_root) == 0
    assert job.left() == 0 and len(job.log.records()) == 5


def test_a_failing_project_gives_its_exit_code_and_the_others_still_run(workspace_root, capsys):
    (workspace_root / "one" / "broken").touch()
    assert demo.demo(entries("one", "two"), workspace_root) == 1
    assert "broken on purpose" in capsys.readouterr().out
    assert demo.Job("two", "two", workspace_root).left() == 0


def test_the_recorded_cost_of_a_run_is_what_the_display_expects(workspace_root):
    (workspace_root / "one" / "results").mkdir()
    plan = json.loads((workspace_root / "one" / "plan.json").read_text())
    recorded = "".join(json.dumps(record | {"cpu_seconds": 7.0}) + "\n" for record in plan[:4])
    (workspace_root / "one" / "results" / "embedded.jsonl").write_text(recorded)
    assert demo.Job("one", "one", workspace_root).total == 35


def test_the_drill_kills_five_times_and_finds_equal_metrics(workspace_root):
    finish(workspace_root, ("one", "two"))
    assert drill.drill(entries("one", "two"), workspace_root) == 0
    lines = [json.loads(line) for line in (workspace_root / "runs" / "drill.jsonl").read_text().splitlines()]
    assert {line["project"] for line in lines} == {"one", "two"}
    for line in lines:
        assert line["equal"] and len(line["runs_at_kill"]) == 5 and line["runs"] == 5
        assert line["commit"] == git(workspace_root, "rev-parse", "HEAD") and line["clean"]
    assert git(workspace_root, "worktree", "list").count("\n") == 0, "the temporary checkout is gone"


def test_the_drill_notices_a_project_that_does_not_go_on_as_it_was(workspace_root):
    (workspace_root / "one" / "forgetful").touch()
    commit(workspace_root)
    finish(workspace_root, ("one",))
    assert drill.drill(entries("one"), workspace_root) == 1
    line = json.loads((workspace_root / "runs" / "drill.jsonl").read_text())
    assert not line["equal"] and line["differing"] and all("value" in metric for metric in line["differing"])


def test_the_drill_wants_a_clean_tree_and_a_finished_demo_of_the_same_code(workspace_root):
    with pytest.raises(RuntimeError, match="not finished"):
        drill.drill(entries("one"), workspace_root)
    finish(workspace_root, ("one",))
    (workspace_root / "note").touch()
    with pytest.raises(RuntimeError, match="uncommitted"):
        drill.drill(entries("one"), workspace_root)
    commit(workspace_root)
    with pytest.raises(RuntimeError, match="other code"):
        drill.drill(entries("one"), workspace_root)


def test_the_doctor_says_how_to_mend_a_missing_environment_and_a_missing_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    sets = '[{ name = "A", paths = ["a"], from = "torchvision" }, { name = "B", paths = ["b"], from = "by hand" }]'
    (tmp_path / "workspace.toml").write_text(f'[[project]]\nname = "x"\nstatus = "built"\ndatasets = {sets}\n')
    (tmp_path / "b").mkdir()
    found = {finding.what: finding for finding in doctor.diagnose(tmp_path)}
    assert found[".venv"].mend == "make setup"
    assert found["x: A"].mend == ".venv/bin/x data --download" and found["x: A"].optional
    assert found["x: B"].mend == ""


def test_the_doctor_finds_this_environment_whole(capsys):
    wrong = [
        f for f in doctor.diagnose(ROOT) if f.mend and not f.optional and f.what in ("versions", "torch, torchvision")
    ]
    assert not wrong
