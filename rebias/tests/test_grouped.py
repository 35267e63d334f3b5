"""Images with bias labels in their released layouts, from a CSV file, and the report by group."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import rebias
from rebias import ColoredMNIST, bffhq, celeba, csv_set, group_report, waterbirds
from rebias.data.dataset import Reading
from rebias.data.inventory import verify
from rebias.data.tiny import write_files
from rebias.experiments import build_method, train_and_evaluate
from rebias.settings import PRESETS
from rebias.tasks import TASKS
from rebias.train import make_fabric


def test_every_public_name_can_be_imported_and_is_no_module():
    assert {type(getattr(rebias, name)).__name__ for name in rebias.__all__} == {"function", "type", "ABCMeta"} - {
        "ABCMeta"
    }


def test_own_images_from_a_csv_file(tmp_path):
    names = [f"pictures/größe {number}.png" for number in range(6)]
    write_files(tmp_path, names)
    table = pd.DataFrame(
        {"image": names, "label": [0, 1, 2] * 2, "bias": [1, 0] * 3, "split": ["train"] * 4 + ["test"] * 2}
    )
    table.to_csv(tmp_path / "own.csv", index=False)
    data = csv_set(tmp_path / "own.csv", "test", reading=Reading(0))
    assert data.labels.tolist() == [1, 2] and data.bias.tolist() == [1, 0] and len(csv_set(tmp_path / "own.csv")) == 6
    image, label, bias = data[0]
    assert image.shape == (3, 224, 224) and (label, bias) == (1, 1)
    for change, message in (
        (table.drop(columns="bias"), "lacks the columns bias; it has image, label, split"),
        (table.assign(label="cat"), "label must hold 0, 1, 2 .., got 'cat'"),
        (table.assign(split="train"), "has no image path for own test"),
    ):
        change.to_csv(tmp_path / "own.csv", index=False)
        with pytest.raises(ValueError, match=message):
            csv_set(tmp_path / "own.csv", "test")


def test_waterbirds_as_released(tmp_path):
    names = [f"001.Black_footed_Albatross/{number}.jpg" for number in range(4)]
    write_files(tmp_path, names)
    columns = {
        "img_id": range(4),
        "img_filename": names,
        "y": [1, 0, 1, 0],
        "split": [0, 0, 1, 2],
        "place": [0, 0, 1, 1],
    }
    pd.DataFrame(columns).to_csv(tmp_path / "metadata.csv", index=False)
    train, test = (waterbirds(tmp_path, split) for split in ("train", "test"))
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'valid'"):
        waterbirds(tmp_path, "valid")
    assert train.labels.tolist() == [1, 0] and train.bias.tolist() == [0, 0] and test.names == names[3:]


def test_verify_reads_the_grouped_sets_too(tmp_path):
    birds, names = tmp_path / "waterbird_complete95_forest2water2", ["a/0.jpg", "a/1.jpg", "b/2.jpg"]
    write_files(birds, names)
    pd.DataFrame({"img_filename": names, "y": 0, "split": [0, 1, 2], "place": 0}).to_csv(birds / "metadata.csv")
    write_files(tmp_path, ["own.jpg"])
    (tmp_path / "images.csv").write_text("image,label,bias\nown.jpg,0,0\n")
    for path in (birds / "b/2.jpg", tmp_path / "own.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    found = verify(tmp_path, workers=0)
    assert {name: (count, len(broken)) for name, (count, broken) in found.items()} == {
        birds.name: (3, 1), "images.csv": (1, 1),
    }  # fmt: skip


def test_celeba_as_released(tmp_path):
    names = [f"{number:06d}.jpg" for number in range(1, 5)]
    write_files(tmp_path / "img_align_celeba", names)
    rows = ["4", "Blond_Hair Male Smiling "]
    rows += [f"{name} {a:2d} {b:2d}  1" for name, a, b in zip(names, (1, -1, 1, -1), (-1, 1, 1, -1), strict=True)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{name} {int(name[5] > '2')}\n" for name in names))
    train, val = (celeba(tmp_path, split) for split in ("train", "val"))
    assert (train.labels.tolist(), train.bias.tolist()) == ([1, 0], [0, 1])
    assert (val.labels.tolist(), val.bias.tolist(), val.names) == ([1, 0], [1, 0], names[2:])
    assert celeba(tmp_path, "train", bias="Smiling").bias.tolist() == [1, 1]


def test_bffhq_as_released(tmp_path):
    write_files(tmp_path, ["0.5pct/align/0/1_0_0.png", "0.5pct/conflict/1/22_1_0.png", "test/3_0_1.png"])
    train, test = (bffhq(tmp_path, split) for split in ("train", "test"))
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'valid'"):
        bffhq(tmp_path, "valid")
    assert (train.labels.tolist(), train.bias.tolist()) == ([0, 1], [0, 0]) and test.bias.tolist() == [1]
    write_files(tmp_path, ["test/portrait.png"])
    with pytest.raises(ValueError, match="portrait.png: bFFHQ's files are named"):
        bffhq(tmp_path, "test")


def test_colored_mnist_of_lff(tmp_path):
    (tmp_path / "train").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)
    np.save(tmp_path / "train" / "images.npy", images)
    np.save(tmp_path / "train" / "attrs.npy", np.array([[3, 3], [4, 4], [5, 1], [0, 0], [9, 9]], dtype=np.uint8))
    data = ColoredMNIST(tmp_path, "train")
    image, label, bias = data[2]
    assert (label, bias) == (5, 1) and image[:, 7, 9].tolist() == pytest.approx(images[2, 7, 9] / 127.5 - 1)
    (batch, targets), *_ = data.batches([torch.tensor([2, 0])])
    assert torch.equal(batch[0], image) and targets.tolist() == [5, 3]


def test_report_by_group(tmp_path):
    predictions, labels, bias = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2])
    metrics, groups = group_report(predictions, labels, bias)
    assert metrics == {"accuracy": 75, "group_mean_accuracy": pytest.approx(250 / 3), "worst_group_accuracy": 50}
    assert groups == {"group_matrix": [[1, 1, None], [None, None, 0.5]], "group_counts": [[1, 1, 0], [0, 0, 2]]}
    file = tmp_path / "p.csv"
    pd.DataFrame({"prediction": predictions, "label": labels, "bias": bias}).to_csv(file, index=False)
    done = subprocess.run([sys.executable, "-m", "rebias", "eval", str(file)], capture_output=True, text=True)
    assert json.loads(done.stdout)["worst_group_accuracy"] == 50, done.stderr


def test_training_on_a_set_of_one_s_own(tmp_path):
    names = [f"{number}.jpg" for number in range(12)]
    write_files(tmp_path, names)
    columns = {"image": names, "label": [0, 1] * 6, "bias": [0, 0, 1] * 4, "split": ["train"] * 8 + ["test"] * 4}
    pd.DataFrame(columns).to_csv(tmp_path / "images.csv", index=False)
    settings = replace(PRESETS["csv"], epochs=1, batch_size=4, networks="small")
    task = TASKS["csv"](settings, 0, tmp_path, make_fabric("cpu"), Reading(0))
    assert build_method(task).modules["f"].module.fc.out_features == 2
    _, outcome = train_and_evaluate(task, None, watch=True)
    assert {"accuracy", "group_mean_accuracy", "worst_group_accuracy"} == outcome.metrics.keys()
