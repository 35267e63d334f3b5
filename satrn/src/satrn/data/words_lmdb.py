"""Words in LMDBs of the STR benchmark's layout: keys image-%09d, label-%09d (from 1 on) and num-samples."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from satrn.charset import IGNORED, Tokenizer
from satrn.data.streams import positions, share_counts
from satrn.settings import Settings
from shared_utils.logging import get_logger, progress

logger = get_logger("satrn")


_open: dict[str, lmdb.Environment] = {}


def close_environments() -> None:
    """Close every LMDB: none may be open in a process that forks."""
    while _open:
        _open.popitem()[1].close()


def _environment(folder: str) -> lmdb.Environment:
    """The one environment of a folder in this process: LMDB must not be opened twice.

    A file shorter than its last page would kill the process with SIGBUS when that page is read: it is refused.
    """
    if folder in _open:
        return _open[folder]
    file = Path(folder) / "data.mdb"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no LMDB here (data.mdb is missing)")
    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False, subdir=True)
        pages, page = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
    except lmdb.Error as error:
        raise ValueError(f"{folder}: cannot be opened as an LMDB ({error})") from error
    if file.stat().st_size < pages * page:
        environment.close()
        raise ValueError(f"{folder}: truncated LMDB, {pages * page} bytes expected, {file.stat().st_size} found")
    _open[folder] = environment
    return environment


def decode_image(content: bytes | Path, size: tuple[int, int], channels: int) -> Tensor:
    """An image file's content to uint8 [C, H, W], resized bicubically without keeping the ratio.

    Raises:
        ValueError: no readable image.
    """
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(source) as image:
            resized = image.convert("L" if channels == 1 else "RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"no readable image ({error})") from error
    return torch.from_numpy(np.asarray(resized).copy()).view(*size, -1).permute(2, 0, 1)


class LmdbWords(Dataset):
    """Words of one LMDB.

    Args:
        folder: with data.mdb.
        size: height and width of the images.
        channels: 1 (gray) or 3 (RGB).
        skip_broken: go on without broken images (counted and named in the log); else they are an error.
    """

    def __init__(self, folder: Path, size: tuple[int, int], channels: int = 1, skip_broken: bool = False):
        self.folder, self.channels, self.skip_broken = Path(folder), channels, skip_broken
        self.size = size[0], size[1]
        self.name, self.broken = self.folder.name, set[int]()
        stored = self._get("num-samples")
        if not stored.isdigit() or int(stored) == 0:
            raise ValueError(f"{self.folder}: empty LMDB (num-samples is {stored.decode(errors='replace')!r})")
        self.count = int(stored)

    def __len__(self) -> int:
        return self.count

    def _get(self, key: str) -> bytes:
        with _environment(str(self.folder)).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise ValueError(f"{self.folder}: key {key!r} is missing")
        return value

    def label(self, index: int) -> str:
        """Of word `index`, counted from 0."""
        return self._get(f"label-{index + 1:09d}").decode()

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Image uint8 [C, H, W] and label of word `index`, counted from 0. ValueError for a broken image."""
        try:
            image = decode_image(self._get(f"image-{index + 1:09d}"), self.size, self.channels)
        except ValueError as error:
            raise ValueError(f"{self.folder}: image-{index + 1:09d}: {error}") from error
        return image, self.label(index)

    def get(self, index: int) -> tuple[Tensor, str] | None:
        """As by index; with skip_broken None for a broken image, which is counted and named in the log."""
        try:
            return self[index]
        except ValueError as error:
            if not self.skip_broken:
                raise
            self.broken.add(index)
            logger.warning("skipped, %d broken so far: %s", len(self.broken), error)
            return None

    def usable(self, charset: str, max_length: int) -> np.ndarray:
        """Indices of words that can be trained on (known characters, 1 to max_length - 1 of them).

        What was left out is counted in the log. The list is kept beside the LMDB where that can be written.
        """
        file = (self.folder / "data.mdb").stat()
        identity = sorted(charset), max_length, file.st_size, file.st_mtime_ns
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
        kept = self.folder / f"satrn-usable-{digest}.npy"
        if kept.exists():
            return np.load(kept)
        characters, indices, unknown, length = set(charset), [], 0, 0
        with progress() as bar:
            for index in bar.track(range(self.count), description=f"labels of {self.name}"):
                label = self.label(index)
                if not 0 < len(label) < max_length:
                    length += 1
                elif not characters.issuperset(label):
                    unknown += 1
                else:
                    indices.append(index)
        logger.info(
            "%s: %d of %d words usable; %d with unknown characters, %d empty or too long",
            self.name, len(indices), self.count, unknown, length,
        )  # fmt: skip
        found = np.array(indices, dtype=np.int64)
        try:
            np.save(kept, found)
        except OSError:
            logger.info("%s cannot be written; its labels are read again next time", kept)
        return found

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """All words once: images uint8 [B, C, H, W] and labels; broken ones are left out with skip_broken."""
        images, labels = [], []
        for index in range(self.count):
            word = self.get(index)
            if word is not None:
                images.append(word[0])
                labels.append(word[1])
            if images and (len(images) == size or index == self.count - 1):
                yield torch.stack(images), labels
                images, labels = [], []

    def record(self) -> dict:
        """Name and size for a run log."""
        return {"name": self.name, "words": self.count}


class LmdbMixture(Dataset):
    """Training words of several LMDBs, a fixed share of every batch from each.

    Args:
        folders: LMDBs.
        s: settings (mix, img_size, in_channels, charset, max_length, batch_size).
        workers: loader processes.
        skip_broken: as for `LmdbWords`.

    Raises:
        ValueError: a set without a usable word.
    """

    def __init__(self, folders: Sequence[Path], s: Settings, workers: int = 4, skip_broken: bool = False):
        self.sets = [LmdbWords(folder, s.img_size, s.in_channels, skip_broken) for folder in folders]
        self.indices = [words.usable(s.charset, s.max_length) for words in self.sets]
        for words, indices in zip(self.sets, self.indices, strict=True):
            if not len(indices):
                raise ValueError(f"{words.folder}: no usable word; do the labels fit the charset and max_length?")
        self.tokenizer, self.max_length, self.workers = Tokenizer(s.charset), s.max_length, workers

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, str]:
        """The word at (set, index); with skip_broken the next whole one of that set in place of a broken one."""
        number, index = place
        words, indices = self.sets[number], self.indices[number]
        for step in range(len(indices)):
            word = words.get(int(indices[(index + step) % len(indices)]))
            if word is not None:
                return word
        raise ValueError(f"{words.folder}: every image is broken")

    def places(self, s: Settings, seed: int, step: int) -> list[tuple[int, int]]:
        """(set, index) of every word of a step's batch."""
        counts = share_counts(s.mix, s.batch_size)
        return [
            (number, int(index))
            for number, count in enumerate(counts)
            for index in positions(len(self.indices[number]), count, seed + number, step)
        ]

    def steps(self, s: Settings, seed: int, first: int, share: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 and targets [b, max_length] of this rank's share of every batch, from a step on."""
        close_environments()
        loader = DataLoader(
            self,
            batch_sampler=(self.places(s, seed, step)[share] for step in range(first, s.steps)),
            num_workers=min(self.workers, os.cpu_count() or 1),
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )
        yield from loader

    def _collate(self, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        targets = self.tokenizer.encode(labels, self.max_length, unknown="class")
        return torch.stack(images), F.pad(targets, (0, self.max_length - targets.shape[1]), value=IGNORED)

    def record(self) -> dict:
        """Names and sizes for a run log."""
        return {"sets": [words.record() | {"usable": len(i)} for words, i in zip(self.sets, self.indices, strict=True)]}


def write_lmdb(folder: Path, words: Iterable[tuple[Tensor, str]]) -> int:
    """Write words (uint8 [C, H, W] and label) as PNG into a new LMDB of this layout; returns how many.

    Raises:
        ValueError: there is an LMDB in the folder already.
    """
    folder = Path(folder)
    if (folder / "data.mdb").exists():
        raise ValueError(f"{folder}: holds an LMDB already")
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with lmdb.open(str(folder), map_size=1 << 40) as environment, environment.begin(write=True) as transaction:
        for count, (image, label) in enumerate(words, 1):
            content = io.BytesIO()
            pixels = image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, "PNG")
            transaction.put(f"image-{count:09d}".encode(), content.getvalue())
            transaction.put(f"label-{count:09d}".encode(), label.encode())
        transaction.put(b"num-samples", str(count).encode())
    return count
