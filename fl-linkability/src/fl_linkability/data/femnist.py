"""LEAF's FEMNIST, read one writer at a time: its 805,263 images of 3,597 writers are never all in memory."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ijson  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import Background, FederatedBundle, Rows
from fl_linkability.data.lists import Item, most_active, on_devices, split_devices
from fl_linkability.data.reading import Reading, alone
from fl_linkability.settings import Settings
from fl_linkability.styles import apply_styles, random_styles
from shared_utils.files import whole_file
from shared_utils.logging import progress

CLASSES, PIXELS = 62, 784


def load_femnist(settings: Settings, seed: int, reading: Reading) -> FederatedBundle:
    """LEAF's FEMNIST: every JSON below femnist/data/train; 28 x 28, ink is 1, 62 classes.

    Raises:
        FileNotFoundError: no JSON file.
        ValueError: too few users with enough images, none left for the background, or a file that is not LEAF's.
    """
    s = settings
    x, y, writer = prepare(reading.root / "femnist" / "data" / "train", reading.cache)
    chosen = most_active(Counter(writer.tolist()), s.users, max(s.images_per_device, 1))
    mine = np.isin(writer, sorted(chosen))
    rows, others = np.flatnonzero(mine), np.flatnonzero(~mine)
    if len(others) == 0:
        raise ValueError("femnist: all writers are users and none is left for the background; ask for fewer users")
    rows = rows[np.argsort(writer[rows], kind="stable")]
    split = split_devices([Item(Path(), name, ()) for name in writer[rows]], s.shard, seed)

    def part(rows: np.ndarray) -> tuple[Rows, Tensor]:
        picked = torch.from_numpy(rows)
        return Rows(x, picked), y[picked]

    background = Background(*part(others[: s.background or None]))
    return on_devices("femnist", lambda each: part(rows[each]), split, ~split.test, split.test, background, CLASSES)


def prepare(folder: Path, cache: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """All images as a memory map, float32 (n, 1, 28, 28), labels int64 (n,) and writers (n,), in the files' order."""
    paths = leaf_files(folder)
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((str(folder.resolve()), state)).encode()).hexdigest()[:16]
    images, facts = cache / f"femnist-{key}.f32", cache / f"femnist-{key}.npz"
    with alone(images):
        if not facts.exists():
            _convert(paths, images, facts)
    with np.load(facts) as content:
        y, writer = content["y"], content["writer"]
    x = np.memmap(images, np.float32, "r+", shape=(len(y), 1, 28, 28))
    return torch.from_numpy(x), torch.from_numpy(y), writer


def leaf_files(folder: Path) -> list[Path]:
    """LEAF's files, without hidden ones. FileNotFoundError if there are none."""
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{folder}: no JSON file from LEAF; see `fl-linkability data`")
    return paths


def _convert(paths: list[Path], images: Path, facts: Path) -> None:
    labels, names = [], []
    with open(images, "wb") as file, progress() as bar:
        for path in bar.track(paths, description="reading LEAF's files"):
            for name, x, y in read_leaf(path):
                file.write(np.ascontiguousarray(1 - x).tobytes())  # LEAF's paper is 1, ink is 0
                labels.append(y)
                names.append(np.full(len(y), name))
    with whole_file(facts) as temporary, open(temporary, "wb") as file:  # last: without it the images are not used
        np.savez(file, y=np.concatenate(labels), writer=np.concatenate(names))


def read_leaf(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Writers of one file: name, x float32 (n, 784) as stored, y int64 (n,). ValueError if it is not LEAF's."""
    try:
        with open(path, "rb") as file:
            for name, data in ijson.kvitems(file, "user_data", use_float=True):
                x, y = np.array(data["x"], np.float32).reshape(-1, PIXELS), np.array(data["y"], np.int64)
                if len(x) != len(y):
                    raise ValueError(f"{len(x)} images and {len(y)} labels")
                yield name, x, y
    except (ijson.JSONError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of LEAF's FEMNIST ({error}); fetch it again") from error


def write_leaf(path: Path, writers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """A file as LEAF writes it: x (n, 784) with 1 as paper, y (n,), by writer."""
    data = {name: {"x": x.round(4).tolist(), "y": y.tolist()} for name, (x, y) in writers.items()}
    content = {"users": list(data), "num_samples": [len(each["y"]) for each in data.values()], "user_data": data}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_femnist_like(data_root: Path, folder: Path, n_writers: int = 60, n_images: int = 120, seed: int = 0) -> None:
    """Writers made from real MNIST in LEAF's layout: all classes are equally likely, each writer has a drawing style.

    Args:
        data_root: of MNIST.
        folder: the new data root; the files go to its subfolder femnist/data/train.
        n_writers: writers; no two share a digit.
        n_images: images per writer.
        seed: of digits and styles.
    """
    from fl_linkability.data.styled import read_mnist

    images, labels = read_mnist(data_root, train=True)
    rng = np.random.default_rng([seed, 31])
    rows = rng.permutation(len(images))[: n_writers * n_images].reshape(n_writers, n_images)
    writers = {}
    for number, (mine, style) in enumerate(zip(rows, random_styles(n_writers, rng), strict=True)):
        ink = apply_styles(images[mine].unsqueeze(1) / 255, np.tile(style, (n_images, 1)), rng)
        writers[f"m{number:04d}_{number % 50:02d}"] = (1 - ink.flatten(1).numpy(), labels[mine].numpy())
    write_leaf(folder / "femnist" / "data" / "train" / "all_data_0_niid_0_keep_0_train_9.json", writers)
