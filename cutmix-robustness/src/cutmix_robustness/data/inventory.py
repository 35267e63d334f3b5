"""What the experiments read, where it is looked for, and what to do if it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torchvision import datasets

from cutmix_robustness.corruptions import CORRUPTIONS
from cutmix_robustness.data.cifar import JPEG_ARCHIVE, broken_in_archive, load
from cutmix_robustness.data.corrupted import read_cifar_c
from cutmix_robustness.data.ood import FOLDERS, mnist_digits, outliers
from cutmix_robustness.data.sources import ImageFiles
from cutmix_robustness.settings import DETECTION, Settings
from shared_utils.images import SUFFIXES, BrokenFile, image_files
from shared_utils.preflight import Need, file, package

FETCH = "cutmix-robustness data --download {}"
CORRUPTED = "its authors' archive, or `corrupt`; else generated"
ODIN = "the archive of ODIN's authors"
WEIGHTS = "train the rows of Table 3 with `train --output`, and put the checkpoint there"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("CIFAR-10", "paper", "163 MB", "", "cifar-10-batches-py", FETCH.format("cifar10")),
    ("CIFAR-100", "paper", "161 MB", "", "cifar-100-python", FETCH.format("cifar100")),
    ("CIFAR-10 (JPEG)", "cifar10-jpeg", "62 MB", "", JPEG_ARCHIVE, "a zip of train/<class>/*.jpg, test/..."),
    ("CIFAR-10-C", "paper", "2.9 GB", "CC BY 4.0", "CIFAR-10-C", CORRUPTED),
    ("CIFAR-100-C", "paper", "2.9 GB", "CC BY 4.0", "CIFAR-100-C", CORRUPTED),
    *((f"out-of-distribution: {name}", "paper", "", "", f"ood/{place}", ODIN) for name, place in FOLDERS.items()),
    ("MNIST", "cifar10-jpeg", "53 MB", "", "MNIST", FETCH.format("mnist")),
    ("SVHN", "paper", "182 MB", "non-commercial", "train_32x32.mat", FETCH.format("svhn")),
    ("GAN samples", "paper", "", "", "gan-samples", "your own folder (one row of Table R1)"),
    ("ImageNet (ILSVRC 2012)", "paper", "150 GB", "research only", "imagenet", "add train/<wnid>/ and val/<wnid>/"),
    ("ImageNet validation boxes", "paper", "", "", "imagenet/val_boxes", "add <image>.xml"),
    ("ImageNet-C", "paper", "75 GB", "CC BY 4.0", "imagenet-c", "its authors' archive; else generated"),
    ("CUB-200-2011", "paper", "1.1 GB", "non-commercial", "CUB_200_2011", "get its authors' archive yourself"),
    ("Pascal VOC 2007, 2012", "paper", "2.8 GB", "", "VOCdevkit", FETCH.format("voc")),
    ("ImageNet checkpoints", "paper", "", "", "weights", "`train imagenet`, rows of Table 3"),
)  # fmt: skip
NO_IMAGES = ("ImageNet validation boxes", "ImageNet checkpoints")


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("TwoWave", "embedded", "", "", "yes", "generated", "")]
    for name, scale, size, licence, place, mend in SETS:
        path = data_root / place
        found = path.exists()
        rows.append((name, scale, size, licence, "yes" if found else "no", str(path), "" if found else mend))
    return rows


def fetch(name: str, data_root: Path) -> None:
    """Download mnist, cifar10, cifar100, svhn or voc through torchvision, which checks the archive's hash."""
    root = str(data_root)
    if name == "svhn":
        datasets.SVHN(root, split="train", download=True)
    elif name == "voc":
        for year, part in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
            datasets.VOCDetection(root, year=year, image_set=part, download=True)
    else:
        {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, download=True)


def verify(data_root: Path, workers: int | None = None) -> dict[str, tuple[int, list[str]]]:
    """Decode every image below the data root.

    Args:
        data_root: folder that holds the data sets; missing ones are skipped.
        workers: processes; None: one per core, at most eight.

    Returns:
        By data set: its number of images, and a line for each that cannot be decoded. A set stored as arrays is read
        whole, and the first damage ends it.

    Raises:
        FileNotFoundError: none of the data sets is there.
    """
    arrays: dict[str, Callable[[], int]] = {
        "CIFAR-10": lambda: sum(map(len, load("cifar10", data_root, "none", "cpu")[:2])),
        "CIFAR-100": lambda: sum(map(len, load("cifar100", data_root, "none", "cpu")[:2])),
        "MNIST": lambda: sum(len(mnist_digits(data_root, train)) for train in (True, False)),
        "SVHN": lambda: len(outliers("svhn", data_root, 32, 0, "cpu")),
    }
    for name in ("CIFAR-10-C", "CIFAR-100-C"):
        arrays[name] = partial(_cifar_c_images, data_root / name)
    found: dict[str, tuple[int, list[str]]] = {}
    for name, *_, place, _ in SETS:
        path = data_root / place
        if name in arrays and path.exists():
            try:
                found[name] = arrays[name](), []
            except (BrokenFile, OSError, ValueError) as error:
                found[name] = 0, [str(error)]
        elif place == JPEG_ARCHIVE and path.is_file():
            found[name] = broken_in_archive(path)
        elif path.is_dir() and name not in NO_IMAGES:
            found[name] = 0, [f"{path}: contains no images"]
            if paths := image_files(path)[0]:
                images = ImageFiles(paths, torch.zeros(len(paths), dtype=torch.int64), name, num_workers=workers)
                found[name] = len(paths), list(images.broken().values())
    if not found:
        raise FileNotFoundError(f"{data_root}: none of the data sets is here; `cutmix-robustness data` lists them")
    return found


def _cifar_c_images(folder: Path) -> int:
    return sum(len(read_cifar_c(folder / f"{corruption}.npy")) for corruption in CORRUPTIONS)


def needs(settings: Settings, data_root: Path) -> Iterator[Need]:
    """Everything that a run reads, from its training set to the last suite of its evaluation."""
    if settings.task == "captioning":
        yield Need("image captioning on COCO (Table A1)", "not part of this project; name the other tables", False)
    elif settings.task == "detection":
        for year, part in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
            listing = data_root / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" / f"{part}.txt"
            yield file(listing, f"Pascal VOC {year} {part}", _fetched("voc", data_root))
    elif settings.task == "classification":
        yield from _training_set(settings, data_root)
        yield from _evaluation_sets(settings, data_root)
    if settings.initial_weights:
        yield file(data_root / settings.initial_weights, "weights to start from", WEIGHTS)


def _training_set(settings: Settings, data_root: Path) -> Iterator[Need]:
    two_parts = {"imagenet": (data_root / "imagenet", "train", "val"), "image-folder": (data_root, "train", "test")}
    if settings.dataset in ("cifar10", "cifar100"):
        place = "cifar-10-batches-py" if settings.dataset == "cifar10" else "cifar-100-python"
        yield file(data_root / place, settings.dataset.upper(), _fetched(settings.dataset, data_root))
    elif settings.dataset == "cifar10-jpeg":
        yield file(
            data_root / JPEG_ARCHIVE, "CIFAR-10 (JPEG)", "make a zip of train/<class>/*.jpg and test/<class>/*.jpg"
        )
    elif settings.dataset == "cub":
        yield file(data_root / "CUB_200_2011", "CUB-200-2011", "unpack its authors' archive there")
    elif settings.dataset in two_parts:
        root, *parts = two_parts[settings.dataset]
        for part in parts:
            yield file(root / part, f"{settings.dataset}, {part}", "put one folder of images per class there")
    if settings.outliers == "svhn":
        yield file(data_root / "train_32x32.mat", "SVHN", _fetched("svhn", data_root))
    elif settings.outliers == "gan":
        yield _images(data_root / "gan-samples", "GAN samples", "put your generator's images there")


def _evaluation_sets(settings: Settings, data_root: Path) -> Iterator[Need]:
    if "autoattack" in settings.suites:
        yield package("torchattacks", "install it without its outdated pins: pip install --no-deps torchattacks")
    detection = DETECTION & set(settings.suites)
    if detection and settings.dataset in ("cifar10", "cifar100"):
        for name, folder in FOLDERS.items():
            yield _images(data_root / "ood" / folder, f"out-of-distribution set {name}", f"unpack {ODIN} there")
    if detection and settings.dataset == "cifar10-jpeg":
        yield file(data_root / "MNIST" / "raw", "MNIST as out-of-distribution inputs", _fetched("mnist", data_root))
    if "localization" in settings.suites and settings.dataset == "imagenet":
        yield file(data_root / "imagenet" / "val_boxes", "ImageNet's validation boxes", "put <image>.xml there")
    stored = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "imagenet": "imagenet-c"}.get(settings.dataset, "")
    if "corruption" in settings.suites and stored and (data_root / stored).is_dir():
        remedy = "complete the folder, or move it away: corruptions are then generated"
        for name in CORRUPTIONS:
            places = [f"{name}.npy"] if stored != "imagenet-c" else [f"{name}/{each}" for each in settings.severities]
            for place in places:
                yield file(data_root / stored / place, f"{stored}, {place}", remedy)


def _images(folder: Path, what: str, remedy: str) -> Need:
    return Need(f"{what} ({folder})", remedy, any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")))


def _fetched(name: str, data_root: Path) -> str:
    return f"run `{FETCH.format(name)} --data-root {data_root}`"
