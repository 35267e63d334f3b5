"""What the experiments read, where it is looked for, and what to do where it is missing."""

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
