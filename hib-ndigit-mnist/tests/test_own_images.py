"""A user's own images end to end: scikit-learn's digits as PNG files, trained on, embedded and scored."""

import json
import shutil
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize

from hib_ndigit_mnist import BackboneTraining, HedgedModel, ImageFiles, embed_images, train_on
from hib_ndigit_mnist.backbones import build_backbone
from hib_ndigit_mnist.cli import main
from hib_ndigit_mnist.data import read_digits
from hib_ndigit_mnist.photos import Drawn, SeededBatches, read_item, training_transform
from hib_ndigit_mnist.tiny import write_tiny

SMALL = ["--backbone", "timm:test_resnet", "--no-pretrained", "--image-size", 32, "--device", "cpu", "--workers", 0]
ON_CPU = ["--device", "cpu", "--workers", 0]


def hib(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of a verb."""
    monkeypatch.setattr(sys, "argv", ["hib", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
        sys.exit(0)
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders train and test of the digits 0 .. 4, and others: 5 .. 9 without classes."""
    root, digits = tmp_path_factory.mktemp("own, ü"), read_digits()
    for name, images, labels in (("train", *digits[:2]), ("test", *digits[2:])):
        for i, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            place = root / name / f"digit {label}" if label < 5 else root / f"others-{name}"
            if i < 400:
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).resize((32, 32)).save(place / f"{i:04d}.png")
    return root


@pytest.fixture(scope="module")
def model(folders):
    options = {
        "--steps": 60,
        "--batch": 32,
        "--lr": 3e-3,
        "--dim": 4,
        "--augment": "none",
        "--output": folders / "m.pt",
    }
    words = ["train", folders / "train", *SMALL, *(word for pair in options.items() for word in pair)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hib", *map(str, words)])
        main()
    return folders / "m.pt"


def test_it_learns_what_the_folders_say(folders, model, monkeypatch, capsys):
    assert not model.with_name("m.pt.checkpoint").exists()
    outside = ["--outside", folders / "others-test"]
    code, out, _ = hib(monkeypatch, capsys, "eval", model, folders / "test", *outside, *ON_CPU)
    scores = json.loads(out)
    assert code == 0 and {"r1", "r_auroc", "rejection_area", "ood_auroc", "uncertainty"} <= scores.keys()
    assert scores["r1"] > 0.8 and scores["rejection_area"] > scores["r1"] and scores["skipped"] == 0
    assert scores["ood_auroc"] > 0.6
    code, _, _ = hib(monkeypatch, capsys, "embed", model, folders / "test", "--output", folders / "e.npz", *ON_CPU)
    with np.load(folders / "e.npz") as arrays:
        found = dict(arrays)
        assert found["mu"].shape == found["logvar"].shape == (int(scores["images"]), 1, 4)
        assert found["eta"].mean() == pytest.approx(scores["uncertainty"], abs=1e-5)
        assert found["files"][0].startswith("digit 0")
    half = ["--precision", "bf16-mixed", "--output", folders / "h.npz", *ON_CPU]
    assert hib(monkeypatch, capsys, "embed", model, folders / "test" / "digit 0", *half)[0] == 0
    rounded = np.load(folders / "h.npz")["mu"]
    gap = np.abs(rounded - found["mu"][: len(rounded)])
    assert 0 < gap.max() < 0.1 * np.abs(found["mu"]).max()


def test_a_table_gives_the_images_of_its_folders(folders, tmp_path):
    write_tiny(tmp_path)
    table, folder = ImageFiles.of(tmp_path / "photos.csv"), ImageFiles.of(tmp_path / "photos")
    assert sorted(map(str, table.files)) == sorted(map(str, folder.files)) and table.classes == folder.classes
    assert dict(zip(table.files, table.labels.tolist(), strict=True)) == dict(
        zip(folder.files, folder.labels.tolist(), strict=True)
    )
    kept = folder.with_partners()
    assert len(kept) == len(folder) - 1 and 3 not in kept.labels  # the class of a single image
    x, _ = Drawn(kept, kept.labels, training_transform(24, "crop-flip"))[0, 7]
    assert x.shape == (3, 24, 24) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


def test_a_step_depends_on_seed_and_number_alone(folders):
    labels = ImageFiles.of(folders / "train").labels
    two = list(SeededBatches(torch.tensor([0, 0, 1, 1]), 4, 0, 0, 30))  # half of the draws are of one class
    assert all(len({index // 2 for index, _ in batch}) == 2 for batch in two)
    with pytest.raises(ValueError, match="two classes"):
        SeededBatches(torch.zeros(4), 4, 0, 0, 1)
    whole, rest = (list(SeededBatches(labels, 8, 3, start, 6)) for start in (0, 4))
    assert whole[4:] == rest and whole[0] != whole[1]
    images = torch.tensor([[index for index, _ in batch] for batch in whole])
    assert (labels[images[:, :4]] == labels[images[:, 4:]]).all() and (images[:, :4] != images[:, 4:]).all()
    drawn = Drawn(ImageFiles.of(folders / "train"), labels, training_transform(16, "crop"))
    torch.manual_seed(0)
    first = drawn[whole[0][0]][0]
    torch.manual_seed(1)
    assert torch.equal(first, drawn[whole[0][0]][0]) and not torch.equal(first, drawn[whole[0][0][0], 1][0])


class Tensors(torch.utils.data.Dataset):
    """A user's own Dataset: grey uint8 tensors; interrupts itself at one image, once."""

    def __init__(self, stop=None):
        self.images, self.labels = (part[:120] for part in read_digits()[:2])
        self.seen, self.stop = 0, stop

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.seen += 1
        if self.seen == self.stop:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return self.images[index][None], int(self.labels[index])


@pytest.mark.parametrize("method", ["mog", "mc-dropout"])
def test_an_interrupted_run_of_ones_own_dataset_ends_as_a_whole_one(method, tmp_path):
    settings = BackboneTraining("timm:test_resnet", 32, method, steps=4, batch=4, dim=2, samples=2)
    labels = Tensors().labels.long()
    whole = train_on(Tensors(), labels, settings, 1, pretrained=False, device="cpu")
    checkpoint = tmp_path / "c.pt"
    options = {"pretrained": False, "device": "cpu", "checkpoint": checkpoint}
    with pytest.raises(KeyboardInterrupt):
        train_on(Tensors(stop=10), labels, settings, 1, **options)
    rates = [group["lr"] for group in torch.load(checkpoint, weights_only=True)["optimizer"]["param_groups"]]
    assert 0 < rates[0] < settings.lr and rates[1] == pytest.approx(settings.match_lr * rates[0])
    with pytest.raises(ValueError, match="another run"):
        train_on(Tensors(), labels, settings, 2, **options)
    resumed = train_on(Tensors(), labels, settings, 1, **options)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    e = embed_images(whole, Tensors(), device="cpu")
    whole.save(tmp_path / "m.pt")
    again = embed_images(HedgedModel.load(tmp_path / "m.pt"), Tensors(), device="cpu")
    assert torch.equal(e.mu, again.mu) and torch.equal(e.logvar, again.logvar)


def test_what_a_dataset_may_give():
    grey = np.random.default_rng(0).integers(0, 255, (9, 12, 1), np.uint8)
    palette = Image.fromarray(grey[..., 0]).convert("P")
    palette.putpalette([value for level in range(256) for value in (255 - level, 0, 0)])
    expected = torch.from_numpy(grey).permute(2, 0, 1)
    assert torch.equal(read_item([(expected, 0)], 0)[0], expected)
    assert torch.equal(read_item([(grey, 0)], 0)[0], expected)
    assert torch.equal(read_item([(Image.fromarray(grey[..., 0]), 0)], 0)[0], expected.expand(3, 9, 12))
    assert torch.equal(read_item([(palette, 0)], 0)[0][0], 255 - expected[0])  # colours, not their numbers
    image = torch.rand(3, 9, 12)
    for item, message in (
        (image, r"data\[0\]: expected \(image, label\), got Tensor of 3"),
        ({"image": image, "label": 0, "name": ""}, "got dict of 3"),
        ((image * 4 - 2, 0), r"values in \[0, 1\] or uint8, .*normalises them itself"),
        ((image * float("nan"), 0), "got nan to nan"),
        ((image.numpy(), 0), r"array \(H, W, C\), got the shape \(3, 9, 12\)"),
        ((torch.rand(4, 9, 12), 0), "expected 1 or 3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            read_item([item], 0)
    data, settings = [(image, label) for label in (0, 0, 1, 1)], BackboneTraining("timm:test_resnet", steps=1, batch=4)
    for labels, message in (
        ([0, 0, 1], r"expected \(4,\) integers, one per image, got \(3,\) torch.int64"),
        ([0.0, 0.0, 1.0, 1.0], "torch.float32"),
        (list("aabb"), "labels: expected integers"),
        ([1, 1, 0, 0], "expected the label ., got"),
    ):
        with pytest.raises(ValueError, match=message):
            train_on(data, labels, settings, pretrained=False, device="cpu")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on, under pytest only
def test_mistakes_and_broken_files(folders, model, tmp_path, monkeypatch, capsys, caplog):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((40, 40), 80 * i, np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / "b" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    train = ["train", tmp_path / "set", *SMALL, "--steps", 2, "--batch", 4, "--output", tmp_path / "m.pt"]
    (tmp_path / "set.csv").write_text("image,label\nset/a/none.png,a\n")
    (tmp_path / "names.csv").write_text("file,class\nx,y\n")
    for words, code, message in (
        ([*train, "--batch", 64], 1, "cut.jpg: this is not an image"),
        ([*train, "--workers", 1, "--batch", 64], 1, "cut.jpg: this is not an image"),
        (["train", tmp_path / "none", *SMALL], 2, "none: no such image or folder"),
        (["train", tmp_path / "set.csv", *SMALL], 2, "set/a/none.png does not exist"),
        (["train", tmp_path / "names.csv", *SMALL], 2, "expected the columns image and label, got file, class"),
        (["train", tmp_path / "set" / "a", *SMALL], 2, "expected a folder per class, but 0.png is in none"),
        ([*train, "--backbone", "timm:nonesuch"], 2, "backbone: timm has no model 'nonesuch'"),
        ([*train, "--backbone", "torchvision:squeezenet1_1"], 2, "no linear classifier"),
        ([*train, "--backbone", "resnet18"], 2, "expected timm:NAME or torchvision:NAME"),
        ([*train, "--samples", 3, "--components", 2], 2, "a multiple of components"),
        (["eval", model, folders / "others-test", *ON_CPU], 2, "expected a folder per class"),
        (["eval", model], 2, "a model of your own images: use eval or embed, with a folder"),
        (
            ["embed", model, tmp_path / "set" / "a", "--output", tmp_path / "set"],
            2,
            "set: expected a file to write",
        ),
        ([*train, "--output", tmp_path / "set"], 2, "set: expected a file to write"),
        ([*train, "--lr", -1], 2, "expected lr > 0, lr_final >= 0, match_lr > 0, got -1.0"),
        ([*train, "--beta", -1], 2, "expected beta >= 0, dropout in (0, 1), dim >= 1"),
        ([*train, "--skip-broken", "--lr", 1e30], 1, " after 2 steps; try a smaller lr"),
    ):
        found, _, shown = hib(monkeypatch, capsys, *words)
        told = [line for line in shown.splitlines() if line.startswith("hib-ndigit-mnist: ")]
        assert found == code and len(told) == 1 and message in told[0], (words, shown)
        assert "Traceback" not in shown
    code, _, _ = hib(monkeypatch, capsys, *train, "--skip-broken")
    assert code == 0 and "skipped: " in caplog.text and "6 images of 2 classes" in caplog.text
    code, out, _ = hib(monkeypatch, capsys, "eval", tmp_path / "m.pt", tmp_path / "set", "--skip-broken", *ON_CPU)
    assert code == 0 and json.loads(out)["skipped"] == 1 and json.loads(out)["images"] == 6


def test_a_single_class_is_no_test(folders, model, tmp_path, monkeypatch, capsys):
    """As for a folder one level too high: every nearest neighbour would be right."""
    shutil.copytree(folders / "test" / "digit 0", tmp_path / "high" / "test")
    code, _, told = hib(monkeypatch, capsys, "eval", model, tmp_path / "high", *ON_CPU)
    assert code == 2 and "high: expected at least two classes, found only 'test'" in told


def test_figures_that_are_not_defined_are_null(folders, model, tmp_path, monkeypatch, capsys):
    for label, name in enumerate(("0000", "0001", "0002")):
        (tmp_path / str(label)).mkdir()
        image = next((folders / "test" / f"digit {label}").glob("*.png"))
        for twin in range(2):  # twins: every nearest neighbour is right
            (tmp_path / str(label) / f"{name}-{twin}.png").write_bytes(image.read_bytes())
    code, out, _ = hib(monkeypatch, capsys, "eval", model, tmp_path, *ON_CPU)
    scores = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert code == 0 and scores["r1"] == 1 and scores["r_auroc"] is None and out.count('"images": 6,') == 1


def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    with pytest.raises(RuntimeError, match=r"weights of torchvision:resnet18 could not .*no route.*--no-pretrained"):
        build_backbone("torchvision:resnet18", True)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:test_vit"])
def test_backbones_without_their_classifier(name):
    model = HedgedModel(BackboneTraining(name, 160 if "vit" in name else 32, dim=3, components=2, samples=2)).eval()
    size = model.settings.image_size
    x = torch.rand(2, 3, size, size)
    assert model(x).mu.shape == (2, 2, 3)
    if "torchvision" in name:  # ImageNet's mean and deviation
        known = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        torch.testing.assert_close(model(x).mu, model.head(model.backbone(known)).mu)
    assert not any(p.shape[:1] == (1000,) for p in build_backbone(name, False)[0].parameters())
