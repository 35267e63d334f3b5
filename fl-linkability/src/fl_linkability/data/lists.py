"""Lists of users' images, from your own table (users.csv) or FLAIR; which users are chosen, and their devices."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import ANONYMOUS, PRIOR, Background, FederatedBundle, Rows, UserDataset

TEST_SHARE = 0.2  # of each user's images (section 6)
ROLES = {"prior": PRIOR, "anonymous": ANONYMOUS}


@dataclass(frozen=True)
class Item:
    """One image: path, user, labels, and, if the list says so, device and role."""

    path: Path
    user: str
    labels: tuple[str, ...]
    device: str = ""
    role: int = -1


def read_table(path: Path, users: bool = True) -> list[Item]:
    """Your own table, UTF-8 CSV; image paths are relative to it, labels are joined by |.

    Args:
        path: users.csv: image_path,user_id,device_id,labels and, for shard "given", role (prior or anonymous).
        users: False for background.csv: image_path,labels; if it is missing, there are no background images.

    Raises:
        FileNotFoundError: no table.
        ValueError: another encoding, a missing column, no lines, a line that lacks a value, or an image that two
            devices of one user share.
    """
    needed = ["image_path", *(["user_id", "device_id"] if users else []), "labels"]
    if not path.is_file():
        if not users:
            return []
        raise FileNotFoundError(f"{path}: no such table; it needs {','.join(needed)}")
    items: list[Item] = []
    device_of: dict[tuple[str, str], str] = {}
    for number, line in _lines(path, needed):
        labels = tuple(filter(None, (label.strip() for label in line["labels"].split("|"))))
        lacking = [name for name in needed if not line[name]] + ([] if labels else ["labels"])
        if lacking:
            raise ValueError(f"{path} line {number}: {lacking[0]} is empty")
        user, device, role = (line.get(name, "") for name in ("user_id", "device_id", "role"))
        if role and role not in ROLES:
            raise ValueError(f"{path} line {number}: role must be prior or anonymous, got {role!r}")
        other = device_of.setdefault((user, line["image_path"]), device)
        if other != device:
            raise ValueError(f"{path} line {number}: {line['image_path']} is already on device {other} of user {user}")
        items.append(Item(path.parent / line["image_path"], user, labels, device, ROLES.get(role, -1)))
    if not items:
        raise ValueError(f"{path}: no lines below the header")
    return items


def _lines(path: Path, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Number and cells of each line, without the spaces around them; a byte-order mark is skipped."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)} between commas; the first line is {','.join(header)!r}"
        )
    lines = []
    for number, row in enumerate(rows[1:], 2):
        cells = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
        if any(cells):
            lines.append((number, dict(zip(header, cells, strict=False))))
    return lines


def read_flair(folder: Path) -> tuple[list[Item], list[Item]]:
    """FLAIR: labels_and_metadata.json next to small_images/<image_id>.jpg; a user's images in the order of their ids.

    Returns:
        the images of users in partition train, and those of all other users as the background.

    Raises:
        FileNotFoundError: FLAIR is missing.
        ValueError: an entry that lacks a key.
    """
    path = folder / "labels_and_metadata.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: FLAIR is missing; see `fl-linkability data`")
    entries = json.loads(path.read_text())
    try:
        entries.sort(key=lambda entry: (entry["user_id"], _flickr_number(entry["image_id"]), entry["image_id"]))
        items: dict[bool, list[Item]] = {True: [], False: []}
        for entry in entries:
            image = folder / "small_images" / f"{entry['image_id']}.jpg"
            items[entry["partition"] == "train"].append(Item(image, entry["user_id"], tuple(entry["labels"])))
    except KeyError as error:
        raise ValueError(f"{path}: an entry has no {error}") from error
    return items[True], items[False]


def _flickr_number(image_id: str) -> int:
    """Flickr's photo numbers increase and get longer: 987654321 is older than 14913474848."""
    return int(image_id) if image_id.isdigit() else 0


def choose_users(items: Sequence[Item], n_users: int, per_device: int) -> list[Item]:
    """Images of the users with the most images (ties by name); 0: all users. ValueError if too few have enough."""
    chosen = most_active(Counter(item.user for item in items), n_users, per_device)
    return [item for item in items if item.user in chosen]


def most_active(count: dict[str, int], n_users: int, per_device: int, what: str = "images") -> set[str]:
    """The most active users with enough images for two devices and the test: n_users of them, or all if 0."""
    least = max(3, int(np.ceil(2 * per_device / (1 - TEST_SHARE))))
    fit = sorted((user for user in count if count[user] >= least), key=lambda user: (-count[user], user))
    if len(fit) < max(n_users, 2):
        raise ValueError(f"{len(fit)} users have {least} {what} or more, {max(n_users, 2)} are needed")
    return set(fit[: n_users or None])


@dataclass(frozen=True)
class Devices:
    """For each image: user int64 (n,), device int64 (n,), role int64 (n,), and whether it is held out, bool (n,)."""

    user: np.ndarray
    device: np.ndarray
    role: np.ndarray
    test: np.ndarray


def split_devices(items: Sequence[Item], shard: str, seed: int) -> Devices:
    """For each image: its user, device and role, and whether it is held out for the test.

    Args:
        items: in chronological order.
        shard: random, chrono (the prior half is older), or given (devices and roles from the list).
        seed: for the test set and random halves.

    Raises:
        ValueError: shard "given", and a user lacks a prior or anonymous device, or a device has no training images.
    """
    names, user = np.unique([item.user for item in items], return_inverse=True)
    device, role, test = (np.zeros(len(items), dtype=kind) for kind in (np.int64, np.int64, bool))
    rng, count = np.random.default_rng([seed, 21]), 0
    for who, name in enumerate(names):
        rows = np.flatnonzero(user == who)
        held_out = rng.permutation(len(rows))[: round(TEST_SHARE * len(rows))]
        test[rows[held_out]] = True
        kept = np.delete(rows, held_out)
        if shard == "given":
            keys = [(items[row].role, items[row].device) for row in rows.tolist()]
            known = sorted(set(keys))
            in_training = {(items[row].role, items[row].device) for row in kept.tolist()}
            if {each for each, _ in in_training} != {PRIOR, ANONYMOUS} or len(in_training) < len(known):
                raise ValueError(
                    f"user {name}: shard 'given' needs a column role (prior: the device that the adversary knows, "
                    "anonymous: the others) and images of each device in training"
                )
            device[rows] = count + np.array([known.index(key) for key in keys])
            role[rows] = np.array([each for each, _ in keys])
            count += len(known)
            continue
        if shard == "random":
            kept = rng.permutation(kept)
        later = kept[len(kept) // 2 :]
        device[rows], device[later], role[later] = count, count + 1, ANONYMOUS
        count += 2
    return Devices(user.astype(np.int64), device, role, test)


def on_devices(
    name: str,
    part: Callable[[np.ndarray], tuple[Tensor | Rows, Tensor]],
    split: Devices,
    train: np.ndarray,
    held: np.ndarray,
    background: Background,
    n_classes: int,
    skipped: int = 0,
    vocabulary: int = 0,
) -> FederatedBundle:
    """The samples of a list as a federation; the held-out ones serve as both test sets.

    Args:
        name: of the data set.
        part: gives x and y of samples by row number.
        split: user and device of each sample.
        train: bool (n,), what the devices train on; a device without samples is dropped.
        held: bool (n,), the test samples.
        background: see `FederatedBundle`.
        n_classes: see `FederatedBundle`.
        skipped: see `FederatedBundle`.
        vocabulary: see `FederatedBundle`.
    """
    order = np.flatnonzero(train)[np.argsort(split.device[train], kind="stable")]
    dense = np.unique(split.device[order], return_inverse=True)[1]
    user, device, role = (torch.from_numpy(each) for each in (split.user[order], dense, split.role[order]))
    users = UserDataset(*part(order), user, device, role, check_images=False)
    rows = np.flatnonzero(held)
    test = part(rows)
    user_test = (*test, torch.from_numpy(split.user[rows]))
    return FederatedBundle(name, users, user_test, test, background, n_classes, skipped, vocabulary)
