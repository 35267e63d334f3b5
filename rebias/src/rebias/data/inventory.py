"""What the experiments read, where it is looked for, and what to do if it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rebias.settings import Settings
from shared_utils.preflight import Need, disk_space, file

MNIST_FETCH = "rebias data --download"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "mnist, paper", "53 MB", "CC BY-SA 3.0", "MNIST/raw", MNIST_FETCH),
    (
        "ImageNet (ILSVRC 2012)",
        "paper",
        "42 of 1,000 classes",
        "research only",
        "imagenet",
        "from image-net.org",
    ),
    ("ImageNet-A", "paper", "", "MIT", "imagenet-a", "get its authors' archive"),
    ("ImageNet-C (optional)", "paper", "", "CC BY 4.0", "imagenet-c", "get its authors' archive"),
    (
        "Stylized-ImageNet (StylisedIN)",
        "paper",
        "",
        "research only",
        "stylised-imagenet",
        "use its authors' code",
    ),
    ("Kinetics (ten classes)", "paper", "", "CC BY 4.0 (annotation)", "kinetics", "get its annotation and the videos"),
    ("Mimetics (ten classes)", "paper", "136 clips", "", "mimetics", "get its annotation and the videos"),
)
BY_HAND = "use the layout shown in the README (`rebias data --tiny FOLDER` writes an example)"
PLACES = {  # what a data set's training and evaluation read, below the data root
    "mnist": tuple(
        f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ),
    "imagenet9": ("imagenet/train", "imagenet/val", "imagenet-a"),
    "kinetics10": (
        "kinetics/train.csv", "kinetics/train", "kinetics/val.csv", "kinetics/val", "mimetics/mimetics.csv",
    ),
}  # fmt: skip
PLACES |= {
    "csv": ("images.csv",),
    "waterbirds": ("waterbird_complete95_forest2water2/metadata.csv",),
    "celeba": ("celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt", "celeba/img_align_celeba"),
    "bffhq": ("bffhq/0.5pct/align", "bffhq/0.5pct/conflict", "bffhq/valid", "bffhq/test"),
}
CHECKPOINT_MB = {"mnist": 20, "imagenet9": 300, "kinetics10": 150}


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [("scikit-learn digits", "embedded", "1 MB", "BSD", "yes", "inside scikit-learn", "")]
    for name, scale, size, licence, place, mend in SETS:
        found = (data_root / place).is_dir()
        rows.append(
            (name, scale, size, licence, "yes" if found else "no", str(data_root / place), "" if found else mend)
        )
    return rows


def needs(settings: Settings, data_root: Path, output: Path) -> Iterator[Need]:
    """Everything that a run of these settings reads, and room for its checkpoint in the folder `output`."""
    places = PLACES.get(settings.dataset, ()) if not settings.network else ()
    for place in (*places, *(["stylised-imagenet/train"] if settings.stylised else [])):
        remedy = MNIST_FETCH if settings.dataset == "mnist" else BY_HAND
        yield file(data_root / place, place.split("/")[0], remedy)
    yield disk_space(output, CHECKPOINT_MB.get(settings.dataset, 5))


def verify(data_root: Path, workers: int) -> dict[str, tuple[int, dict[int, str]]]:
    """Decode every file that is there completely.

    Returns:
        By name of the set: the number of files, and a message for each broken one. MNIST counts as two files.

    Raises:
        FileNotFoundError: none of the sets is there.
    """
    from rebias.data import action, imagenet9
    from rebias.data.biased import load_mnist
    from rebias.data.dataset import Reading
    from rebias.data.grouped import SPLITS, bffhq, celeba, csv_set, waterbirds

    options: dict[str, Any] = {"reading": Reading(workers=workers, skip_missing=True)}
    found: dict[str, tuple[int, dict[int, str]]] = {}
    if (data_root / "MNIST" / "raw").is_dir():
        lines = {}
        for train in (True, False):
            try:
                load_mnist(data_root, train)
            except (OSError, ValueError) as error:
                lines[int(train)] = str(error)
        found["MNIST"] = 2, lines
    folders = ["imagenet/train", "imagenet/val", "imagenet-a", "stylised-imagenet/train"]
    folders += [path.relative_to(data_root).as_posix() for path in sorted((data_root / "imagenet-c").glob("*/[1-5]"))]
    sets: dict[str, Callable[[], Any]] = {
        folder: partial(imagenet9.image_folder, data_root / folder, folder, **options) for folder in folders
    }
    sets["kinetics/train"] = partial(action.kinetics10, data_root, True, **options)
    sets["kinetics/val"] = partial(action.kinetics10, data_root, False, **options)
    sets["mimetics"] = partial(action.mimetics10, data_root, **options)
    for place, opened in sets.items():
        if (data_root / place).is_dir():
            data = opened()
            found[place] = len(data) // getattr(data, "views", 1), data.broken()
    options = {"reading": Reading(workers=workers)}
    for dataset, opener in (("waterbirds", waterbirds), ("celeba", celeba), ("bffhq", bffhq)):
        place = PLACES[dataset][0].split("/")[0]
        if (data_root / place).is_dir():
            parts = [opener(data_root / place, split, **options) for split in SPLITS]
            broken = [line for part in parts for line in part.broken().values()]
            found[place] = sum(map(len, parts)), dict(enumerate(broken))
    if (csv := data_root / PLACES["csv"][0]).is_file():
        found[csv.name] = len(data := csv_set(csv, **options)), data.broken()
    if not found:
        raise FileNotFoundError(f"{data_root}: none of the data sets is here; `rebias data` lists them")
    return found
