"""The command line as a user meets it: subprocesses, exit codes, one clear line per mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import hib_ndigit_mnist
from hib_ndigit_mnist.cli import main
from hib_ndigit_mnist.data import read_digits


def hib(*words):
    return subprocess.run([sys.executable, "-m", "hib_ndigit_mnist", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pt"
    words = ["--scale", "smoke", "--steps", "150", "--components", "2", "--output", str(path), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hib", "train", *words])
        main()
    assert [each.name for each in path.parent.iterdir()] == ["m.pt"]
    return path


def test_help_is_quick_because_torch_stays_out():
    code = "import sys, hib_ndigit_mnist.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert "default: 1500" in hib("train", "--help").stdout


def test_every_public_name_is_what_it_says():
    for name in hib_ndigit_mnist.__all__:
        assert callable(getattr(hib_ndigit_mnist, name)), name  # no module hides it


def test_train_eval_embed_inspect(model, tmp_path, monkeypatch, capsys):
    def verb(*words):
        monkeypatch.setattr(sys, "argv", ["hib", *map(str, words)])
        main()
        return capsys.readouterr().out

    scores = json.loads(verb("eval", model, "--images", 200, "--pairs", 400, "--queries", 50))
    assert {
        "ap_clean",
        "ap_corrupt",
        "knn_corrupt_same",
        "auc",
        "tau_knn_corrupt",
        "ece_clean",
        "r_auroc_clean",
    } <= scores.keys()
    digits = read_digits()
    for i in range(3):
        Image.fromarray(digits.test_images[i].numpy()).resize((64, 64)).save(tmp_path / f"{i}.png")
    verb("embed", model, tmp_path, "--output", tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as found:
        assert found["files"].tolist() == ["0.png", "1.png", "2.png"]
        assert found["mu"].shape == found["logvar"].shape == (3, 2, 2) and found["eta"].shape == (3,)
    seen = json.loads(verb("inspect", tmp_path / "0.png", "--checkpoint", model, "--top", 10))
    assert len(seen["match"]) == 10 and 0 < seen["eta"] < 1
    probabilities = list(seen["match"].values())
    assert probabilities == sorted(probabilities, reverse=True)


def test_run_twice_runs_nothing_new(monkeypatch, capsys):
    words = ["hib", "run", "figure-sweep", "--scale", "smoke", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--force"])
    main()
    assert "figure-sweep" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    main()
    listed = capsys.readouterr().out
    assert [line for line in listed.splitlines() if "all" in line and " 0 " in line]


def test_mistakes(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:300])
    torch.save({"other": 1}, tmp_path / "other.pt")
    (tmp_path / "no.png").write_bytes(b"no image")
    for words, message in (
        (["run", "table-11"], "unknown table 'table-11'"),
        (["run", "--scale", "huge"], "no table has a scale 'huge'"),
        (["run", "table-1", "figure-8", "--scale", "smoke"], "figure-8: unknown scale 'smoke'"),
        (["eval", model, "--outside", tmp_path], "--outside is compared with your own images"),
        (["run", "table-1", "--rows", "nonesuch"], "unknown row 'nonesuch'; did you mean"),
        (["train", "--scale", "huge"], "scale: expected one of smoke, embedded, lenet, paper"),
        (["train", "--samples", "7", "--components", "2"], "multiple of components"),
        (["eval", tmp_path / "none.pt"], "none.pt: no such file"),
        (["eval", tmp_path / "cut.pt"], "cut.pt: cannot be read"),
        (["inspect", tmp_path / "no.png", "--checkpoint", tmp_path / "other.pt"], "not a model of this package"),
        (["inspect", tmp_path / "no.png", "--checkpoint", model], "no.png: this is not an image"),
        (["data", "--output", tmp_path / "out", "--data-root", tmp_path], "MNIST was not found; searched"),
    ):
        monkeypatch.setattr(sys, "argv", ["hib", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().err
        assert (
            ended.value.code == (1 if "this is not" in message else 2)
            and message in shown
            and len(shown.splitlines()) == 1
        ), (words, shown)
