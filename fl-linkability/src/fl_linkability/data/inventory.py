"""What the experiments read, where it is looked for, and what to do if it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fl_linkability.settings import TEXTS
from shared_utils.preflight import Need, file

TABLE = "write image_path,user_id,device_id,labels,role (labels joined by |) and background.csv: image_path,labels"
BLOG = "unpack the corpus into blog/blogs; next to it, add background.txt: one sentence per line (WikiReading)"
YELP = "unpack its JSON into yelp; next to it, add background.json: Amazon reviews, one JSON object per line"


@dataclass(frozen=True)
class DataSet:
    """A data set that the project does not make itself."""

    name: str
    scale: str
    size: str
    licence: str
    place: str
    """below the data root"""
    remedy: str
    background: str = ""
    """below the data root, if it is a separate file"""

    def need(self, data_root: Path) -> Need:
        """The need for the data set itself."""
        return file(data_root / self.place, self.name, self.remedy)

    def background_need(self, data_root: Path) -> Need:
        """The need for the background that mitigations use."""
        return file(data_root / self.background, f"background of {self.name}", self.remedy)


SETS = {
    "mnist": DataSet("MNIST", "mnist", "53 MB", "CC BY-SA 3.0", "MNIST/raw", "fl-linkability data --download"),
    "femnist": DataSet(
        "FEMNIST (LEAF)", "paper", "", "BSD 2-Clause (LEAF)", "femnist/data/train",
        "run LEAF's preprocess.sh, or fl-linkability data --femnist-like",
    ),
    "flair": DataSet(
        "FLAIR (substitute)", "paper, head", "small images", "CC BY-NC 4.0", "flair/labels_and_metadata.json",
        "run its publisher's download script",
    ),
    "pipa": DataSet("PIPA", "paper, head", "33,051 images", "by photo", "pipa/users.csv", TABLE, "pipa/background.csv"),
    "openimages": DataSet(
        "OpenImages by author", "paper, head", "317,008 images", "CC BY 2.0 (photos)", "openimages/users.csv", TABLE,
        "openimages/background.csv",
    ),
    "csv": DataSet("your own table", "", "", "", "csv/users.csv", TABLE, "csv/background.csv"),
    "blog": DataSet(
        "Blog Authorship Corpus", "paper", "681,288 posts", "non-commercial research", "blog/blogs", BLOG,
        "blog/background.txt",
    ),
    "yelp": DataSet(
        "Yelp Open Dataset", "paper", "7 million reviews", "Yelp's terms", "yelp/yelp_academic_dataset_review.json",
        YELP, "yelp/background.json",
    ),
}  # fmt: skip


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("scikit-learn digits", "embedded", "1 MB", "BSD", "yes", "inside scikit-learn", "")]
    for each in SETS.values():
        found = each.need(data_root).met
        known = each.name, each.scale, each.size, each.licence
        rows.append((*known, "yes" if found else "no", str(data_root / each.place), "" if found else each.remedy))
    return rows


def verify(data_root: Path) -> Iterator[tuple[str, int]]:
    """Read all files of each data set found, completely: its name and number of images or texts.

    Raises:
        BrokenFile: an image that is truncated, or not an image.
        ValueError: a list or file in the wrong format.
        FileNotFoundError: an image that a list names is missing, or none of the data sets is there.
    """
    from fl_linkability.data.femnist import leaf_files, read_leaf
    from fl_linkability.data.lists import read_flair, read_table
    from fl_linkability.data.styled import read_mnist
    from fl_linkability.data.texts import count_samples
    from shared_utils.images import read_image

    there = {name: each for name, each in SETS.items() if each.need(data_root).met}
    if not there:
        raise FileNotFoundError(f"{data_root}: none of the data sets is here; `fl-linkability data` lists them")
    for name, each in there.items():
        if name == "mnist":
            yield each.name, sum(len(read_mnist(data_root, train)[0]) for train in (True, False))
        elif name == "femnist":
            paths = leaf_files(data_root / each.place)
            yield each.name, sum(len(y) for path in paths for _, _, y in read_leaf(path))
        elif name in TEXTS:
            yield each.name, count_samples(name, data_root / name)
        else:
            folder = data_root / name
            if name == "flair":
                users, background = read_flair(folder)
            else:
                users, background = read_table(folder / "users.csv"), read_table(folder / "background.csv", users=False)
            for item in (*users, *background):
                read_image(item.path)
            yield each.name, len(users) + len(background)
