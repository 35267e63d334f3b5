"""Users' photos: decoded once to uint8 at the network's size, by several threads, into a memory map in the cache.

For a head on a frozen network, the photos' features are computed once and kept instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import ANONYMOUS, PRIOR, Background, FederatedBundle, Rows
from fl_linkability.data.lists import Item, choose_users, on_devices, read_flair, read_table, split_devices
from fl_linkability.data.reading import Reading, alone
from fl_linkability.settings import Settings
from fl_linkability.train import as_input
from shared_utils.files import whole_file
from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger, progress

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = get_logger("fl_linkability")
FEATURES = 1280
CHUNK = 256  # images between two saves


def load_photos(settings: Settings, seed: int, reading: Reading, fabric: Fabric) -> FederatedBundle:
    """FLAIR, or the table of images that the settings name.

    Raises:
        FileNotFoundError: the list or an image is missing.
        ValueError: an invalid list, or too few users.
        BrokenFile: an image that cannot be decoded, unless broken images are skipped.
    """
    folder = reading.root / settings.dataset
    if settings.dataset == "flair":
        items, background = read_flair(folder)
    else:
        items, background = read_table(folder / "users.csv"), read_table(folder / "background.csv", users=False)
    items = choose_users(items, settings.users, max(settings.images_per_device, 1))
    return photo_bundle(items, background[: settings.background or None], settings, seed, reading, fabric)


def photo_bundle(
    items: Sequence[Item], background: Sequence[Item], s: Settings, seed: int, reading: Reading, fabric: Fabric
) -> FederatedBundle:
    """Decode (or embed) all images and split users into devices; near-duplicates across a user's devices are removed.

    Without background images the background is empty, and a mitigation that needs it says so.
    """
    names = sorted({label for item in items for label in item.labels})
    x, broken = decode([item.path for item in items], s.side, reading)
    bx, background_broken = decode([item.path for item in background], s.side, reading)
    split = split_devices(items, s.shard, seed)
    whole = ~np.isin(np.arange(len(items)), broken)
    keep = whole & ~split.test
    images = Rows(x, torch.from_numpy(np.flatnonzero(keep)))
    keep[keep] = ~near_duplicates(images, split.user[keep], split.role[keep])
    features = embed(bx, s.pretrained, reading.cache, fabric)  # the modes of mm-aug are found among them
    if s.model == "mobilenet-head":
        x, bx = embed(x, s.pretrained, reading.cache, fabric), features
    y, by = (multi_hot(part, names) for part in (items, background))
    left = np.delete(np.arange(len(background)), background_broken)
    behind = Background(Rows(bx, torch.from_numpy(left)), by[left], features[left])
    return on_devices(
        s.dataset, lambda rows: (Rows(x, torch.from_numpy(rows)), y[rows]), split, keep, whole & split.test, behind,
        len(names), skipped=len(broken) + len(background_broken),
    )  # fmt: skip


def multi_hot(items: Sequence[Item], names: Sequence[str]) -> Tensor:
    """Labels as float32 (n, classes); labels that the users' images do not have are left out."""
    number = {name: i for i, name in enumerate(names)}
    y = torch.zeros(len(items), len(names))
    for row, item in enumerate(items):
        for label in item.labels:
            if label in number:
                y[row, number[label]] = 1
    return y


def decode(paths: Sequence[Path], side: int, reading: Reading) -> tuple[Tensor, np.ndarray]:
    """Images at side x side (shorter edge resized, centre cropped); what an interrupted call decoded is kept.

    Returns:
        uint8 (n, 3, side, side), memory-mapped, and int64 rows of images that could not be decoded (zeros).

    Raises:
        FileNotFoundError: missing images; all are checked before the first is decoded.
        BrokenFile: an image that cannot be decoded, unless `reading.skip_broken`.
    """
    shape = (len(paths), 3, side, side)
    if not paths:
        return torch.zeros(shape, dtype=torch.uint8), np.zeros(0, np.int64)
    key = hashlib.sha256("\n".join([str(side), *map(str, paths)]).encode()).hexdigest()[:16]
    images = reading.cache / f"images-{key}.u8"
    with alone(images):
        found = _Progress(images.with_suffix(".json"))
        if found.done < len(paths):
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]}: no such image ({len(missing)} of {len(paths)} are missing)")
            _decode_rest(
                paths, np.memmap(images, np.uint8, "r+" if images.exists() else "w+", shape=shape), found, reading
            )
    if found.broken and not reading.skip_broken:
        raise BrokenFile(found.broken[0][1])
    for _, reason in found.broken:
        logger.warning("left out: %s", reason)
    broken = np.array([row for row, _ in found.broken], dtype=np.int64)
    return torch.from_numpy(np.memmap(images, np.uint8, "r+", shape=shape)), broken


class _Progress:
    """How many images are decoded, and which are broken and why; saved after the images, by renaming."""

    def __init__(self, path: Path):
        self.path = path
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"done": 0, "broken": []}
        self.done: int = content["done"]
        self.broken: list[tuple[int, str]] = content["broken"]

    def save(self) -> None:
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps({"done": self.done, "broken": self.broken}))


def _decode_rest(paths: Sequence[Path], images: np.memmap, found: _Progress, reading: Reading) -> None:
    from torchvision.transforms import v2

    shrink = v2.Compose(
        [v2.Resize(images.shape[-1], antialias=True), v2.CenterCrop(images.shape[-1]), v2.PILToTensor()]
    )

    def one(row: int) -> tuple[int, str] | None:
        try:
            images[row] = shrink(read_image(paths[row])).numpy()
        except BrokenFile as error:
            return row, str(error)
        return None

    with ThreadPoolExecutor(reading.workers or os.cpu_count()) as pool, progress() as bar:
        task = bar.add_task("decoding", total=len(paths), completed=found.done)
        while found.done < len(paths):
            rows = range(found.done, min(found.done + CHUNK, len(paths)))
            broken = [each for each in pool.map(one, rows) if each]
            if broken and not reading.skip_broken:
                raise BrokenFile(broken[0][1])
            images.flush()
            found.broken += broken
            found.done = rows.stop
            found.save()
            bar.update(task, completed=found.done)


def embed(images: Tensor, pretrained: bool, cache: Path, fabric: Fabric, batch_size: int = 256) -> Tensor:
    """Features of MobileNetV2 before its last layer, float32 (n, FEATURES), computed once and kept in the cache."""
    from fl_linkability.models.mobilenet import MobileNetV2

    if len(images) == 0:
        return torch.zeros(0, FEATURES)
    digest = hashlib.sha256(np.ascontiguousarray(images[:: max(1, len(images) // 1000)].numpy()).tobytes()).hexdigest()
    path = cache / f"features-{len(images)}-{int(pretrained)}-{digest[:16]}.pt"
    with alone(path):
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
        with whole_file(path) as temporary:
            torch.save(features, temporary)
    return features


def near_duplicates(images: Tensor | Rows, user: np.ndarray, role: np.ndarray) -> np.ndarray:
    """Anonymous images that look like a prior image of the user: same perceptual hash (8 x 8 means), bool (n,)."""
    hashes = np.concatenate([_hash(part) for part in images.split(512)])
    drop = np.zeros(len(images), dtype=bool)
    for who in np.unique(user):
        mine = user == who
        drop |= mine & (role == ANONYMOUS) & np.isin(hashes, hashes[mine & (role == PRIOR)])
    if drop.any():
        logger.warning("%d anonymous images that are also on the user's prior device were left out", drop.sum())
    return drop


def _hash(images: Tensor) -> np.ndarray:
    grey = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 8).flatten(1)
    bits = (grey > grey.mean(1, keepdim=True)).numpy()
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]
