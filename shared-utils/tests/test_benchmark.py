"""Benchmark records from given samples; nothing is timed."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch

from shared_utils import benchmark
from shared_utils.benchmark import Timing, in_turn, record, report, summary

CPU = torch.device("cpu")


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed project folder whose runs/ git ignores, as the current command's."""
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "pyproject.toml").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "start")
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "bench", "--repeats", "3"])
    return tmp_path


def measure(project):
    timings = [
        Timing("sort", "peer 1.0", [1.0, 2.0, 4.0], [3.0, 4.0, 16.0], target=">= 2"),
        Timing("whole set [s]", None, [130.0], unit="s", target="<= 120", note="on two cores"),
    ]
    report("shop", iter(timings), project, ["numpy"], {"repeats": 3})


def test_the_ratio_is_the_peers_cost_over_ours_pair_by_pair():
    timing = Timing("sort", "peer", [1.0, 2.0, 4.0], [3.0, 4.0, 16.0])
    assert timing.ratio == (3.0, 2.0, 4.0)
    assert Timing("fact", None, [1.0]).ratio is None
    with pytest.raises(ValueError):
        _ = Timing("sort", "peer", [1.0, 2.0], [3.0]).ratio


@pytest.mark.parametrize(
    ("target", "met"),
    [("", None), (">= 0.8", True), (">= 0.9", False), (">= 1/1.4", True), (">= 1/1.2", False), ("<= 0.8", True)],
)
def test_a_target_bounds_the_median_ratio(target, met):
    assert Timing("step", "plain step", [10.0, 10.0, 10.0], [5.0, 8.0, 12.0], target=target).met is met


def test_a_facts_target_bounds_its_median():
    assert Timing("rate", None, [2900.0, 3100.0, 3000.0], unit="steps / s", target=">= 3000").met is True
    assert Timing("set", None, [130.0], unit="s", target="<= 120").met is False


def test_contenders_are_warmed_up_and_then_called_in_turn(monkeypatch):
    now, calls = [0.0], []

    def work(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    ours, theirs = in_turn(work("a", 0.010), work("b", 0.050), 3, CPU)
    assert ours == pytest.approx([10.0] * 3) and theirs == pytest.approx([50.0] * 3)
    assert "".join(calls) == "aabb" + 3 * "aab"  # ours is short: two calls per sample
    assert in_turn(work("a", 0.010), None, 2, CPU) == (pytest.approx([10.0] * 2), [])


@pytest.mark.parametrize(("threads", "expected"), [(1, "process_time"), (2, "perf_counter")])
def test_one_thread_is_measured_in_cpu_time(monkeypatch, threads, expected):
    ticks = {name: count() for name in ("process_time", "perf_counter")}
    for name, tick in ticks.items():
        monkeypatch.setattr(benchmark.time, name, lambda tick=tick: next(tick))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    in_turn(lambda: None, lambda: None, 1, CPU)
    assert {name for name, tick in ticks.items() if next(tick)} == {expected}


def test_the_record_holds_samples_and_where_they_come_from(project, capsys):
    measure(project)
    found = json.loads((project / "runs" / "bench.json").read_text())
    assert found["timings"][0]["theirs"] == [3.0, 4.0, 16.0]
    assert found["command"] == "shop bench --repeats 3" and found["settings"] == {"repeats": 3}
    assert found["clean"] is True and len(found["commit"]) == 40
    assert {"python", "torch", "numpy"} == set(found["versions"])
    shown = capsys.readouterr().out
    assert "3.00 (2.00 .. 4.00)" in shown and "threads" in shown and "[s]" in shown
    assert [path.name for path in (project / "runs").iterdir()] == ["bench.json"]


def test_a_missing_peer_ends_before_anything_is_measured(project):
    measured = []
    with pytest.raises(SystemExit, match="^shop: no-such-peer is missing: pip install no-such-peer$"):
        report("shop", (measured.append(1) for _ in range(1)), project, ["no-such-peer"], {})
    assert not measured and not (project / "runs").exists()


def test_a_summary_has_a_line_per_timing_of_all_files(project):
    measure(project)
    path = project / "runs" / "bench.json"
    frame = summary([path, path])
    assert frame.what.tolist() == ["sort", "whole set [s]"] * 2
    assert frame.iloc[0][["ours", "peer's", "ratio", "met"]].tolist() == [
        "2.00 ms",
        "4.00 ms",
        "3.00 (2.00 .. 4.00)",
        "yes",
    ]
    assert frame.iloc[1][["peer", "ours", "ratio", "target", "met"]].tolist() == ["", "130 s", "", "<= 120", "no"]
    assert "numpy" in frame.versions[0] and "threads" in frame.device[0]
    assert summary([]).empty


def test_record_moves_the_benchmark_beside_the_runs(project):
    measure(project)
    assert record(project) == 0
    assert (project / "results" / "bench.json").exists() and not (project / "runs" / "bench.json").exists()
    git(project, "add", ".")
    git(project, "commit", "-qm", "recorded")
    measure(project)
    (project / "runs" / "bench.json").rename(project / "runs" / "bench-cuda.json")
    assert record(project) == 0  # a GPU's comes beside it
    assert (project / "results" / "bench-cuda.json").exists() and not list((project / "runs").glob("bench*"))
    assert (project / "results" / "bench.json").exists()


def test_an_unclean_tree_records_nothing(project):
    measure(project)
    (project / "new.py").write_text("")
    with pytest.raises(RuntimeError, match="uncommitted"):
        record(project)
    measure(project)
    git(project, "add", ".")
    git(project, "commit", "-qm", "code")
    with pytest.raises(RuntimeError, match=r"bench\.json was measured on uncommitted code"):
        record(project)
    assert (project / "runs" / "bench.json").exists()
