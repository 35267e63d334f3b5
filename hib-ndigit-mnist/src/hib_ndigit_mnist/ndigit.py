"""N-digit MNIST: which original digits each image consists of (section 4.1 of the paper).

Bit-exact with google/n-digit-mnist: the same draws of numpy's legacy generator in the same order. Its standard tables
for gap "number" are included (folder standard/), because one of them depends on Python 2's set order and cannot be
reproduced; here unseen numbers are enumerated in increasing order.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

GAPS = ("number", "instance")
SPLITS = {"number": ("train", "test_seen", "test_unseen"), "instance": ("train", "test")}
SEED = 714
STANDARD_DIGITS = (2, 3)


@dataclass(frozen=True)
class SplitIndex:
    """The index table of one split.

    Args:
        numbers: (classes,) int64, the class labels in file order (not sorted).
        image_ids: (classes, samples per number, N) int64, indices into MNIST's training or test images.
        source: "train" or "test", the part of MNIST that image_ids index.
    """

    numbers: np.ndarray
    image_ids: np.ndarray
    source: str

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64, grouped by class."""
        return np.repeat(self.numbers, self.image_ids.shape[1])

    @property
    def rows(self) -> np.ndarray:
        """(rows, N) int64."""
        return self.image_ids.reshape(-1, self.image_ids.shape[2])


def build_ndigit_indices(
    labels: tuple[np.ndarray, np.ndarray],
    num_digits: int,
    gap: str,
    *,
    ratio_train: int = 70,
    total_train: int = 100_000,
    total_test: int = 10_000,
    min_per_number: int = 100,
    seed: int = SEED,
    seen_from: str = "split",
) -> dict[str, SplitIndex]:
    """Draw all splits of an N-digit data set.

    Args:
        labels: digits of MNIST's training images and of its test images, two (n,) integer arrays in the original order.
        num_digits: N in 1 .. 6.
        gap: "number" separates numbers (train, test_seen, test_unseen); "instance" only images (train, test).
        ratio_train: percentage of the numbers used for training, 1 .. 99 (gap number).
        total_train: target number of images in the training split.
        total_test: target number of images in each test split.
        min_per_number: below this, gap number takes fewer numbers; gap instance raises an error.
        seed: seed of the whole draw.
        seen_from: "split" draws a trimmed test_seen from all numbers meant for training, like the original: for
            N >= 4 most of them are not in the training set. "trained" draws from those that are.

    Returns:
        A table per split, in the order of drawing.

    Raises:
        ValueError: an argument outside its range, too few images per number (gap instance), or a digit with fewer
            images than a number needs.
    """
    _check(num_digits, gap, ratio_train, (total_train, total_test), min_per_number, seen_from)
    pools = {
        source: [np.flatnonzero(np.asarray(part) == digit) for digit in range(10)]
        for source, part in zip(("train", "test"), labels, strict=True)
    }
    rng, count = np.random.RandomState(seed), 10**num_digits
    if gap == "instance":
        numbers = np.arange(count)
        if total_train // count < min_per_number:
            raise ValueError(
                f"min_per_number: {total_train} images of {count} numbers are {total_train // count} each, "
                f"less than {min_per_number}; gap instance cannot drop numbers"
            )
        train = _draw(rng, numbers, total_train, 0, pools["train"], "train", num_digits)
        return {"train": train, "test": _draw(rng, numbers, total_test, 0, pools["test"], "test", num_digits)}
    numbers = rng.choice(count, int(ratio_train * count / 100), replace=False)
    unseen = np.setdiff1d(np.arange(count), numbers)
    train = _draw(rng, numbers, total_train, min_per_number, pools["train"], "train", num_digits)
    seen = train.numbers if seen_from == "trained" else numbers
    result = {"train": train}
    for split, those in (("test_seen", seen), ("test_unseen", unseen)):
        result[split] = _draw(rng, those, total_test, min_per_number, pools["test"], "test", num_digits)
    return result


def standard_indices(num_digits: int) -> dict[str, SplitIndex]:
    """The included standard tables of gap "number"; ValueError unless N is 2 or 3."""
    if num_digits not in STANDARD_DIGITS:
        raise ValueError(f"num_digits: standard tables exist for 2 and 3, got {num_digits}")
    path = files("hib_ndigit_mnist") / "standard" / f"standard_{num_digits}_number.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
        return {
            split: SplitIndex(
                table[f"{split}_chosen_numbers"].astype(np.int64),
                table[f"{split}_image_ids"].astype(np.int64),
                "train" if split == "train" else "test",
            )
            for split in SPLITS["number"]
        }


def _draw(
    rng: np.random.RandomState,
    numbers: np.ndarray,
    total: int,
    minimum: int,
    pools: list[np.ndarray],
    source: str,
    num_digits: int,
) -> SplitIndex:
    per_number = total // len(numbers)
    if per_number < minimum:
        per_number = minimum
        numbers = rng.choice(numbers, total // minimum, replace=False)
    if not per_number or not len(numbers):
        raise ValueError(f"{source}: a total of {total} images is too small for one per number")
    for digit, pool in enumerate(pools):
        if len(pool) < per_number:
            raise ValueError(
                f"{source}: {per_number} images of digit {digit} are needed per number, but only {len(pool)} exist"
            )
    image_ids = np.empty((len(numbers), per_number, num_digits), np.int64)
    for row, number in enumerate(numbers):
        for position in range(num_digits):
            digit = number // 10 ** (num_digits - 1 - position) % 10
            image_ids[row, :, position] = rng.choice(pools[digit], per_number, replace=False)
    return SplitIndex(np.asarray(numbers, np.int64), image_ids, source)


def _check(num_digits: int, gap: str, ratio: int, totals: tuple[int, int], minimum: int, seen_from: str) -> None:
    if isinstance(num_digits, bool) or num_digits not in range(1, 7):
        raise ValueError(f"num_digits: expected 1 to 6, got {num_digits}")
    if gap not in GAPS:
        raise ValueError(f"gap: expected {' or '.join(GAPS)}, got {gap!r}")
    if not 0 < ratio < 100 or not int(ratio * 10**num_digits / 100):
        raise ValueError(f"ratio_train: expected 1 to 99, with numbers left on both sides, got {ratio}")
    if minimum < 1:
        raise ValueError(f"min_per_number: expected >= 1, got {minimum}")
    if gap == "number" and min(totals) < minimum:
        raise ValueError(f"min_per_number: {minimum} images of a number exceed the total of {min(totals)}")
    if seen_from not in ("split", "trained"):
        raise ValueError(f"seen_from: expected split or trained, got {seen_from!r}")
