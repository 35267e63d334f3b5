"""The command line as a user meets it: subprocesses, exit codes, one clear line per mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hib_ndigit_mnist.data import read_digits


def hib(*words):
    return subprocess.run([sys.executable, "-m", "hib_ndigit_mnist", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pt"
    done = hib("train", "--scale", "smoke", "--steps", 150, "--components", 2, "--output", path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "after 150 steps" in done.stderr and [each.name for each in path.parent.iterdir()] == ["m.pt"]
    return path


def test_help_is_quick_because_torch_stays_out():
    code = "import sys, hib_ndigit_mnist.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert "default: 1500" in hib("train", "--help").stdout


def test_train_eval_embed_inspect(model, tmp_path):
    scores = json.loads(hib("eval", model, "--images", 200, "--pairs", 400, "--queries", 50).stdout)
    assert {"ap_clean", "ap_corrupt", "knn_corrupt_same", "auc", "tau_knn_corrupt", "ece_clean"} <= scores.keys()
    digits = read_digits()
    for i in range(3):
        Image.fromarray(digits.test_images[i].numpy()).resize((64, 64)).save(tmp_path / f"{i}.png")
    assert hib("embed", model, tmp_path, "--out", tmp_path / "e.npz").returncode == 0
    with np.load(tmp_path / "e.npz") as found:
        assert found["mu"].shape == found["logvar"].shape == (3, 2, 2) and found["eta"].shape == (3,)
    seen = json.loads(hib("inspect", tmp_path / "0.png", "--ckpt", model, "--top", 10).stdout)
    assert len(seen["match"]) == 10 and 0 < seen["eta"] < 1
    probabilities = list(seen["match"].values())
    assert probabilities == sorted(probabilities, reverse=True)


def test_run_twice_runs_nothing_new():
    words = ("run", "figure-sweep", "--scale", "smoke", "--jobs", 1)
    first = hib(*words, "--force")
    assert first.returncode == 0, first.stderr
    assert "figure-sweep" in first.stdout and "NOT MEASURED" not in first.stdout
    listed = hib(*words, "--dry-run").stdout
    assert [line for line in listed.splitlines() if "all" in line and " 0 " in line]


def test_mistakes(model, tmp_path):
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:300])
    torch.save({"other": 1}, tmp_path / "other.pt")
    (tmp_path / "no.png").write_bytes(b"no image")
    for words, message in (
        (["run", "table-11"], "unknown table 'table-11'"),
        (["run", "--scale", "huge"], "no"),
        (["run", "table-1", "--rows", "nonesuch"], "unknown row 'nonesuch'; did you mean"),
        (["train", "--scale", "huge"], "scale: one of smoke, embedded, mnist, paper"),
        (["train", "--samples", "7", "--components", "2"], "multiple of components"),
        (["eval", tmp_path / "none.pt"], "none.pt: no such file"),
        (["eval", tmp_path / "cut.pt"], "cut.pt: cannot be read"),
        (["inspect", tmp_path / "no.png", "--ckpt", tmp_path / "other.pt"], "no model of this package"),
        (["inspect", tmp_path / "no.png", "--ckpt", model], "no.png: cannot be read as an image"),
        (["data", "--out", tmp_path / "out", "--data-root", tmp_path], "MNIST was not found; searched"),
    ):
        done = hib(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, words
