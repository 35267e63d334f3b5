"""What the experiments read, where it is looked for, and what to do where it is missing."""

from __future__ import annotations

from pathlib import Path

TABLE = "users.csv: image_path,user_id,device_id,labels (labels joined by |); background.csv: image_path,labels"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "mnist", "53 MB", "CC BY-SA 3.0", "MNIST/raw", "fl-linkability data --download"),
    ("FEMNIST (LEAF)", "paper", "", "BSD 2-Clause (LEAF)", "femnist/data/train", "LEAF's preprocess.sh, by hand"),
    ("FLAIR (substitute)", "paper, head", "small images", "CC BY-NC 4.0", "flair/labels_and_metadata.json",
     "its publisher's download script, by hand"),
    ("PIPA", "paper, head", "33,051 images", "by photo", "pipa/users.csv", TABLE),
    ("OpenImages by author", "paper, head", "317,008 images", "CC BY 2.0 (photos)", "openimages/users.csv", TABLE),
)  # fmt: skip


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("scikit-learn digits", "embedded", "1 MB", "BSD", "yes", "inside scikit-learn", "")]
    for name, scale, size, licence, place, mend in SETS:
        found = (data_root / place).exists()
        rows.append(
            (name, scale, size, licence, "yes" if found else "no", str(data_root / place), "" if found else mend)
        )
    return rows
