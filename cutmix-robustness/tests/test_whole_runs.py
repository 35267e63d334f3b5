"""The papers' data sets on small files of the same formats, each through a whole run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_robustness import detection, experiments
from cutmix_robustness.corruptions import corrupt
from cutmix_robustness.data import cifar, corrupted, imagenet, ood, voc
from cutmix_robustness.data.benchmark import open_benchmark
from cutmix_robustness.data.inventory import needs
from cutmix_robustness.experiments import execute
from cutmix_robustness.networks import NETWORKS, SmallNet, resnet_imagenet
from cutmix_robustness.settings import PRESETS, Settings
from cutmix_robustness.tiny import write_cifar, write_jpeg_archive, write_mnist, write_voc
from cutmix_robustness.train import make_fabric
from shared_utils.images import BrokenFile
from shared_utils.preflight import unmet

pytestmark = pytest.mark.usefixtures("here")
ONE_EPOCH = {"epochs": 1, "network": "resnet20", "milestones": (), "eval_every": 0}


def settings_of(preset, **changes):
    return {name: value for name, value in vars(replace(PRESETS[preset], **{**ONE_EPOCH, **changes})).items()}


def write_ood(root, save_picture):
    for folder in ood.FOLDERS.values():
        for number in range(3):
            save_picture(root / "ood" / folder / "test" / f"{number}.png", number, 36, 36)


def test_a_whole_run_on_cifar100(tmp_path, save_picture):
    write_cifar(tmp_path, "cifar100", n_train=200, n_test=100)
    write_ood(tmp_path, save_picture)
    chosen = settings_of("cifar100-cutmix", batch_size=50, severities=(1,), probe_images=20)
    outcome = execute(chosen, 0, data_root=tmp_path)
    sets = [f"{name}_auroc" for name in (*ood.FOLDERS, "uniform", "gaussian")]
    assert {"top1_error", "best_top1_error", "ece20", "corruption_error", "nll", *sets} <= outcome.metrics.keys()
    assert outcome.metrics["ood_auroc"] == pytest.approx(np.mean([outcome.metrics[name] for name in sets]))
    assert outcome.dataset["train"]["shape"] == [200, 3, 32, 32] and outcome.metrics["parameters_millions"] < 0.4
    assert not list((tmp_path / "project" / "runs" / "checkpoints").glob("*"))


def test_cifar10_and_its_recompressed_copy(tmp_path):
    write_cifar(tmp_path, "cifar10", n_train=50, n_test=20)
    train, test, classes = cifar.load("cifar10", tmp_path, "crop-flip", "cpu")
    assert (len(train), len(test), classes) == (50, 20, 10) and train.augment == "crop-flip" != test.augment
    write_jpeg_archive(tmp_path / cifar.JPEG_ARCHIVE, 4)
    write_mnist(tmp_path)
    train, test, _ = cifar.load("cifar10-jpeg", tmp_path, "none", "cpu")
    assert train.name == "CIFAR-10 (JPEG), train" and train.labels.tolist() == [i // 4 for i in range(40)]
    few, again, other = (
        cifar.load("cifar10-jpeg", tmp_path, "crop-flip", "cpu", train_images=20, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert few.labels.tolist() == [i // 2 for i in range(20)] and few.augment == "crop-flip"
    assert torch.equal(few.index, again.index) and not torch.equal(few.index, other.index)
    outcome = execute(settings_of("cifar10-jpeg", batch_size=4, probe_images=4), 0, data_root=tmp_path)
    assert {"mnist_auroc", "uniform_auroc"} <= outcome.metrics.keys() and "isun_auroc" not in outcome.metrics
    assert sum(outcome.dataset["probes"]["class_counts"]) == 4 and outcome.precision == "32-true"


def write_imagenet(root, write_image_folder, classes=("n01", "n02")):
    write_image_folder(root / "imagenet" / "train", classes, 4)
    write_image_folder(root / "imagenet" / "val", classes, 2)
    boxes = root / "imagenet" / "val_boxes"
    boxes.mkdir()
    box = "<object><bndbox><xmin>5</xmin><ymin>4</ymin><xmax>30</xmax><ymax>35</ymax></bndbox></object>"
    for path in (root / "imagenet" / "val").rglob("*.JPEG"):
        size = "<size><width>48</width><height>40</height></size>"
        (boxes / f"{path.stem}.xml").write_text(f"<annotation>{size}{box}{box}</annotation>")


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "resnet50", SmallNet)
    monkeypatch.setitem(NETWORKS, "resnet50-dense", SmallNet)


def test_a_whole_run_on_imagenet(tmp_path, write_image_folder, small_network):
    write_imagenet(tmp_path, write_image_folder)
    changes = {"network": "resnet50", "batch_size": 4, "severities": (5,), "probe_images": 2}
    outcome = execute(settings_of("imagenet-cutmix", **changes), 0, data_root=tmp_path)
    averaged = [outcome.metrics[name] for name in experiments.AVERAGED]
    assert outcome.metrics["average_error"] == pytest.approx(sum(averaged) / 7) and outcome.metrics["mce"] > 0
    weighted = 3 * outcome.metrics["noise_ce"] + 4 * sum(
        outcome.metrics[f"{g}_ce"] for g in ("blur", "weather", "digital")
    )
    assert outcome.metrics["mce"] == pytest.approx(weighted / 15)
    located = execute(
        settings_of(
            "imagenet", network="resnet50-dense", augment="wsol", batch_size=4, suites=("clean", "localization")
        ),
        0,
        data_root=tmp_path,
    )
    assert 0 <= located.metrics["localization_accuracy"] <= located.metrics["gt_known_localization"] <= 100
    (tmp_path / "imagenet" / "val_boxes" / "ILSVRC_1_0.xml").unlink()
    with pytest.raises(FileNotFoundError, match="no annotation for ILSVRC_1_0.JPEG"):
        open_benchmark(Settings(dataset="imagenet", suites=("localization",)), 0, tmp_path)


def test_stored_corruptions_are_read(tmp_path, write_image_folder):
    write_imagenet(tmp_path, write_image_folder)
    _, test = imagenet.load(tmp_path / "imagenet", "imagenet", "cpu")
    for path in test.paths:
        target = tmp_path / "imagenet-c" / "fog" / "3" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((224, 224, 3), 77, np.uint8)).save(target)
    found = corrupted.corrupted_source(test, "fog", 3, "imagenet", tmp_path / "imagenet-c", 0)
    ((_, images, labels),) = found.batches()
    assert (images == 77).all() and torch.equal(labels, test.labels)
    write_cifar(tmp_path, "cifar10", n_train=50, n_test=20)
    _, test, _ = cifar.load("cifar10", tmp_path, "none", "cpu")
    corrupted.write_cifar_c(test, tmp_path / "CIFAR-10-C", ("fog", "contrast"))
    stored = np.load(tmp_path / "CIFAR-10-C" / "fog.npy")
    assert stored.shape == (100, 32, 32, 3) and stored.dtype == np.uint8
    assert np.load(tmp_path / "CIFAR-10-C" / "labels.npy").tolist() == 5 * test.labels.tolist()
    for severity in (1, 4):
        read, made = (
            next(corrupted.corrupted_source(test, "fog", severity, "cifar", folder, 0).batches())[1]
            for folder in (tmp_path / "CIFAR-10-C", tmp_path / "nowhere")
        )
        assert torch.equal(read, made)
    some = test.select(torch.tensor([3, 8, 19]))
    part = corrupted.corrupted_source(some, "contrast", 2, "cifar", tmp_path / "CIFAR-10-C", 0)
    assert torch.equal(next(part.batches())[1], corrupt(some.images, "contrast", 2, "cifar"))
    with pytest.raises(FileNotFoundError, match="snow.npy: missing"):
        corrupted.corrupted_source(test, "snow", 1, "cifar", tmp_path / "CIFAR-10-C", 0)
    np.save(tmp_path / "CIFAR-10-C" / "snow.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"snow.npy: expected \(5 n, 32, 32, 3\) uint8"):
        corrupted.corrupted_source(test, "snow", 1, "cifar", tmp_path / "CIFAR-10-C", 0)


def test_a_whole_run_on_cub(tmp_path, save_picture, small_network):
    root = tmp_path / "CUB_200_2011"
    names = [f"{number:03d}.Bird/{i}.jpg" for number in (1, 2) for i in range(4)]
    for number, name in enumerate(names):
        save_picture(root / "images" / name, number, 100, 80)
    lines = {
        "images": names,
        "image_class_labels": [name[2] for name in names],
        "train_test_split": ["1" if "0.jpg" not in name else "0" for name in names],
        "bounding_boxes": ["10.0 20.0 40.0 50.0"] * len(names),
    }
    for file, content in lines.items():
        (root / f"{file}.txt").write_text("".join(f"{i + 1} {line}\n" for i, line in enumerate(content)))
    train, test, boxes = imagenet.load_cub(root, "wsol", "cpu")
    assert (len(train), len(test)) == (6, 2) and test.labels.tolist() == [0, 1]
    expected = np.array([[10 * 256 / 80, 20 * 2.56, 50 * 256 / 80, 70 * 2.56]]) - 16
    np.testing.assert_allclose(boxes[0], expected)
    chosen = settings_of("cifar100", dataset="cub", network="resnet50-dense", augment="wsol", batch_size=3, lr=0.001,
                         head_lr=0.01, suites=("clean", "localization"))  # fmt: skip
    assert "gt_known_localization" in execute(chosen, 0, data_root=tmp_path).metrics


@pytest.mark.parametrize("augment", ["wsol", "imagenet", "none"])
@pytest.mark.parametrize("width, height", [(400, 300), (300, 401)])
def test_boxes_lie_where_the_transform_puts_their_pixels(tmp_path, augment, width, height):
    root = tmp_path / "CUB_200_2011"
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[40:240, 60:270] = 255
    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(root / "images" / name)
    lines = {"images": ["a.png", "b.png"], "image_class_labels": ["1", "1"], "train_test_split": ["1", "0"]}
    for file, content in (lines | {"bounding_boxes": ["60.0 40.0 210.0 200.0"] * 2}).items():
        (root / f"{file}.txt").write_text("".join(f"{i + 1} {line}\n" for i, line in enumerate(content)))
    _, test, boxes = imagenet.load_cub(root, augment, "cpu")
    ((_, images, _),) = test.batches(0, 1)
    rows, columns = (images[0, 0] > 127).nonzero().T.numpy()
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(boxes[0][0], found, atol=1)


def test_a_run_of_broken_files_ends_or_says_what_it_skipped(tmp_path, write_image_folder, small_network):
    for part in ("train", "test"):
        write_image_folder(tmp_path / part, ["cat", "dog"], 4)
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / part / "cat" / ".DS_Store").write_bytes(b"Bud1")
    cut = tmp_path / "train" / "dog" / "ILSVRC_1_0.JPEG"
    cut.write_bytes(cut.read_bytes()[:700])
    chosen = settings_of("image-folder", network="resnet50", batch_size=4, suites=("clean",))
    with pytest.raises(BrokenFile, match="ILSVRC_1_0.JPEG: .*truncated"):
        execute(chosen, 0, data_root=tmp_path)
    outcome = execute(chosen, 0, data_root=tmp_path, reading=experiments.Reading(0, True))
    assert outcome.caveats == ("1 files of image folder, train skipped",)
    assert outcome.dataset["train"]["class_counts"] == [4, 3]


def test_everything_a_run_needs_is_asked_for_before_it_starts(tmp_path, save_picture):
    write_cifar(tmp_path, "cifar100", 200, 100)
    write_ood(tmp_path, save_picture)
    chosen = settings_of("cifar100-cutmix", initial_weights="weights/x.pt")
    assert unmet(needs(Settings(**chosen), tmp_path))[0].startswith("weights to start from")
    chosen["initial_weights"] = ""
    assert not unmet(needs(Settings(**chosen), tmp_path))
    for path in (tmp_path / "ood" / "iSUN").rglob("*.png"):
        path.unlink()  # the folder stays, empty
    (tmp_path / "CIFAR-100-C").mkdir()
    (tmp_path / "CIFAR-100-C" / "fog.npy").write_bytes(b"")
    missing = unmet(needs(Settings(**chosen), tmp_path))
    assert len(missing) == 15 and missing[0].startswith("out-of-distribution set isun") and "snow.npy" in str(missing)
    (line,) = unmet(needs(Settings(task="captioning"), tmp_path))
    assert "captioning" in line
    lines = unmet(needs(Settings(outliers="svhn", dataset="imagenet", suites=("localization",)), tmp_path))
    assert [word in line for word, line in zip(("train", "val", "SVHN", "boxes"), lines, strict=True)] == [True] * 4


def test_an_image_folder_of_one_s_own(tmp_path, write_image_folder, save_picture, small_network):
    for part in ("train", "test"):
        write_image_folder(tmp_path / part, ["cat", "dog", "owl"], 2)
    outcome = execute(settings_of("image-folder", network="resnet50", batch_size=4), 0, data_root=tmp_path)
    assert {"top1_error", "ece", "fgsm_accuracy", "pgd_accuracy"} <= outcome.metrics.keys()
    assert "top5_error" not in outcome.metrics
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match="emu: a class without images"):
        open_benchmark(Settings(dataset="image-folder", suites=("clean",)), 0, tmp_path)
    save_picture(tmp_path / "test" / "emu" / "deeper" / "e.png")
    with pytest.raises(ValueError, match="train and test have different class folders"):
        open_benchmark(Settings(dataset="image-folder", suites=("clean",)), 0, tmp_path)


def test_outliers_need_a_training_set_in_memory(tmp_path, write_image_folder, small_network):
    for part in ("train", "test"):
        write_image_folder(tmp_path / part, ["cat", "dog", "owl"], 2)
    settings = settings_of("image-folder", network="resnet50", batch_size=4, outliers="uniform")
    with pytest.raises(ValueError, match="outliers need a training set that fits in memory, got image folder, train"):
        execute(settings, 0, data_root=tmp_path)


def normalised_resnet():
    """Fresh weights with batch norm statistics that fit them: the detectors keep these."""
    torch.manual_seed(0)
    network = resnet_imagenet()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))
    return network


@pytest.mark.parametrize("detector", ["faster-rcnn", "ssd"])
def test_a_whole_run_of_detection(tmp_path, monkeypatch, detector):
    write_voc(tmp_path / "VOCdevkit")
    (tmp_path / "weights").mkdir()
    content = {"run": {"settings": {}}, "network": normalised_resnet().state_dict()}
    torch.save(content, tmp_path / "weights" / "r.pt")
    build = detection.build_detector
    few = {
        "rpn_post_nms_top_n_train": 20,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 16,
    }
    monkeypatch.setattr(detection, "build_detector", lambda kind, resnet, side: build(kind, resnet, side, **few))
    chosen = {"task": "detection", "network": "resnet50", "detector": detector, "steps": 3, "batch_size": 2, "lr": 1e-5,
              "detector_side": 64,
              "milestones": (2,), "initial_weights": "weights/r.pt"}  # fmt: skip
    data = voc.VocImages(tmp_path, voc.TRAIN, detector, 0)
    assert len(data) == 8 and data[0][1]["labels"].tolist() in ([12], [])  # difficult objects are left out
    test = voc.VocImages(tmp_path, voc.TEST)
    assert test[0][1]["difficult"].tolist() == [False, True] and test[0][1]["boxes"].tolist()[0] == [8, 5, 50, 40]
    outcome = execute(chosen, 0, data_root=tmp_path)
    assert 0 <= outcome.metrics["voc07_map"] <= 100


def test_a_stopped_detection_run_goes_on_from_its_step(tmp_path):
    write_voc(tmp_path / "VOCdevkit")
    data = voc.VocImages(tmp_path, voc.TRAIN, "ssd", 0)

    def train(path, stop=None):
        detector = detection.build_detector("ssd", normalised_resnet())
        settings = Settings(task="detection", steps=3, batch_size=2, lr=1e-5)
        seen = []
        real = torch.save

        def save(content, target):
            if content["step"] == stop:
                raise KeyboardInterrupt
            seen.append(content["step"])
            real(content, target)

        detection.torch.save = save
        try:
            detection.fit_detector(detector, settings, data, 0, make_fabric("cpu"), path, every=1)
        except KeyboardInterrupt:
            pass
        finally:
            detection.torch.save = real
        return seen

    assert train(tmp_path / "c.pt", stop=3) == [1, 2] and train(tmp_path / "c.pt") == [3]
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 3


def test_localization_on_digits_without_a_download(tmp_path):
    chosen = settings_of("twowave", dataset="digits", epochs=1, milestones=(), suites=("clean", "localization"))
    metrics = execute(chosen, 0, data_root=tmp_path).metrics
    assert 0 <= metrics["localization_accuracy"] <= metrics["gt_known_localization"] < 100
    with pytest.raises(ValueError, match="suite ood needs out-of-distribution inputs, digits has none"):
        Settings(**chosen | {"suites": ("ood",)})
