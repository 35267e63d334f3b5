"""What the experiments read, where it is looked for, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path

MNIST_FETCH = "rebias data --download"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "mnist, paper", "53 MB", "CC BY-SA 3.0", "MNIST/raw", MNIST_FETCH),
    ("ImageNet (ILSVRC 2012)", "paper", "42 of 1,000 classes", "research only", "imagenet", "image-net.org, by hand"),
    ("ImageNet-A", "paper", "", "MIT", "imagenet-a", "its authors' archive, by hand"),
    ("ImageNet-C (optional)", "paper", "", "CC BY 4.0", "imagenet-c", "its authors' archive, by hand"),
    ("Stylized-ImageNet (StylisedIN)", "paper", "", "research only", "stylised-imagenet", "made by its authors' code"),
    ("Kinetics (ten classes)", "paper", "", "CC BY 4.0 (annotation)", "kinetics", "its annotation, videos by hand"),
    ("Mimetics (ten classes)", "paper", "136 clips", "", "mimetics", "its annotation, videos by hand"),
)


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("scikit-learn digits", "embedded", "1 MB", "BSD", "yes", "inside scikit-learn", "")]
    for name, scale, size, licence, place, mend in SETS:
        found = (data_root / place).is_dir()
        rows.append(
            (name, scale, size, licence, "yes" if found else "no", str(data_root / place), "" if found else mend)
        )
    return rows
