"""Which wheels a machine without a network needs; what resolves and downloads them is uv's and pip's."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import wheels  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """What was called; uv answers with four pins."""
    made = []

    def answer(command, **options):
        made.append(command)
        return subprocess.CompletedProcess(command, 0, "torch==2.11.0\nnumpy==2.5.2\nFoo.Bar==1.0\nhatchling==1.33.0\n")

    monkeypatch.setattr(wheels.subprocess, "run", answer)
    return made


def test_what_the_machine_has_is_left_out_whatever_its_version_and_spelling(calls):
    assert wheels.pins("3.12", "x86_64", ["torch==2.10.0", "foo_bar==2.0", ""]) == ["numpy==2.5.2", "hatchling==1.33.0"]
    (command,) = calls
    assert command[command.index("--python-version") + 1] == "3.12"
    assert command[command.index("--constraints") + 1] == "requirements.lock"
    assert sum(word.endswith("pyproject.toml") for word in command) == 10  # no extras: neither peers nor tools


def test_wheels_of_the_target_are_downloaded_and_no_sources(calls, tmp_path):
    wheels.download(["numpy==2.5.2"], "3.12", "aarch64", tmp_path)
    (command,) = calls
    assert {"--no-deps", "--only-binary=:all:", "numpy==2.5.2", "manylinux_2_28_aarch64"} <= set(command)
    wheels.download([], "3.12", "aarch64", tmp_path)
    assert len(calls) == 1


def test_a_wheel_that_cannot_be_had_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=r"3\.12 on x86_64"):
        wheels.download(["numpy==2.5.2"], "3.12", "x86_64", tmp_path)
