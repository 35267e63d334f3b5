"""What the experiments read, where it is looked for, and what to do if it is missing."""

from __future__ import annotations

from pathlib import Path

SAMPLES = "real/ and the generator's samples, from your own folders"
SETS = (  # name, scale, size, licence, place below the data root, what to do
    ("MNIST", "mnist", "53 MB", "CC BY-SA 3.0", "MNIST/raw", "prdc-metrics data --download"),
    *(
        (name, "paper", "your samples", "see its publisher", name, SAMPLES)
        for name in (
            "ffhq",
            "celeba-stylegan",
            "lsun-bedroom-stylegan",
            "ffhq-stylegan",
            "mnist-dcgan",
            "sc09-wavegan",
        )
    ),
)


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing."""
    rows: list[tuple[str, ...]] = [
        ("scikit-learn digits", "smoke, embedded", "1 MB", "BSD", "yes", "inside scikit-learn", "")
    ]
    for name, scale, size, licence, place, mend in SETS:
        found = (data_root / place).is_dir()
        rows.append(
            (name, scale, size, licence, "yes" if found else "no", str(data_root / place), "" if found else mend)
        )
    return rows


def verify(data_root: Path) -> None:
    """Decode every image of the sets that are there.

    Raises:
        BrokenFile: images that cannot be read; the message names each.
        FileNotFoundError: none of the sets is there.
    """
    from prdc_metrics.data import load_mnist
    from shared_utils.images import BrokenFile, image_files, read_image
    from shared_utils.logging import get_logger, progress

    there = [(name, data_root / place) for name, *_, place, _ in SETS if (data_root / place).is_dir()]
    if not there:
        raise FileNotFoundError(f"{data_root}: none of the data sets is here; `prdc-metrics data` lists them")
    broken: list[str] = []
    for name, folder in there:
        if name == "MNIST":
            load_mnist(data_root, train=True)
            count = 60_000
        else:
            files, _ = image_files(folder)
            count = len(files)
            broken += [] if files else [f"{folder}: contains no images"]
            with progress() as bar:
                for path in bar.track(files, description=name):
                    try:
                        read_image(path)
                    except BrokenFile as error:
                        broken.append(str(error))
        get_logger("prdc-metrics").info("%s: %d images read", name, count)
    if broken:
        raise BrokenFile("\n".join([f"{len(broken)} images cannot be read:", *broken]))
