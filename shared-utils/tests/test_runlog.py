"""Run logs under kills and many writers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared_utils.runlog import Outcome, RunLog, provenance, record, run_missing
from shared_utils.tables import Run, settings_hash


def line(seed: int, **extra) -> dict:
    base = {"table": "t", "row": "r", "scale": "s", "seed": seed, "settings_hash": "h", "metrics": {"a": 1.0 * seed}}
    return base | extra


WRITER = """
import sys
from shared_utils.runlog import RunLog
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 20):
    record = {"table": "t", "row": "r", "scale": "s", "seed": seed, "settings_hash": "h", "metrics": {}}
    RunLog(sys.argv[1]).append(record)
"""


def test_many_writers_lose_and_double_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(10 * i)]) for i in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(json.loads(text)["seed"] for text in path.read_text().splitlines()) == list(range(40))


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_is_skipped_and_kept_apart(tmp_path, cut, caplog):
    log = RunLog(tmp_path / "log.jsonl")
    log.append(line(1), line(2))
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    log.append(line(3))
    expected = {1, 3} if cut > 1 else {1, 2, 3}
    assert {item["seed"] for item in log.records()} == expected


def test_the_last_forced_record_wins(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    assert log.append(line(1)) == 1
    assert log.append(line(1, metrics={"a": 9.0})) == 0
    assert log.append(line(1, metrics={"a": 9.0}), force=True) == 1
    assert [item["metrics"]["a"] for item in log.records()] == [9.0]
    assert log.frame()["a"].tolist() == [9.0]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        RunLog(tmp_path / "log.jsonl").append(line(1, metrics={"a": float("nan")}))


KILLED = """
import sys, time
from pathlib import Path
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run
def execute(settings, seed):
    time.sleep(0.15)
    return Outcome({"a": float(seed)})
runs = [Run("t", "r", "s", seed, {"x": 1}, ("a",)) for seed in range(8)]
run_missing("p", runs, RunLog(Path(sys.argv[1])), execute, repository=Path("."))
"""


def test_sigkill_and_continue(tmp_path):
    path = tmp_path / "log.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = len(RunLog(path).records())
    assert 3 <= before < 8
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=True)
    assert [item["seed"] for item in RunLog(path).records()] == list(range(8))
    assert path.read_bytes().count(b"\n") == 8


def test_a_missing_metric_is_an_error(tmp_path):
    runs = [Run("t", "r", "s", 0, {}, ("a", "b"))]
    with pytest.raises(ValueError, match="did not return b"):
        run_missing("p", runs, RunLog(tmp_path / "x"), lambda s, n: Outcome({"a": 1.0}), repository=tmp_path)


def seed_and_process(settings, seed):
    return Outcome({"a": float(seed)}, {"process": os.getpid()})


def test_jobs_run_side_by_side_with_one_thread_each(tmp_path):
    runs = [Run("t", "r", "s", seed, {}, ("a",)) for seed in range(4)]
    log = RunLog(tmp_path / "log.jsonl")
    run_missing("p", runs, log, seed_and_process, repository=tmp_path, jobs=2)
    assert sorted(item["metrics"]["a"] for item in log.records()) == [0, 1, 2, 3]
    assert os.getpid() not in {item["details"]["process"] for item in log.records()}
    assert run_missing("p", runs, log, seed_and_process, repository=tmp_path, jobs=2) == []


def test_groups_are_executed_in_one_call(tmp_path):
    calls = []

    def execute(settings, seeds):
        calls.append((settings, seeds))
        return [Outcome({"a": float(seed + each["x"])}) for each, seed in zip(settings, seeds, strict=True)]

    runs = [Run("t", str(x), "s", seed, {"x": x}, ("a",)) for x in (10, 20) for seed in (0, 1)]
    log = RunLog(tmp_path / "log.jsonl")
    run_missing("p", runs[:1], log, execute, repository=tmp_path, group=lambda run: run.seed)
    run_missing("p", runs, log, execute, repository=tmp_path, group=lambda run: run.seed)
    assert calls == [([{"x": 10}], [0]), ([{"x": 10}, {"x": 20}], [1, 1]), ([{"x": 20}], [0])]
    assert sorted(item["metrics"]["a"] for item in log.records()) == [10, 11, 20, 21]


def test_record_moves_once_and_only_from_a_clean_tree(tmp_path):
    def git(*words):
        identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, env=os.environ | identity)

    git("init")
    (tmp_path / ".gitignore").write_text("runs\nresults\n")
    (tmp_path / "pyproject.toml").touch()
    source, target = RunLog(tmp_path / "runs" / "s.jsonl"), RunLog(tmp_path / "results" / "s.jsonl")
    source.append(line(1, clean=True), line(2, clean=True))
    with pytest.raises(RuntimeError, match="uncommitted"):
        record([(source, target)], tmp_path)
    git("add", "-A")
    git("commit", "-m", "x")
    target.append(line(1, clean=True))  # as if a kill had come between copying and removing
    assert record([(source, target)], tmp_path) == 2
    assert [item["seed"] for item in target.records()] == [1, 2]
    assert target.path.read_bytes().count(b"\n") == 2
    assert not source.path.exists()
    source.append(line(3, clean=False))
    with pytest.raises(RuntimeError, match="1 runs were measured"):
        record([(source, target)], tmp_path)


def test_hash_ignores_key_order():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})


def test_without_git_a_run_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance(Path(__file__).parents[1])
    assert found["commit"] is None and not found["clean"]


def test_a_folder_inside_somebody_elses_repository_has_no_commit(tmp_path):
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (tmp_path / "notes").touch()
    for words in (["init"], ["add", "-A"], ["commit", "-m", "x"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, env=os.environ | identity)
    found = provenance(tmp_path, ("no-such-package",))
    assert found["commit"] is None and not found["clean"] and "no-such-package" not in found["versions"]
