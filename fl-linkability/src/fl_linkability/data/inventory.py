"""What the experiments read, where it is looked for, and what to do where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

TABLE = "write image_path,user_id,device_id,labels,role (labels joined by |) and background.csv: image_path,labels"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "mnist", "53 MB", "CC BY-SA 3.0", "MNIST/raw", "fl-linkability data --download"),
    ("FEMNIST (LEAF)", "paper", "", "BSD 2-Clause (LEAF)", "femnist/data/train",
     "LEAF's preprocess.sh, by hand; or fl-linkability data --femnist-like"),
    ("FLAIR (substitute)", "paper, head", "small images", "CC BY-NC 4.0", "flair/labels_and_metadata.json",
     "its publisher's download script, by hand"),
    ("PIPA", "paper, head", "33,051 images", "by photo", "pipa/users.csv", TABLE),
    ("OpenImages by author", "paper, head", "317,008 images", "CC BY 2.0 (photos)", "openimages/users.csv", TABLE),
    ("your own table", "", "", "", "csv/users.csv", TABLE),
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


def verify(data_root: Path) -> Iterator[tuple[str, str]]:
    """Read every file of each set that is there to its end: name and how much was read.

    Raises:
        BrokenFile: an image that is truncated or no image.
        ValueError: a list or file that is not what it should be.
        FileNotFoundError: an image that a list names is not there.
    """
    from fl_linkability.data.femnist import read_leaf
    from fl_linkability.data.lists import read_flair, read_table
    from fl_linkability.data.styled import read_mnist
    from shared_utils.images import read_image

    for name, *_, place, _ in SETS:
        path = data_root / place
        if not path.exists():
            continue
        if place.startswith("MNIST"):
            yield name, f"{sum(len(read_mnist(data_root, train)[0]) for train in (True, False))} images"
        elif place.startswith("femnist"):
            files = [file for file in sorted(path.glob("*.json")) if not file.name.startswith(".")]
            yield name, f"{sum(len(y) for file in files for _, _, y in read_leaf(file))} images"
        else:
            items = [item for part in read_flair(path.parent) for item in part] if name.startswith("FLAIR") else []
            if not items:
                background = path.with_name("background.csv")
                items = read_table(path) + (read_table(background, users=False) if background.exists() else [])
            for item in items:
                read_image(item.path)
            yield name, f"{len(items)} images"
