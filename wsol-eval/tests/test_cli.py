"""The command line as a user meets it: exit codes, JSON on stdout, one clear line per mistake."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wsol_eval import Metadata, ScoreMaps, cli, write_metadata


@pytest.fixture
def wsol_eval(monkeypatch, capsys):
    """The entry point in this process: exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["wsol-eval", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return call


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    ids = [f"{label}/{i}.png" for i, label in enumerate("aabbaabb")]
    boxes = {name: np.array([[10, 20, 60, 70]]) for name in ids}
    labels = {name: "ab".index(name[0]) for name in ids}
    for name in ids:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(root / "images" / name)
    for split in ("val", "test"):
        write_metadata(Metadata(ids, labels, dict.fromkeys(ids, (100, 90)), boxes), root / "metadata" / split)
    ScoreMaps(root / "cam").write(ids, torch.from_numpy(rng.random((8, 224, 224))))
    ScoreMaps(root / "ours.lmdb", "uint8").write(ids, torch.from_numpy(rng.random((8, 224, 224))))
    (root / "classes.csv").write_text("\n".join(f"{name},{i % 2},0,1" for i, name in enumerate(ids)))
    (root / "boxes.csv").write_text("\n".join(f"{name},10,20,60,70" for name in ids))
    return root


def test_score_accepts_the_references_flags(wsol_eval, maps):
    shared = ["--metadata_root", maps / "metadata", "--cam_curve_interval", "0.1", "--dataset_name", "CUB"]
    val = wsol_eval("score", "--scoremap_root", maps / "cam", *shared, "--split", "val", "--json", maps / "val.json")
    assert val.returncode == 0, val.stderr
    first = json.loads(val.stdout)
    assert first["images"] == 8 and first["dataset"] == "CUB" and first["thresholds"] == 10
    assert {"max_box_acc_v2", "max_box_acc", "contours_all", "tau_star_largest", "box_convention"} <= first.keys()
    test = wsol_eval(
        "score", "--scoremap-root", maps / "ours.lmdb", *shared, "--split", "test",
        "--predictions", maps / "classes.csv",
        "--tau", "0.2", "--tau-from", maps / "val.json", "--intervals", "--baseline-root", maps / "cam",
        "--overlays", maps / "overlays", "--image-root", maps / "images",
    )  # fmt: skip
    assert test.returncode == 0, test.stderr
    result = json.loads(test.stdout)
    assert result["top1_accuracy"] == 50 and result["top1_loc_all"]["iou30"] <= result["contours_all"]["iou30"]
    assert result["transferred_tau_all"]["iou30"] <= result["contours_all"]["iou30"]
    assert result["fixed_tau_largest"]["tau"] == 0.2
    assert set(result["difference_to_baseline"]["v2"]) == {"value", "low", "high", "p"}
    assert Image.open(maps / "overlays" / "a" / "0.png.png").size == (224, 224)


def test_data_verbs(wsol_eval, maps):
    listed = wsol_eval("data", "--data-root", maps)
    assert listed.returncode == 0 and "CUBV2 boxes" in listed.stdout and "data verify" in listed.stdout
    verify = ["data", "verify", "--data-root", maps / "images", "--metadata-root", maps / "metadata"]
    assert "all is well" in wsol_eval(*verify).stdout
    built = wsol_eval("data", "build-metadata", "--data-root", maps / "images", "--annotations", maps / "boxes.csv",
                      "--output", maps / "built")  # fmt: skip
    assert built.returncode == 0 and "8 images of 2 classes" in built.stdout
    (maps / "images" / "a" / "0.png").rename(maps / "images" / "gone")
    broken = wsol_eval(*verify)
    (maps / "images" / "gone").rename(maps / "images" / "a" / "0.png")
    assert broken.returncode == 1 and "a/0.png: no such file" in broken.stdout and "1 problems" in broken.stderr


def test_conformance(wsol_eval, tmp_path):
    assert wsol_eval("conformance", "--write", tmp_path).returncode == 0
    done = wsol_eval("conformance", "--check", tmp_path / "answers.json")
    assert done.returncode == 1 and "pxap: no answer" in done.stdout and "9 of 9 answers" in done.stderr


def test_train_eval_search_on_scenes(wsol_eval, tmp_path):
    recipe = ["--arch", "small", "--feature-map", 8, "--lr", 0.02, "--epochs", 1, "--lr-decay-frequency", 2]
    recipe += ["--batch-size", 50, "--device", "cpu"]
    trained = wsol_eval("train", "--output", tmp_path / "cam.pt", *recipe)
    assert trained.returncode == 0, trained.stderr
    measured = wsol_eval("eval", tmp_path / "cam.pt", "--split", "test", "--device", "cpu", "--cam-curve-interval", 0.1,
                         "--scoremap-root", tmp_path / "maps.lmdb")  # fmt: skip
    assert measured.returncode == 0 and json.loads(measured.stdout)["images"] == 300, measured.stderr
    assert ScoreMaps(tmp_path / "maps.lmdb").read("test 0").shape == (32, 32)
    searched = wsol_eval("search", tmp_path / "search", *recipe, "--space", "scenes", "--trials", 1)
    assert searched.returncode == 0, searched.stderr
    assert json.loads(searched.stdout)["looks_at_test"] == 1


def test_run_and_its_mistakes(wsol_eval, maps):
    listed = wsol_eval("run", "center", "--scale", "embedded", "--dry-run")
    assert listed.returncode == 0 and "center" in listed.stdout
    (maps / "cut").mkdir(exist_ok=True)
    for i in range(8):
        path = maps / "cut" / f"{'aabbaabb'[i]}" / f"{i}.png.npy"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((maps / "cam" / f"{'aabbaabb'[i]}" / f"{i}.png.npy").read_bytes()[:300])
    score = ["score", "--metadata-root", maps / "metadata", "--scoremap-root"]
    for words, code, message in (
        (["run", "table-9"], 2, "unknown table 'table-9'"),
        (["run", "--scale", "huge"], 2, "no table has a scale 'huge'"),
        ([*score, maps / "cut"], 2, "0.png.npy: the score map is truncated"),
        ([*score, maps / "none"], 2, "no score map of image 'a/0.png'"),
        ([*score, maps / "cam", "--metadata-root", maps], 2, "image_ids.txt: no such metadata file"),
        (["eval", maps / "none.pt"], 2, "no such checkpoint"),
        (["train", "--output", maps / "x.pt", "--dataset", "CUB", "--data-root", maps], 2, "no such metadata file"),
    ):
        done = wsol_eval(*words)
        assert done.returncode == code, (words, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "wsol_eval", "run", "table-9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("wsol-eval: unknown table 'table-9'; there are center")
