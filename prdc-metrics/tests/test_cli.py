"""The command line as a user meets it: subprocesses, exit codes, one clear line per mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest


def prdc_metrics(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "prdc_metrics", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    np.save(folder / "real.npy", rng.standard_normal((100, 8)))
    np.savez(folder / "fake.npz", features=rng.standard_normal((80, 8)))
    np.save(folder / "other.npy", rng.standard_normal((80, 7)))
    return folder


def test_eval_prints_json_and_explains_on_stderr(sets):
    done = prdc_metrics("eval", sets / "real.npy", sets / "fake.npz", "--nearest-k", 3, 5, "--json", sets / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((sets / "out.json").read_text())
    assert set(result["values"]) == {"3", "5"} and result["num_fake"] == 80
    assert "identical laws: density 1" in done.stderr and "100 reals and 80 fakes" in done.stderr


def test_num_samples_of_feature_files(sets):
    done = prdc_metrics("eval", sets / "real.npy", sets / "fake.npz", "--num-samples", 40, "--seed", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_real"] == result["num_fake"] == 40


def test_fit_then_eval_equals_eval(sets):
    assert prdc_metrics("fit", sets / "real.npy", sets / "real.manifold").returncode == 0
    whole = json.loads(prdc_metrics("eval", sets / "real.npy", sets / "fake.npz").stdout)
    again = json.loads(prdc_metrics("eval", sets / "real.manifold", sets / "fake.npz").stdout)
    assert whole["values"] == again["values"]


def test_mistakes(sets):
    (sets / "cut.npy").write_bytes((sets / "real.npy").read_bytes()[:200])
    for words, message in (
        (["eval", sets / "real.npy", sets / "other.npy"], "real has 8 dimensions and fake 7"),
        (["eval", sets / "none.npy", sets / "fake.npz"], "none.npy"),
        (["eval", sets / "cut.npy", sets / "fake.npz"], "cut.npy"),
        (["eval", sets / "real.npy", sets / "fake.npz", "--nearest-k", "100"], "k must lie in 1..99"),
        (["run", "figure-33"], "unknown table 'figure-33'"),
        (["run", "--scale", "huge"], "no table has a scale 'huge'"),
    ):
        done = prdc_metrics(*words)
        assert done.returncode == 2, words
        assert message in done.stderr and "Traceback" not in done.stderr


def test_run_twice_runs_nothing_new():
    first = prdc_metrics("run", "figure-1", "--scale", "smoke", "--force")
    assert first.returncode == 0, first.stderr
    assert "figure-1" in first.stdout and "Density is 6 of 10" in first.stdout
    listed = prdc_metrics("run", "figure-1", "--scale", "smoke", "--dry-run")
    assert "│ all      │              │ 0 " in listed.stdout or " 0 " in listed.stdout
    assert prdc_metrics("expect", "--n", 10000, "--m", 10000).stdout.count(": 5") == 1
