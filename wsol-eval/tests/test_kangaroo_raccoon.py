"""Photographs from two clones, the pretrained network from a package, and their table from end to end."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch

from shared_utils.images import read_image
from wsol_eval import Metadata, WSOLDataset, experiments, kangaroo_raccoon
from wsol_eval.build import build_metadata
from wsol_eval.data import CROP, to_input
from wsol_eval.kangaroo_raccoon import CLONES, split_metadata
from wsol_eval.models import build_model, efficientnet
from wsol_eval.protocol import draw
from wsol_eval.recipe import OnData
from wsol_eval.sources import needs_of, source_of
from wsol_eval.tiny import write

KANGAROO, RACCOON = CLONES
PHOTOGRAPHS = {"chelsea.png": 285, "coffee.png": 967}  # ImageNet's classes Egyptian cat and espresso


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    write(root)
    return root


@pytest.fixture
def clones(tiny, tmp_path):
    for clone in CLONES:
        shutil.copytree(tiny / clone.folder, tmp_path / clone.folder)
    return tmp_path


def test_each_class_is_split_once_into_disjoint_parts(tiny):
    parts = split_metadata(tiny)
    counts = {split: np.bincount(list(part.class_labels.values())).tolist() for split, part in parts.items()}
    assert counts == {"train": [8, 8], "val": [2, 2], "test": [6, 7]}  # the kangaroo that is cut off is left out
    ids = [name for part in parts.values() for name in part.image_ids]
    assert len(ids) == len(set(ids)) == 33 and "kangaroo/images/00017.jpg" not in ids
    assert [len(chosen) for _, chosen in kangaroo_raccoon._parts(163)] == [81, 20, 62]
    first = {split: chosen[:3] for split, chosen in kangaroo_raccoon._parts(200)}
    assert first == {"train": [0, 1, 2], "val": [9, 11, 15], "test": [3, 4, 7]}


def test_boxes_fit_the_photographs(tiny):
    """Each kind of JPEG, turned ones too: the box, and the second one where there is one, lies on the bright square."""
    parts, several = split_metadata(tiny), 0
    for split, part in parts.items():
        dataset = WSOLDataset(tiny, part, split)
        for place, name in enumerate(part.image_ids):
            boxes = part.boxes_at(name, CROP)
            x0, y0, x1, y1 = boxes[0]
            pixels = dataset.load(place, CROP).astype(int)
            inside, outside = pixels[y0 + 8 : y1 - 7, x0 + 8 : x1 - 7].max(-1), pixels[y1 + 8 :].max(-1)
            assert inside.min() > outside.max(), name
            several += len(boxes) > 1
    assert several == 17
    assert source_of(OnData("kangaroo-raccoon", tiny), "val").num_classes == 2


def test_an_xml_belongs_to_the_image_of_its_name(clones):
    part = build_metadata(clones / "raccoon_dataset", clones / "raccoon_dataset" / "annotations")[""]
    assert len(part.boxes) == 17  # without suffix, and an older copy's name, among them
    (clones / "raccoon_dataset" / "images" / "raccoon-4.jpg").unlink()
    with pytest.raises(ValueError, match=r"raccoon-4\.xml: expected one image named 'older copy\.jpg', found 0"):
        split_metadata(clones)


def test_an_image_without_xml_and_an_xml_of_another_size_are_named(clones):
    path = clones / "kangaroo" / "annots" / "00002.xml"
    text = path.read_text()
    path.write_text(text.replace("<width>", "<width>9"))
    with pytest.raises(ValueError, match=r"00002\.jpg: its annotation says \(9\d+, \d+\), the image has \(\d+, \d+\)"):
        split_metadata(clones)
    path.unlink()
    with pytest.raises(ValueError, match=r"00002\.jpg: it has no box; expected .*annots/00002\.xml with one"):
        split_metadata(clones)


def test_missing_clones_are_told_in_one_line_with_the_commands(clones):
    on = OnData("kangaroo-raccoon", clones)
    assert all(need.met for need in needs_of(on))
    shutil.rmtree(clones / "raccoon_dataset" / "annotations")
    (need,) = needs_of(on)
    with pytest.raises(FileNotFoundError) as error:
        source_of(on, "val")
    told = str(error.value)
    assert told == f"{need.what}: {need.remedy}" and "\n" not in told and not need.met
    for clone in CLONES:
        assert f"git clone {clone.url} && git -C {clone.folder} checkout {clone.commit}" in told


def test_changed_files_are_told(clones):
    kangaroo_raccoon.checksums.cache_clear()
    before = kangaroo_raccoon.checksums(clones)
    path = clones / "kangaroo" / "annots" / "00003.xml"
    path.write_text(path.read_text() + "\n")
    kangaroo_raccoon.checksums.cache_clear()
    after = kangaroo_raccoon.checksums(clones)
    assert before["kangaroo"] != after["kangaroo"] and before["raccoon_dataset"] == after["raccoon_dataset"]
    assert kangaroo_raccoon.other_files(clones)[1] == "other files of raccoon_dataset than at commit 9393884"


def test_the_packages_weights_name_what_is_in_photographs():
    """The whole file in timm's layers, images normalised as for every network: not one parameter is left over."""
    network = build_model("efficientnet_lite0", "cam", 1000, 7, "imagenet").eval()
    state = torch.load(efficientnet.weights_file(), weights_only=True)
    network.head.fc.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    folder = Path(skimage.__file__).parent / "data"
    images = [np.asarray(read_image(folder / name).resize((CROP, CROP))) for name in PHOTOGRAPHS]
    with torch.no_grad():
        probabilities = network(torch.stack([to_input(image) for image in images]))["logits"].softmax(1)
    assert probabilities.argmax(1).tolist() == list(PHOTOGRAPHS.values())
    assert probabilities.amax(1).min() > 0.7
    pixels = torch.tensor([0.0, 127.0, 255.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    seen = network.low[0](to_input(pixels[0].permute(1, 2, 0).to(torch.uint8).numpy())[None])
    torch.testing.assert_close(seen, (pixels - 127) / 128, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["cam", "acol", "spg", "adl", "fsl"])
def test_the_network_has_maps_of_every_size_and_a_head_per_method(method):
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([0, 1])
    for size in (7, 14, 28) if method == "cam" else (7,):
        network = build_model("efficientnet_lite0", method, 2, size).eval()
        assert network.score_map(images, labels).shape == (2, size, size)
    new = {name.split(".")[0] for name, _ in network.named_parameters() if network.is_new(name)}
    assert new == {"head"}
    with pytest.raises(ValueError, match="feature_map: expected one of 7, 14, 28"):
        build_model("efficientnet_lite0", method, 2, 8)


def test_other_weights_are_refused(tmp_path):
    torch.save(build_model("small", "cam", 2, 8).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not weights of efficientnet_lite0"):
        build_model("efficientnet_lite0", "cam", 2, 7, tmp_path / "x.pth")


def test_fine_tuning_draws_small_rates_and_both_map_sizes():
    drawn = [draw("fine-tuning", "cutmix", 20, trial) for trial in range(60)]
    assert {each["feature_map"] for each in drawn} == {7, 14} and {"cutmix_beta", "cutmix_prob"} < set(drawn[0])
    assert all(1e-4 <= each["lr"] <= 1e-2 for each in drawn)


def test_the_table_runs_from_end_to_end_on_tiny_clones(tiny, monkeypatch, tmp_path):
    """The table's own settings with fewer trials, passes and thresholds; caveats, weights and checksums are told."""
    monkeypatch.setattr(experiments, "runs_folder", lambda project: tmp_path)
    (table,) = [table for table in experiments.tables() if table.id == "table-8-kangaroo-raccoon"]
    scale = "kangaroo-raccoon"
    fewer = {"trials": 1, "epochs": 1, "fsl_epochs": 1, "batch_size": 8, "interval": 0.1}
    for row in table.rows_at(scale):
        settings = table.settings(row, scale) | fewer
        on = replace(OnData(), data_root=tiny, seed=3, workers=0)
        assert all(need.met for need in experiments.needs(settings, on))
        outcome = experiments.execute(settings, on)
        assert set(table.metrics) <= set(outcome.metrics)
        for name in ("max_box_acc_v2", "max_box_acc"):
            assert outcome.metrics[f"{name}_low"] <= outcome.metrics[name] <= outcome.metrics[f"{name}_high"]
        assert outcome.dataset["images"] == {"train": 16, "val": 4, "test": 13}
        assert outcome.dataset["files"].keys() == {"kangaroo", "raccoon_dataset"}
        assert outcome.caveats[0] == "other files of kangaroo than at commit 882bbbd"
        if row.name != "Center baseline":
            assert outcome.weights == {"efficientnet-lite0-57934424.pth": efficientnet.CHECKSUM}
            assert len(outcome.details["values"]) == 1


def test_metadata_may_be_given_as_it_is(tiny):
    part = Metadata(["kangaroo/images/00001.jpg"], {"kangaroo/images/00001.jpg": 1})
    assert WSOLDataset(tiny, part, "test")[0][1] == 1
