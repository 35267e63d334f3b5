"""The command line as a user meets it: exit codes, one clear line per mistake. One command runs as a process."""

import json
import logging
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch

from prdc_metrics import cli, compute_family
from prdc_metrics.tiny import write_tiny


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prdc_metrics(capsys, monkeypatch):
    """The command in this process: a new one takes seconds to import torch."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["prdc-metrics", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main replaces
        write_to(sys.stderr)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    def write_to(stream):  # a handler keeps the stderr that it was made with
        for name in ("prdc_metrics", "prdc-metrics"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:  # pytest has handlers of its own
                    handler.stream = stream

    yield call
    write_to(sys.__stderr__)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    np.save(folder / "real.npy", rng.standard_normal((100, 8)))
    np.savez(folder / "fake.npz", features=rng.standard_normal((80, 8)))
    np.save(folder / "other.npy", rng.standard_normal((80, 7)))
    return folder


def test_eval_prints_json_and_explains_on_stderr(sets):
    words = ["eval", sets / "real.npy", sets / "fake.npz", "--nearest-k", "3", "5", "--json", sets / "out.json"]
    command = [sys.executable, "-m", "prdc_metrics", *words, "--family"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((sets / "out.json").read_text())
    assert set(result["values"]) == {"3", "5"} and result["num_fake"] == 80
    assert result["balls"] == "open" and result["fake"]["rows"] == 80 and result["sample_seed"] == 0
    assert result["prdc_metrics"] and result["ks"] == [3, 5]
    assert result["family"]["5"] == compute_family(
        np.load(sets / "real.npy"), np.load(sets / "fake.npz")["features"], 5
    )
    assert "identical distributions: density 1" in done.stderr and "100 reals and 80 fakes" in done.stderr


def test_num_samples_of_feature_files(sets, prdc_metrics):
    done = prdc_metrics("eval", sets / "real.npy", sets / "fake.npz", "--num-samples", 40, "--seed", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_real"] == result["num_fake"] == 40
    assert "real.npy: 40 of 100 rows, drawn with seed 3" in done.stderr


def test_fit_then_eval_equals_eval(sets, prdc_metrics):
    assert prdc_metrics("fit", sets / "real.npy", sets / "real.manifold").returncode == 0
    whole = json.loads(prdc_metrics("eval", sets / "real.npy", sets / "fake.npz").stdout)
    again = json.loads(prdc_metrics("eval", sets / "real.manifold", sets / "fake.npz").stdout)
    assert whole["values"] == again["values"]
    other = prdc_metrics("eval", sets / "real.manifold", sets / "fake.npz", "--nearest-k", 3)
    assert other.returncode == 2 and "the manifold holds k = 5, not 3" in other.stderr


def test_folder_to_a_number_that_can_be_cited(tmp_path, prdc_metrics):
    """Tiny sets in the tables' own layout: embedding, weights, resize and seed stand beside the values."""
    write_tiny(tmp_path)
    (tmp_path / "ffhq" / "fake" / "00000" / "00004.png").write_bytes(b"no image")
    words = ["eval", tmp_path / "ffhq/real", tmp_path / "ffhq/fake", "--embedding", "random-vgg16-64"]
    words += ["--side", 32, "--workers", 0]
    done = prdc_metrics(*words, "--nearest-k", 3)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "00004.png: this is not an image; replace the file, or pass --skip-broken" in done.stderr
    done = prdc_metrics(*words, "--nearest-k", 3, "--skip-broken", "--num-samples", 20, "--seed", 4)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["real"]["embedding"]["resize"] == "32x32 bilinear antialias"
    assert result["real"]["embedding"]["seed"] == 4 and result["real"]["embedding"]["weights"] == "random"
    assert "20 of 40 images, drawn with seed 4" in done.stderr
    how = [*words[3:], "--skip-broken", "--num-samples", 20, "--seed", 4]
    assert prdc_metrics("features", tmp_path / "ffhq/real", tmp_path / "real.npy", *how).returncode == 0
    assert prdc_metrics("fit", tmp_path / "real.npy", tmp_path / "a.manifold", "--nearest-k", 3).returncode == 0
    assert prdc_metrics("fit", tmp_path / "ffhq/real", tmp_path / "b.manifold", "--nearest-k", 3, *how).returncode == 0
    assert prdc_metrics("features", tmp_path / "ffhq/fake", tmp_path / "fake.npy", *how).returncode == 0
    for real in ("real.npy", "a.manifold", "b.manifold"):  # the origin survives features and radii kept in files
        again = json.loads(prdc_metrics("eval", tmp_path / real, tmp_path / "fake.npy", "--nearest-k", 3).stdout)
        assert again["values"] == result["values"]
        origin = again["real"].get("fitted_on", again["real"])
        assert origin["embedding"] == result["real"]["embedding"]
    verified = prdc_metrics("data", "verify", "--data-root", tmp_path)
    assert verified.returncode == 1 and "1 images cannot be read" in verified.stderr
    empty = prdc_metrics("data", "verify", "--data-root", tmp_path / "elsewhere")
    assert empty.returncode == 2 and "elsewhere: none of the data sets is here" in empty.stderr


def test_what_is_missing_is_said_before_anything_runs(tmp_path, prdc_metrics, monkeypatch):
    """All of it at once: two sets and the weights; nothing has run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    words = ["run", "table-1", "--scale", "paper", "--data-root", tmp_path]
    done = prdc_metrics(*words)
    assert done.returncode == 2
    for what in ("mnist-dcgan, real", "sc09-wavegan, fake", "weights of vgg16-fc2-relu"):
        assert done.stderr.count(what) == 1
    dry = prdc_metrics(*words, "--dry-run")
    assert dry.returncode == 0 and "missing: images of mnist-dcgan, real" in dry.stdout


def test_without_timm_its_networks_say_what_to_install(sets, prdc_metrics, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    done = prdc_metrics("eval", sets, sets, "--embedding", "timm:test_vit")
    assert done.returncode == 1 and done.stderr.startswith("prdc-metrics: embedding 'timm:test_vit' needs timm: pip")


def test_mistakes(sets, prdc_metrics):
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


def test_run_twice_runs_nothing_new(prdc_metrics):
    first = prdc_metrics("run", "figure-1", "--scale", "smoke", "--force", "--jobs", 1)
    assert first.returncode == 0, first.stderr
    assert "figure-1" in first.stdout and "Density is 6 of 10" in first.stdout
    listed = prdc_metrics("run", "figure-1", "--scale", "smoke", "--dry-run")
    assert "│ all      │              │ 0 " in listed.stdout or " 0 " in listed.stdout
    assert prdc_metrics("expect", "--n", 10000, "--m", 10000).stdout.count(": 5") == 1
