"""All that is missing is told at once, before the first run."""

import pytest

from shared_utils.preflight import Missing, Need, disk_space, file, package, require
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run


def test_every_unmet_need_has_a_line(tmp_path):
    needs = [
        file(tmp_path, "a folder", "make it"),
        file(tmp_path / "weights.pth", "VGG-16", "download it"),
        package("json", "install it"),
        package("no_such_package", "pip install it"),
        disk_space(tmp_path / "not" / "there", 1),
        disk_space(tmp_path, 1e12),
    ]
    with pytest.raises(Missing) as error:
        require([*needs, *needs])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("weights.pth): download it") and "no_such_package" in lines[2] and "make room" in lines[3]
    require(needs[:1])


def test_nothing_runs_where_a_later_run_lacks_something(tmp_path):
    ran = []

    def execute(settings, seed):
        ran.append(seed)
        return Outcome({"a": 1.0})

    def needs(settings):
        return [Need("CIFAR-100", "put it there", settings["set"] != "absent")]

    runs = [Run("t", "row", "paper", seed, {"set": name}, ("a",)) for seed, name in ((0, "present"), (1, "absent"))]
    log = RunLog(tmp_path / "paper.jsonl")
    with pytest.raises(Missing, match="CIFAR-100: put it there"):
        run_missing("p", runs, log, execute, repository=tmp_path, needs=needs)
    assert not ran
    run_missing("p", runs[:1], log, execute, repository=tmp_path, needs=needs)
    assert ran == [0]
    assert log.records()[0]["precision"] == "32-true" and log.records()[0]["caveats"] == []
