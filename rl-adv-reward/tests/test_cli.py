"""The command line and the runs of tables, at smoke scale."""

import json
import os
import subprocess
import sys

import pytest

from rl_adv_reward import experiments


def cli(*words, cwd=None):
    command = [sys.executable, "-m", "rl_adv_reward", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_run_twice_runs_nothing_new(tmp_path, monkeypatch, capsys):
    from rl_adv_reward.cli import Run

    (tmp_path / "tables").symlink_to(experiments.PROJECT / "tables")
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    run = Run(tables=("figure-2",), scale="smoke", jobs=1)
    run()
    log = tmp_path / "runs" / "smoke.jsonl"
    once = log.read_text()
    assert len(once.splitlines()) == 3 and "ATN, eps 0.05" in capsys.readouterr().out
    run()
    assert log.read_text() == once


def call(monkeypatch, *words):
    """The command line in this process."""
    from rl_adv_reward.cli import main

    monkeypatch.setattr(sys, "argv", ["rl-adv-reward", *map(str, words)])
    main()


def test_train_attack_eval_and_play_from_the_command_line(tmp_path, monkeypatch, capsys):
    done = cli("train", "--device", "cpu", "smoke", cwd=tmp_path)
    assert done.returncode == 0 and "victim_return" in json.loads(done.stdout), done.stderr
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "attack", "--victim", "victim.pt", "smoke", "--goal", "park", "--learner", "frozen_q")
    attacked = json.loads(capsys.readouterr().out)
    call(monkeypatch, "eval", "--victim", "victim.pt", "--atn", "atn.pt", "smoke", "--goal", "park")
    assert json.loads(capsys.readouterr().out) == attacked
    call(monkeypatch, "play", "--victim", "victim.pt", "--atn", "atn.pt", "--steps", "5", "smoke")
    assert (tmp_path / "attack.gif").read_bytes()[:3] == b"GIF"
    call(monkeypatch, "sweep", "--victim", "victim.pt", "--bounds", "0", "1/10", "smoke", "--learner", "frozen_q")
    assert "1/10" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("run", "table-9"), "unknown table 'table-9'; the tables are"),
        (("run", "--scale", "huge"), "no table has the scale 'huge'"),
        (("eval", "--victim", "nothing.pt", "smoke"), "nothing.pt: checkpoint not found"),
        (("attack", "smoke", "--eps", "1.5"), "eps must lie in [0, 1]"),
        (("play", "--output", "a.mp4", "smoke"), "must end in .gif or .png"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rl-adv-reward:")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_data_and_dry_run_name_what_there_is(monkeypatch, capsys):
    call(monkeypatch, "data")
    assert capsys.readouterr().out.count("yes") == 3
    call(monkeypatch, "run", "--dry-run", "--scale", "paper")
    assert "table-1" in capsys.readouterr().out


def test_figures_are_drawn_from_a_run_log(tmp_path, monkeypatch):
    from rl_adv_reward import figures

    monkeypatch.setattr(figures, "SCALES", ("smoke",))
    (tmp_path / "tables").symlink_to(experiments.PROJECT / "tables")
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    chosen = [table for table in experiments.tables() if table.id.startswith("figure")]
    log = experiments.run_tables(chosen, "smoke", jobs=1)
    (tmp_path / "results").mkdir()
    log.path.rename(tmp_path / "results" / "smoke.jsonl")
    figures.draw_all(chosen, tmp_path / "results")
    assert {p.name for p in (tmp_path / "results" / "figures").glob("*.png")} == {
        f"figure-{n}.png" for n in range(1, 5)
    }
