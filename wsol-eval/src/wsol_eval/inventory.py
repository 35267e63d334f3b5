"""What the experiments read, where it is looked for, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path

from wsol_eval import cutouts
from wsol_eval.kangaroo_raccoon import CLONES

COPY = "copy metadata/ of clovaai/wsolevaluation"
KANGAROOS, RACCOONS = CLONES
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "cifar10-jpeg", "53 MB", "", "MNIST/raw", cutouts.MNIST_REMEDY),
    ("CIFAR-10 as JPEG", "cifar10-jpeg", "62 MB", "", cutouts.ARCHIVE, cutouts.CIFAR_REMEDY),
    ("kangaroos", "kangaroo-raccoon", "20 MB", "none stated", "kangaroo", KANGAROOS.remedy),
    ("raccoons", "kangaroo-raccoon", "14 MB", "MIT", "raccoon_dataset", RACCOONS.remedy),
    ("CUB images", "paper", "1.2 GB", "see its publisher", "CUB", "its publisher, by hand"),
    ("CUB metadata", "paper", "2 MB", "CC-BY-2.0 (boxes)", "metadata/CUB", COPY),
    ("ImageNet and ImageNetV2 images", "paper", "150 GB", "see its publisher", "ILSVRC", "image-net.org, by hand"),
    ("ImageNet metadata", "paper", "130 MB", "CC-BY-2.0 (V2 boxes)", "metadata/ILSVRC", COPY),
    ("OpenImages30k images and masks", "paper", "", "CC-BY-4.0 (annotations)", "OpenImages", "its publisher, by hand"),
    ("ImageNet weights", "paper", "0.8 GB", "see torchvision", "weights", "`wsol-eval data weights`"),
    ("OpenImages30k metadata", "paper", "10 MB", "CC-BY-4.0", "metadata/OpenImages", COPY),
)


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [
        (
            "digits and photographs",
            "smoke, embedded",
            "",
            "BSD, CC0, CC-BY",
            "yes",
            "scikit-learn, scikit-image",
            "",
        ),
        ("CUBV2 boxes (sample)", "embedded", "0.2 MB", "CC-BY-2.0", "yes", "inside the package", ""),
    ]
    for name, scale, size, licence, place, mend in SETS:
        found = (data_root / place).exists()
        rows.append(
            (name, scale, size, licence, "yes" if found else "no", str(data_root / place), "" if found else mend)
        )
    return rows
