"""What the experiments read, where it is looked for, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path

from torchvision import datasets

from cutmix_robustness.data.cifar import JPEG_ARCHIVE
from cutmix_robustness.data.ood import FOLDERS

FETCH = "cutmix-robustness data --download {}"
CORRUPTED = "its authors' archive, or `corrupt`; else generated"
ODIN = "the archive of ODIN's authors, by hand"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("CIFAR-10", "paper", "163 MB", "", "cifar-10-batches-py", FETCH.format("cifar10")),
    ("CIFAR-100", "paper", "161 MB", "", "cifar-100-python", FETCH.format("cifar100")),
    ("CIFAR-10 (JPEG)", "cifar10-jpeg", "62 MB", "", JPEG_ARCHIVE, "a zip of train/<class>/*.jpg, test/..."),
    ("CIFAR-10-C", "paper", "2.9 GB", "CC BY 4.0", "CIFAR-10-C", CORRUPTED),
    ("CIFAR-100-C", "paper", "2.9 GB", "CC BY 4.0", "CIFAR-100-C", CORRUPTED),
    *((f"unknown inputs: {name}", "paper", "", "", f"ood/{place}", ODIN) for name, place in FOLDERS.items()),
    ("SVHN", "paper", "182 MB", "non-commercial", "train_32x32.mat", FETCH.format("svhn")),
    ("GAN samples", "paper", "", "", "gan-samples", "a folder of your own (one row of Table R1)"),
    ("ImageNet (ILSVRC 2012)", "paper", "150 GB", "research only", "imagenet", "by hand: train/<wnid>/, val/<wnid>/"),
    ("ImageNet validation boxes", "paper", "", "", "imagenet/val_boxes", "by hand: <image>.xml"),
    ("ImageNet-C", "paper", "75 GB", "CC BY 4.0", "imagenet-c", "its authors' archive; else generated"),
    ("CUB-200-2011", "paper", "1.1 GB", "non-commercial", "CUB_200_2011", "its authors' archive, by hand"),
    ("Pascal VOC 2007, 2012", "paper", "2.8 GB", "", "VOCdevkit", FETCH.format("voc")),
    ("ImageNet checkpoints", "paper", "", "", "weights", "`train imagenet`, rows of Table 3"),
)  # fmt: skip


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("TwoWave", "embedded", "", "", "yes", "made on the spot", "")]
    for name, scale, size, licence, place, mend in SETS:
        path = data_root / place
        found = path.exists()
        rows.append((name, scale, size, licence, "yes" if found else "no", str(path), "" if found else mend))
    return rows


def fetch(name: str, data_root: Path) -> None:
    """Download cifar10, cifar100, svhn or voc through torchvision, which checks the archive's hash."""
    root = str(data_root)
    if name == "svhn":
        datasets.SVHN(root, split="train", download=True)
    elif name == "voc":
        for year, part in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
            datasets.VOCDetection(root, year=year, image_set=part, download=True)
    else:
        {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, download=True)
