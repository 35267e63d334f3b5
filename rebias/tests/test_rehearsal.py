"""Tiny archives through the ordinary path: preflight, broken files, rare classes, a table from run to verdict."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rebias import cli, experiments, figures
from rebias.data import imagenet9, tiny
from rebias.data.dataset import Reading
from rebias.data.imagenet9 import CLASS_OF_WNID, image_folder, validation_set
from rebias.data.inventory import needs, verify
from rebias.experiments import Execution, tables
from rebias.settings import PRESETS
from shared_utils.images import BrokenFile
from shared_utils.preflight import Missing, require
from shared_utils.rehearsal import rehearse

PROJECT = Path(experiments.__file__).parents[2]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    root = tmp_path_factory.mktemp("archives") / "größer nicht"
    tiny.write(root)
    return root


def truncated(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    Image.effect_noise((300, 300), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:5000])


def test_a_table_from_run_to_figure():
    (found,) = rehearse(PROJECT, ["figure-4"])
    assert found.passed, found.problem


@pytest.mark.parametrize("rows", [0, 2, 3])
def test_figure_a4_has_a_panel_for_each_row_however_many(rows, tmp_path):
    (table,) = (each for each in tables() if each.id == "figure-A4")
    found = {
        f"row {i}": [{"cluster_matrix": np.full((9, 9), 0.5), "cluster_counts": np.full((9, 9), 12)}]
        for i in range(rows)
    }
    figure = figures.DRAW["figure-A4"](table, "paper", found)
    titled = [panel.get_title() for panel in figure.axes if panel.axison and panel.get_title()]
    assert len(titled) == 2 + rows
    assert titled[2:] == [f"row {i}, ours: mean of cells 50.0 %" for i in range(rows)]


def test_tiny_archives_are_read_whole(archives):
    checked = verify(archives, workers=0)
    assert not any(broken for _, broken in checked.values())
    counts = {name: count for name, (count, _) in checked.items()}
    assert counts["imagenet/val"] == 2100 and counts["imagenet-a"] == 21 and counts["kinetics/train"] == 10
    assert counts["imagenet/train"] == 85 and counts["mimetics"] == 3  # hidden files do not count


def test_what_is_missing_is_told_at_once_and_nothing_is_trained(tmp_path, monkeypatch):
    tiny.write_mnist(tmp_path)
    tiny.write_images(tmp_path / "imagenet" / "train", sorted(CLASS_OF_WNID)[:2], per_class=1)
    require(needs(PRESETS["mnist"], tmp_path, tmp_path))
    with pytest.raises(Missing) as error:
        require(needs(replace(PRESETS["imagenet9"], method="vanilla", stylised=True), tmp_path, tmp_path))
    for place in ("imagenet/val", "imagenet-a", "stylised-imagenet/train"):
        assert str(tmp_path / place) in str(error.value)
    assert "imagenet/train" not in str(error.value).replace("stylised-imagenet/train", "")
    monkeypatch.setattr(sys, "argv", ["rebias", "run", "table-3", "--scale", "paper", "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_ends_with_one_line_that_names_it(tmp_path, workers):
    tiny.write_images(tmp_path, ["n02085620"], per_class=3)
    truncated(tmp_path / "n02085620" / "ILSVRC_9.JPEG")
    data = image_folder(tmp_path, "x", reading=Reading(workers))
    with pytest.raises(BrokenFile) as error:
        list(data.batches([torch.arange(4)]))
    assert "ILSVRC_9.JPEG" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_broken_images_are_skipped_where_asked_and_counted(tmp_path):
    tiny.write_images(tmp_path, ["n02085620"], per_class=3)
    truncated(tmp_path / "n02085620" / "ILSVRC_1.JPEG")
    data = image_folder(tmp_path, "x", reading=Reading(0, skip_broken=True))
    assert data.names == ["n02085620/ILSVRC_0.JPEG", "n02085620/ILSVRC_2.JPEG"] and len(data.labels) == 2
    assert data.record()["skipped"] == ["n02085620/ILSVRC_1.JPEG"]


def test_a_broken_validation_image_leaves_with_its_clusters(archives, tmp_path):
    (tmp_path / "imagenet").symlink_to(archives / "imagenet")
    import shutil

    copy = tmp_path / "copy" / "imagenet" / "val"
    shutil.copytree(archives / "imagenet" / "val", copy)
    first = sorted(copy.rglob("*.JPEG"))[7]
    truncated(first)
    data, clusters = validation_set(tmp_path / "copy", reading=Reading(0, skip_broken=True))
    whole, every = validation_set(archives, reading=Reading(0))
    kept = [number for number, name in enumerate(whole.names) if not first.match(name)]
    assert len(data) == 2099 and torch.equal(clusters, every[:, kept])


def test_a_class_with_one_image_trains_and_smaller_sets_are_told(archives, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    wnids = sorted(CLASS_OF_WNID)
    (root / "imagenet-a").symlink_to(archives / "imagenet-a")
    (root / "imagenet" / "val").mkdir(parents=True)
    for wnid in wnids[:2]:
        (root / "imagenet" / "val" / wnid).symlink_to(archives / "imagenet" / "val" / wnid)
    table = imagenet9.read_clusters()
    monkeypatch.setattr(imagenet9, "read_clusters", lambda: table[table.path.str.startswith(tuple(wnids[:2]))])
    tiny.write_images(root / "imagenet" / "train", wnids[:1], per_class=1)
    tiny.write_images(root / "imagenet" / "train", wnids[-5:], per_class=2)
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    settings = replace(PRESETS["imagenet9"], method="rubi", epochs=1, batch_size=4, networks="small")
    outcome = Execution(root, Reading(0))(vars(settings), 0)
    assert outcome.metrics["biased_accuracy"] >= 0
    assert outcome.caveats == ["100 of the paper's 2,100 in 9-class ImageNet val"]
    tiny.write_mnist(root, 48, 20)
    settings = replace(PRESETS["mnist"], method="vanilla", epochs=1, batch_size=16, f_widths=(4, 4, 4, 4))
    outcome = Execution(root, Reading(0))(vars(settings), 0)
    assert outcome.caveats[0].startswith("48 of the paper's 60,000") and outcome.precision == "32-true"


def test_a_read_only_data_root_is_enough(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    places = [archives / "MNIST" / "raw", archives / "MNIST", archives]
    try:
        for place in places:
            place.chmod(0o555)
        settings = replace(PRESETS["mnist"], method="biased", epochs=1, batch_size=16)
        assert Execution(archives)(vars(settings), 0).metrics
    finally:
        for place in places:
            place.chmod(0o755)


def test_every_table_is_rehearsed_or_says_why_not():
    import tomllib

    plan = tomllib.loads((PROJECT / "rehearsal.toml").read_text())
    assert not plan.get("impossible") and any("paper" in table.scales for table in tables())


def test_the_verbs_from_the_command_line(tmp_path):
    def rebias(*words):
        return subprocess.run([sys.executable, "-m", "rebias", *words], capture_output=True, text=True)

    root = tmp_path / "root"
    tiny.write_images(root / "imagenet-a", ["n02085620"], per_class=2)
    truncated(root / "imagenet-a" / "n02085620" / "ILSVRC_5.JPEG")
    done = rebias("data", "verify", "--data-root", str(root))
    assert done.returncode == 1 and "1 broken files, first" in done.stderr and "ILSVRC_5.JPEG" in done.stderr
    assert "Traceback" not in done.stderr and "imagenet-a: 3 files, 1 broken" in done.stdout
    done = rebias("data", "verify", "--data-root", str(tmp_path / "elsewhere"))
    assert done.returncode == 2 and "elsewhere: none of the data sets is here" in done.stderr
