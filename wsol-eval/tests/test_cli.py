"""The command line as a user meets it: exit codes, JSON on stdout, one clear line per mistake."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wsol_eval import Metadata, ScoreMaps, cli, read_metadata, resize_normalize, write_metadata
from wsol_eval.build import build_metadata
from wsol_eval.data import read_mask
from wsol_eval.errors import KINDS
from wsol_eval.tiny import write


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
    assert "nothing is wrong" in wsol_eval(*verify).stdout
    built = wsol_eval("data", "build-metadata", "--data-root", maps / "images", "--annotations", maps / "boxes.csv",
                      "--output", maps / "built")  # fmt: skip
    assert built.returncode == 0 and "8 images of 2 classes" in built.stdout
    (maps / "images" / "a" / "0.png").rename(maps / "images" / "gone")
    broken = wsol_eval(*verify)
    (maps / "images" / "gone").rename(maps / "images" / "a" / "0.png")
    assert broken.returncode == 1 and "a/0.png: no such image" in broken.stdout and "problems found: 1" in broken.stderr


def test_the_references_command_line_and_its_folders(wsol_eval, maps, tmp_path):
    """README of clovaai/wsolevaluation, all flags of evaluation.py: the number that it prints is `localization`."""
    shutil.copytree(maps / "metadata", tmp_path / "metadata" / "CUB")
    words = [f"--scoremap_root={maps / 'cam'}", f"--metadata_root={tmp_path / 'metadata'}/", "--mask_root=dataset/",
             "--dataset_name=CUB", "--split=val", "--cam_curve_interval=0.01"]  # fmt: skip
    plain = json.loads(wsol_eval("score", *words).stdout)
    assert plain["localization"] == plain["max_box_acc"] and plain["thresholds"] == 100
    v2 = json.loads(wsol_eval("score", *words, "--multi_contour_eval", "--multi_iou_eval", "TRUE").stdout)
    assert v2["localization"] == v2["max_box_acc_v2"] == plain["max_box_acc_v2"]
    other = json.loads(wsol_eval("score", *words, "--iou_threshold_list", 50, 90, "--multi_iou_eval=no").stdout)
    assert other["contours_all"].keys() == {"iou50", "iou90"}
    assert wsol_eval("score", *words, "--multi_iou_eval", "maybe").returncode == 2


def test_score_fits_maps_of_every_size_and_tells_errors_and_classes(wsol_eval, maps, tmp_path):
    for i in range(8):
        path = tmp_path / "raw" / "aabbaabb"[i] / f"{i}.npy"  # without .png, as the reference's README has it
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(i).normal(size=(1, 7, 7)))
    shared = ["score", "--metadata-root", maps / "metadata", "--scoremap-root", tmp_path / "raw"]
    refused = wsol_eval(*shared)
    assert refused.returncode == 2 and "expected a map of 224 x 224, got 7 x 7; pass --resize" in refused.stderr
    native = wsol_eval(*shared, "--native")
    assert native.returncode == 2 and "native map has its image's size, 90 x 100, got 7 x 7" in native.stderr
    result = json.loads(wsol_eval(*shared, "--resize", "--errors", "--per-class").stdout)
    assert sum(result["errors"][kind] for kind in KINDS) == pytest.approx(100)
    assert {name: each["images"] for name, each in result["per_class"].items()} == {"0": 4, "1": 4}
    assert wsol_eval(*shared, "--resize", "--view", "center-crop").returncode == 0


def test_score_on_masks(wsol_eval, tmp_path):
    """OpenImages: everything works on masks, or is refused by name."""
    write(tmp_path / "root")
    root = tmp_path / "root"
    metadata = read_metadata(root / "metadata" / "OpenImages" / "val")
    for name in metadata.image_ids:
        mask = read_mask(metadata, name, root / "OpenImages", None)
        near = np.where(mask == 1, 0.9, 0.1) + 0.05 * np.random.default_rng(len(name)).random(mask.shape)
        ScoreMaps(tmp_path / "native").write([name], torch.from_numpy(near)[None])
        ScoreMaps(tmp_path / "fixed").write([name], resize_normalize(near, 224))
    shared = ["score", "--dataset", "OpenImages", "--metadata_root", root / "metadata", "--mask_root", root]
    done = wsol_eval(*shared, "--scoremap_root", tmp_path / "native", "--native", "--tau", 0.5, "--intervals")
    found = json.loads(done.stdout)
    assert found["pxap"] == pytest.approx(100) and found["fixed_tau_pixels"]["iou"] == pytest.approx(100)
    assert found["intervals"]["pxap"]["low"] > 99
    both = wsol_eval(*shared, "--scoremap_root", tmp_path / "fixed", "--baseline-root", tmp_path / "fixed")
    assert json.loads(both.stdout)["difference_to_baseline"]["pxap"]["value"] == 0
    for word in (["--tau-from", tmp_path / "x.json"], ["--errors"], ["--per-class"], ["--box-convention", "exact"]):
        refused = wsol_eval(*shared, "--scoremap_root", tmp_path / "fixed", *word)
        assert refused.returncode == 2 and f"{word[0]}: this needs boxes" in refused.stderr


def test_splits_are_no_classes(wsol_eval, tmp_path):
    write(tmp_path / "tiny")
    root = tmp_path / "data" / "birds"
    for split in ("train", "val", "test"):
        shutil.copytree(tmp_path / "tiny" / "OpenImages" / split, root / split)
    for path in root.rglob("*.png"):
        path.unlink()
    images = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    (tmp_path / "boxes.csv").write_text("\n".join(f"{name},10,20,60,70" for name in images))
    words = ["data", "build-metadata", "--data-root", root, "--annotations", tmp_path / "boxes.csv"]
    built = wsol_eval(*words, "--output", tmp_path / "data" / "metadata" / "birds")
    assert built.returncode == 0 and built.stdout.count("of 3 classes") == 3, built.stderr
    recipe = ["--arch", "small", "--epochs", 1, "--batch-size", 4, "--device", "cpu", "--output", tmp_path / "x.pt"]
    trained = wsol_eval("train", "--dataset", "birds", "--data-root", tmp_path / "data", *recipe)
    assert trained.returncode == 0, trained.stderr


def test_boxes_of_coco_and_voc(maps, tmp_path):
    coco = {"images": [{"id": 7, "file_name": "0.png"}], "annotations": [{"image_id": 7, "bbox": [10, 20, 51, 51]}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "0.xml").write_text(
        "<annotation><filename>0.png</filename><object><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>61</xmax>"
        "<ymax>71</ymax></bndbox></object></annotation>"
    )
    for annotations in (tmp_path / "coco.json", tmp_path / "voc"):
        assert build_metadata(maps / "images", annotations)[""].boxes["a/0.png"].tolist() == [[10, 20, 60, 70]]
    coco["images"][0]["file_name"] = "none.png"
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="expected one image named 'none.png', found 0"):
        build_metadata(maps / "images", tmp_path / "coco.json")


def test_all_that_is_missing_is_told_before_anything_is_trained(wsol_eval, tmp_path):
    """A missing evaluation set, a truncated JPEG, a class with few images."""
    write(tmp_path / "root")
    root = tmp_path / "root"
    gone = read_metadata(root / "metadata" / "CUB" / "test").image_ids[1]
    (root / "CUB" / gone).unlink()
    shutil.rmtree(root / "metadata" / "CUB" / "val")
    search = ["search", tmp_path / "out", "--dataset", "CUB", "--data-root", root, "--device", "cpu", "--arch", "small"]
    search += ["--epochs", 1, "--batch-size", 4, "--trials", 1, "--cam-curve-interval", 0.1]
    told = wsol_eval(*search)
    assert told.returncode == 2 and "metadata of CUB, val" in told.stderr and "1 of 9 files of CUB, test" in told.stderr
    assert not (tmp_path / "out").exists()
    dry = wsol_eval("run", "table-8-cub", "--scale", "paper", "--dry-run", "--data-root", root)
    assert dry.returncode == 0 and "missing: ImageNet weights of vgg16" in dry.stdout.replace("\n", " ")
    table = wsol_eval("run", "table-8-cub", "--scale", "paper", "--data-root", root)
    assert table.returncode == 2 and "metadata of CUB, val" in table.stderr

    shutil.rmtree(root)
    write(root)
    cut = root / "CUB" / read_metadata(root / "metadata" / "CUB" / "test").image_ids[0]
    cut.write_bytes(cut.read_bytes()[:-200])
    broken = wsol_eval(*search)
    assert broken.returncode == 1 and cut.name in broken.stderr.splitlines()[-1]
    assert "Traceback" not in broken.stderr
    went_on = json.loads(wsol_eval(*search, "--skip-broken").stdout)
    assert went_on["skipped"] == 1 and went_on["images_of_full_supervision"] == 14  # 6, 5 and 3 of the classes


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
    searched = wsol_eval("search", tmp_path / "search", *recipe, "--space", "photographs", "--trials", 1)
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
        (["train", "--output", maps / "x.pt", "--dataset", "CUB", "--data-root", maps], 2, "metadata of CUB, train"),
    ):
        done = wsol_eval(*words)
        assert done.returncode == code, (words, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "wsol_eval", "run", "table-9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("wsol-eval: unknown table 'table-9'; there are center")
