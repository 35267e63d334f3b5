"""Small archives in the layout of the real ones: they show what a data root looks like, and the rehearsal runs on them.

Images are smooth noise and their labels mean nothing. The quirks are those of the real archives: grey, CMYK and
turned JPEGs, a PNG named .JPEG, classes with few images, hidden files, images of other sizes.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from cutmix_robustness.corruptions import CORRUPTIONS
from cutmix_robustness.data.cifar import BATCHES, JPEG_ARCHIVE, MEAN, STD
from cutmix_robustness.data.ood import FOLDERS
from cutmix_robustness.networks import NETWORKS, Classifier

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CUB_CLASSES = {"001.Black_footed_Albatross": 5, "058.Pigeon_Guillemot": 3, "200.Common_Yellowthroat": 4}
WNIDS = ("n01440764", "n01443537", "n15075141")
OOD_PLACES = {"Imagenet": "test", "LSUN": "test", "iSUN": "iSUN_patches"}  # the others repeat their own name
BACKBONES = ("baseline", "mixup", "cutout", "cutmix")


def write_all(root: Path) -> None:
    """Every data set that a run can read, about 60 MB. ValueError for a folder that is not empty."""
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty; name a new folder")
    rng = np.random.default_rng(0)
    write_cifar(root, "cifar10", 100, 50)
    write_cifar(root, "cifar100", 200, 100)
    write_jpeg_archive(root / JPEG_ARCHIVE, 4)
    write_cifar_c(root / "CIFAR-100-C", 100)
    write_mnist(root)
    for folder in FOLDERS.values():
        for number in range(3):
            save(root / "ood" / folder / OOD_PLACES.get(folder, folder) / f"{number}.jpg", _picture(rng, 36, 36))
    savemat(root / "train_32x32.mat", {"X": _noise(rng, 80, 32).transpose(1, 2, 3, 0), "y": np.ones((80, 1), np.uint8)})
    for number in range(80):
        save(root / "gan-samples" / f"fake {number:03}.png", _picture(rng, 32, 32))
    write_imagenet(root / "imagenet")
    write_cub(root / "CUB_200_2011")
    write_voc(root / "VOCdevkit")
    write_weights(root / "weights")


def _noise(rng: np.random.Generator, n: int, side: int) -> np.ndarray:
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def _picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(_noise(rng, 1, 8)[0]).resize((width, height))


def save(path: Path, image: Image.Image, kind: str | None = None) -> None:
    """Write an image; with `kind` in a format that differs from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind)


def write_cifar(root: Path, name: str, n_train: int, n_test: int) -> None:
    """The pickled batches of CIFAR-10 or CIFAR-100."""
    folder, parts = BATCHES[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    rng, classes = np.random.default_rng(1), 100 if name == "cifar100" else 10
    for part, files in parts.items():
        for file in files:
            n = (n_train if part == "train" else n_test) // len(files)
            labels = [number % classes for number in range(n)]
            content = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": labels, "fine_labels": labels}
            (root / folder / file).write_bytes(pickle.dumps(content))


def write_jpeg_archive(path: Path, per_class: int, classes: tuple[str, ...] = CIFAR10_CLASSES, side: int = 32) -> None:
    """A zip of train/<class>/*.jpg and test/<class>/*.jpg, with what zipping on a Mac adds."""
    rng = np.random.default_rng(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/train/._airplane", b"\0")
        for part in ("train", "test"):
            for name in classes:
                for number in range(per_class):
                    buffer = io.BytesIO()
                    _picture(rng, side, side).convert("L" if number == 1 else "RGB").save(buffer, "JPEG")
                    archive.writestr(f"{part}/{name}/{number:04d}.jpg", buffer.getvalue())


def write_cifar_c(folder: Path, n: int) -> None:
    """<corruption>.npy and labels.npy, five severities of n images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    np.save(folder / "labels.npy", np.tile(np.arange(n, dtype=np.uint8) % 100, 5))
    for name in CORRUPTIONS:
        np.save(folder / f"{name}.npy", _noise(rng, 5 * n, 32))


def write_mnist(root: Path) -> None:
    """The test set's two files, unpacked."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    digits = np.random.default_rng(4).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = np.array([0x803, *digits.shape], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        labels = np.arange(len(digits), dtype=np.uint8) % 10
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(labels)], ">i4").tobytes() + labels.tobytes()
        )


def write_imagenet(root: Path) -> None:
    """train/<wnid>/, val/<wnid>/ and val_boxes/, and ImageNet-C next to it; real names, odd encodings, hidden files."""
    rng = np.random.default_rng(5)
    val: list = []
    for wnid in WNIDS:
        for number in range(6):
            picture, path = _picture(rng, 90, 120), root / "train" / wnid / f"{wnid}_{number}.JPEG"
            if number == 1:
                picture = picture.convert("L")
            elif number == 2:
                picture = picture.convert("CMYK")
            save(path, picture, "PNG" if number == 3 else "JPEG")
        turned = Image.Exif()
        turned[0x0112] = 6
        _picture(rng, 90, 120).save(root / "train" / wnid / f"{wnid}_9.JPEG", exif=turned)
        for _ in range(2):
            val.append(root / "val" / wnid / f"ILSVRC2012_val_{len(val) + 1:08d}.JPEG")
            save(val[-1], _picture(rng, 90, 120))
    (root / "train" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "train" / WNIDS[0] / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "val_boxes").mkdir()
    for path in val:
        size = "<size><width>120</width><height>90</height><depth>3</depth></size>"
        box = "<bndbox><xmin>20</xmin><ymin>10</ymin><xmax>90</xmax><ymax>80</ymax></bndbox>"
        annotation = f"<annotation>{size}<object><name>{path.parent.name}</name>{box}</object></annotation>"
        (root / "val_boxes" / f"{path.stem}.xml").write_text(annotation)
        for name in CORRUPTIONS:
            for severity in range(1, 6):
                place = root.parent / "imagenet-c" / name / str(severity) / path.parent.name / path.name
                save(place, _picture(rng, 224, 224))


def write_cub(root: Path) -> None:
    """images/ and the four text files; one class with three images, as class 58 has in the real index."""
    rng = np.random.default_rng(6)
    names = [f"{name}/{name[4:]}_{i:04d}_{796100 + i}.jpg" for name, n in CUB_CLASSES.items() for i in range(n)]
    for name in names:
        save(root / "images" / name, _picture(rng, 60, 80))
    lines = {
        "images": names,
        "image_class_labels": [str(int(name[:3])) for name in names],
        "train_test_split": [str(int("_0000_" not in name)) for name in names],
        "bounding_boxes": ["10.0 8.0 50.0 40.0"] * len(names),
        "classes": list(CUB_CLASSES),
    }
    for file, content in lines.items():
        (root / f"{file}.txt").write_text("".join(f"{number} {line}\n" for number, line in enumerate(content, 1)))


def write_voc(root: Path) -> None:
    """VOC2007 and VOC2012 with a difficult object in every image."""
    rng = np.random.default_rng(7)
    for year, parts in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        base = root / f"VOC{year}"
        (base / "ImageSets" / "Main").mkdir(parents=True)
        (base / "Annotations").mkdir()
        for first, part in enumerate(parts):
            names = [f"{100 * first + number:06d}" if year == "2007" else f"2012_{number:06d}" for number in range(4)]
            (base / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                save(base / "JPEGImages" / f"{name}.jpg", _picture(rng, 60, 80))
                corners = "<bndbox><xmin>8</xmin><ymin>5</ymin><xmax>50</xmax><ymax>40</ymax></bndbox>"
                objects = "".join(
                    f"<object><name>{kind}</name><difficult>{hard}</difficult>{corners}</object>"
                    for kind, hard in (("dog", 0), ("cat", 1))
                )
                (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")


def write_weights(folder: Path) -> None:
    """Checkpoints as `train` writes them: the smallest network for localization, the smallest ResNet for detection."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    files = {"small": ["vgg-gap-imagenet", "resnet50-imagenet"], "resnet14": [f"resnet50-{name}" for name in BACKBONES]}
    for network, names in files.items():
        model = Classifier(NETWORKS[network](num_classes=1000), MEAN, STD)
        with torch.no_grad():  # batch norm statistics that fit the weights: detectors keep these
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None
            model.train()(torch.rand(4, 3, 64, 64))
        content = {"run": {"settings": {"network": network}, "seed": 0}, "network": model.network.state_dict()}
        torch.save(content, folder / f"{names[0]}.pt")
        for name in names[1:]:
            os.link(folder / f"{names[0]}.pt", folder / f"{name}.pt")
