"""What the experiments read, where it is looked for, and what to do if it is missing."""

from __future__ import annotations

from pathlib import Path

from hib_ndigit_mnist.data import read_mnist
from hib_ndigit_mnist.images import files_of
from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger

logger = get_logger("hib-ndigit-mnist")


def verify(data_root: Path, images: Path | None) -> None:
    """Read all of MNIST, or every file of a folder of images; stops at the first broken file.

    Raises:
        BrokenFile: a file that cannot be read.
        ValueError: no images, or digits that are not MNIST's.
        FileNotFoundError: nothing was found.
    """
    if images:
        files = files_of(images)
        for file in files:
            read_image(file)
        logger.info("%s: %d images can be read", images, len(files))
        return
    digits = read_mnist(data_root)
    logger.info("%s: MNIST, %d and %d images", data_root, len(digits.train_labels), len(digits.test_labels))


def inventory(data_root: Path) -> list[tuple[str, ...]]:
    """Rows: data, scale, size, licence, found, where, what to do if missing. MNIST is checked by SHA-256."""
    found, mend = "yes", ""
    try:
        read_mnist(data_root)
    except FileNotFoundError:
        found, mend = "no", "hib-ndigit-mnist data --download"
    except (BrokenFile, ValueError) as error:
        found, mend = f"damaged ({error})", "hib-ndigit-mnist data --download --data-root NEW"
    return [
        ("scikit-learn digits", "smoke, embedded", "1 MB", "BSD", "yes", "inside scikit-learn", ""),
        ("MNIST", "lenet, paper", "53 MB", "CC BY-SA 3.0", found, str(data_root), mend),
        ("N-digit MNIST index tables", "lenet, paper", "1.2 MB", "Apache-2.0", "yes", "inside this package", ""),
    ]
