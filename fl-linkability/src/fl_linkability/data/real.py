"""Users of real data sets: FEMNIST (LEAF), FLAIR, and tables of images of one's own (PIPA, OpenImages by author).

Photos are decoded once to uint8 at the network's size into a memory map below <data root>/.fl-linkability; for a head
on a frozen network their features are computed once and kept instead.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import Background, FederatedBundle, UserDataset
from fl_linkability.settings import Settings
from fl_linkability.train import as_input
from shared_utils.logging import get_logger, progress

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = get_logger("fl_linkability")
FEATURES = 1280
TEST_SHARE = 0.2  # of each user's images (section 6)


@dataclass(frozen=True)
class Item:
    """One image: where it is, whose, on which device (-1: to be decided), and what it shows."""

    path: Path
    user: str
    device: int
    labels: tuple[str, ...]


def load_real(settings: Settings, seed: int, data_root: Path, fabric: Fabric) -> FederatedBundle:
    """The data set of the settings. FileNotFoundError where it is missing, ValueError where it is too small."""
    if settings.dataset == "femnist":
        return load_femnist(data_root / "femnist", settings, seed)
    if settings.dataset == "flair":
        items, background = read_flair(data_root / "flair")
    else:
        folder = data_root / settings.dataset
        items = read_table(folder / "users.csv")
        background = read_table(folder / "background.csv", users=False) if (folder / "background.csv").exists() else []
    items = choose_users(items, settings.users, max(settings.images_per_device, 1))
    return photo_bundle(items, background, settings, seed, data_root, fabric)


# ---- lists of images ------------------------------------------------------------------------------------------


def read_table(path: Path, users: bool = True) -> list[Item]:
    """A user's CSV: image_path,user_id,device_id,labels; paths are relative to it, labels joined by |.

    Args:
        path: of the table.
        users: False for background images: image_path,labels.

    Raises:
        FileNotFoundError: no table.
        ValueError: a missing column, no line, or a line without user or labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; it needs image_path,user_id,device_id,labels")
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    needed = ["image_path", "labels", *(["user_id", "device_id"] if users else [])]
    missing = [name for name in needed if lines and name not in lines[0]]
    if missing or not lines:
        raise ValueError(f"{path}: {'no line' if not lines else 'no column ' + ', '.join(missing)}")
    items: list[Item] = []
    devices: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines, 2):
        labels = tuple(filter(None, (line["labels"] or "").split("|")))
        user = line.get("user_id") or ""
        if not labels or (users and not user):
            raise ValueError(f"{path} line {number}: needs labels{' and a user_id' if users else ''}")
        device = -1
        if users:
            seen = devices.setdefault(user, {})
            device = seen.setdefault(line["device_id"], len(seen))
        items.append(Item(path.parent / line["image_path"], user, device, labels))
    return items


def read_flair(folder: Path) -> tuple[list[Item], list[Item]]:
    """FLAIR: labels_and_metadata.json beside small_images/<image_id>.jpg.

    Returns:
        the images of users of the partition train, and those of the others: the background.
    """
    path = folder / "labels_and_metadata.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: FLAIR is not there; see `fl-linkability data`")
    entries = sorted(json.loads(path.read_text()), key=lambda entry: (entry["user_id"], entry["image_id"]))
    items: dict[bool, list[Item]] = {True: [], False: []}
    for entry in entries:
        image = folder / "small_images" / f"{entry['image_id']}.jpg"
        labels = tuple(entry["labels"])
        items[entry["partition"] == "train"].append(Item(image, entry["user_id"], -1, labels))
    return items[True], items[False]


def choose_users(items: Sequence[Item], n_users: int, per_device: int) -> list[Item]:
    """Images of the users with the most (ties by name); all of them for 0. ValueError where too few have enough."""
    count: dict[str, int] = {}
    for item in items:
        count[item.user] = count.get(item.user, 0) + 1
    least = max(3, int(np.ceil(2 * per_device / (1 - TEST_SHARE))))
    fit = sorted((user for user in count if count[user] >= least), key=lambda user: (-count[user], user))
    if len(fit) < max(n_users, 2):
        raise ValueError(f"{len(fit)} users have {least} images or more, {max(n_users, 2)} are needed")
    chosen = set(fit[: n_users or None])
    return [item for item in items if item.user in chosen]


def split_devices(items: Sequence[Item], shard: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whose each image is, on which device, and whether it is held out for the test.

    Args:
        items: in the order of their ids or times.
        shard: random, chrono (the prior half is older), or given (each item's own device).
        seed: of test set and random halves.

    Returns:
        user int64 (n,), device int64 (n,) = 2 user + half, test bool (n,).

    Raises:
        ValueError: "given" and a user without exactly two devices.
    """
    names, user = np.unique([item.user for item in items], return_inverse=True)
    device, test = np.zeros(len(items), dtype=np.int64), np.zeros(len(items), dtype=bool)
    rng = np.random.default_rng([seed, 21])
    for who in range(len(names)):
        rows = np.flatnonzero(user == who)
        held_out = rng.permutation(len(rows))[: round(TEST_SHARE * len(rows))]
        test[rows[held_out]] = True
        kept = np.delete(rows, held_out)
        if shard == "given":
            half = np.array([items[row].device for row in rows.tolist()])
            if set(half) != {0, 1} or len(set(half[np.isin(rows, kept)])) != 2:
                raise ValueError(f"user {names[who]}: shard 'given' needs two devices with images in training")
            device[rows] = 2 * who + half
            continue
        if shard == "random":
            kept = rng.permutation(kept)
        device[kept] = 2 * who
        device[kept[len(kept) // 2 :]] = 2 * who + 1
    return user.astype(np.int64), device, test


# ---- photos ----------------------------------------------------------------------------------------------------


def photo_bundle(
    items: Sequence[Item], background: Sequence[Item], s: Settings, seed: int, data_root: Path, fabric: Fabric
) -> FederatedBundle:
    """Decode (or embed) all images and cut users into devices; near-duplicates across a user's devices are removed.

    Without background images the background is empty, and a mitigation that needs it says so.
    """
    background = list(background)[: s.background or None]
    names = sorted({label for item in items for label in item.labels})
    cache = data_root / ".fl-linkability"
    x = decode([item.path for item in items], s.side, cache)
    bx = decode([item.path for item in background], s.side, cache) if background else x[:0]
    user, device, test = split_devices(items, s.shard, seed)
    keep = ~test & ~near_duplicates(x, user, device, test)
    features = embed(bx, s.pretrained, cache, fabric)  # the modes of mm-aug are found among them
    if s.model == "mobilenet-head":
        x, bx = embed(x, s.pretrained, cache, fabric), features
    y, by = (multi_hot(part, names) for part in (items, background))
    order = np.flatnonzero(keep)[np.argsort(device[keep], kind="stable")]
    dense = np.unique(device[order], return_inverse=True)[1]
    users = UserDataset(
        _rows(x, order), y[order], torch.from_numpy(user[order]), torch.from_numpy(dense), check_images=False
    )
    held = np.flatnonzero(test)
    user_test = (_rows(x, held), y[held], torch.from_numpy(user[held]))
    return FederatedBundle(s.dataset, users, user_test, user_test[:2], Background(bx, by, features), len(names))


def _rows(x: Tensor, rows: np.ndarray) -> Tensor:
    return x[torch.from_numpy(rows)]


def multi_hot(items: Sequence[Item], names: Sequence[str]) -> Tensor:
    """Labels as float32 (n, classes); labels that the users' images do not have are left out."""
    number = {name: i for i, name in enumerate(names)}
    y = torch.zeros(len(items), len(names))
    for row, item in enumerate(items):
        for label in item.labels:
            if label in number:
                y[row, number[label]] = 1
    return y


def decode(paths: Sequence[Path], side: int, cache: Path) -> Tensor:
    """Images at side x side (shorter edge resized, centre cropped), uint8 (n, 3, side, side), memory-mapped.

    Raises:
        FileNotFoundError: an image that is not there.
        ValueError: one that cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms import v2

    key = hashlib.sha256("\n".join([str(side), *map(str, paths)]).encode()).hexdigest()[:16]
    path, shape = cache / f"images-{key}.u8", (len(paths), 3, side, side)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        shrink = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side), v2.PILToTensor()])
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        images = np.memmap(temporary, np.uint8, "w+", shape=shape)
        with progress() as bar:
            for row in bar.track(range(len(paths)), description="decoding"):
                if not paths[row].is_file():
                    raise FileNotFoundError(f"{paths[row]}: no such image")
                try:
                    with Image.open(paths[row]) as image:
                        images[row] = shrink(image.convert("RGB")).numpy()
                except (UnidentifiedImageError, OSError) as error:
                    raise ValueError(f"{paths[row]}: cannot be decoded ({error})") from error
        images.flush()
        os.replace(temporary, path)
    return torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=shape))


def embed(images: Tensor, pretrained: bool, cache: Path, fabric: Fabric, batch_size: int = 256) -> Tensor:
    """Features of MobileNetV2 before its last layer, float32 (n, FEATURES), computed once and kept below the cache."""
    from fl_linkability.models.mobilenet import MobileNetV2

    if len(images) == 0:
        return torch.zeros(0, FEATURES)
    digest = hashlib.sha256(np.ascontiguousarray(images[:: max(1, len(images) // 1000)].numpy()).tobytes()).hexdigest()
    path = cache / f"features-{len(images)}-{int(pretrained)}-{digest[:16]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.manual_seed(0)
    model = MobileNetV2(1, pretrained).to(fabric.device).to(memory_format=torch.channels_last).eval()
    parts = []
    with torch.no_grad(), progress() as bar:
        for batch in bar.track(images.split(batch_size), description="embedding"):
            x = as_input(batch.to(fabric.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            with fabric.autocast():
                parts.append(model.embed(x).float().cpu())
    features = torch.cat(parts)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(features, temporary)
    os.replace(temporary, path)
    return features


def near_duplicates(images: Tensor, user: np.ndarray, device: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Images of a user's second device whose perceptual hash (8 x 8 means against their mean) the first one has."""
    hashes = np.concatenate([_hash(part) for part in images.split(512)])
    drop = np.zeros(len(images), dtype=bool)
    for who in np.unique(user):
        mine = (user == who) & ~test
        first = mine & (device == 2 * who)
        drop |= mine & ~first & np.isin(hashes, hashes[first])
    if drop.any():
        logger.warning("%d images that both devices of a user have were left out", drop.sum())
    return drop


def _hash(images: Tensor) -> np.ndarray:
    grey = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 8).flatten(1)
    bits = (grey > grey.mean(1, keepdim=True)).numpy()
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


# ---- FEMNIST ---------------------------------------------------------------------------------------------------


def load_femnist(folder: Path, s: Settings, seed: int) -> FederatedBundle:
    """LEAF's FEMNIST: every JSON below data/train with users and user_data; 28 x 28, white is 1, 62 classes.

    Raises:
        FileNotFoundError: no JSON file.
        ValueError: too few users with enough images.
    """
    paths = sorted((folder / "data" / "train").glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder / 'data' / 'train'}: no JSON of LEAF; see `fl-linkability data`")
    data: dict[str, Any] = {}
    for path in paths:
        data |= json.loads(path.read_text())["user_data"]
    items = [Item(Path(), name, -1, ("x",)) for name in sorted(data) for _ in data[name]["y"]]
    x = torch.from_numpy(np.array([p for name in sorted(data) for p in data[name]["x"]], np.float32))
    y = torch.from_numpy(np.array([c for name in sorted(data) for c in data[name]["y"]], np.int64))
    x = 1 - x.view(-1, 1, 28, 28)
    chosen = {item.user for item in choose_users(items, s.users, max(s.images_per_device, 1))}
    mine = np.array([item.user in chosen for item in items])
    rows = np.flatnonzero(mine)
    user, device, test = split_devices([items[row] for row in rows], s.shard, seed)
    kept = np.flatnonzero(~test)[np.argsort(device[~test], kind="stable")]
    order = rows[kept]
    users = UserDataset(
        x[order], y[order], torch.from_numpy(user[kept]), torch.from_numpy(device[kept]), check_images=False
    )
    held, others = rows[test], np.flatnonzero(~mine)
    if len(others) == 0:
        raise ValueError("femnist: all writers are users, none is left for the background; ask for fewer users")
    others = others[: s.background or None]
    return FederatedBundle(
        "femnist", users, (x[held], y[held], torch.from_numpy(user[test])), (x[held], y[held]),
        Background(x[others], y[others]), 62,
    )  # fmt: skip
