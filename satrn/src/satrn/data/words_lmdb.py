"""Words in LMDBs of the STR benchmark's layout: keys image-%09d, label-%09d (from 1 on) and num-samples.

A set is one LMDB, or a folder of several such as the benchmark's training/MJ with MJ_train, MJ_valid and MJ_test.
"""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
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
from shared_utils.files import whole_file
from shared_utils.images import BrokenFile, read_image
from shared_utils.logging import get_logger, progress

logger = get_logger("satrn")
CHECKED_WORDS = 1000  # this many words of a set, evenly spaced, go into its checksum

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
    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False, subdir=True)
        pages, page = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
    except lmdb.Error as error:
        raise ValueError(f"{folder}: cannot be opened as an LMDB ({error})") from error
    if file.stat().st_size < pages * page:
        environment.close()
        raise ValueError(f"{folder}: truncated LMDB, expected {pages * page} bytes, found {file.stat().st_size}")
    _open[folder] = environment
    return environment


def lmdb_folders(folder: Path) -> list[Path]:
    """The LMDBs of a set, in sorted order: the folder itself, or all below it except hidden ones."""
    folder = Path(folder)
    if (folder / "data.mdb").is_file():
        return [folder]
    found: list[Path] = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [] if "data.mdb" in names else [name for name in folders if not name.startswith(".")]
        found += [Path(here)] if "data.mdb" in names else []
    return sorted(found)


def decode_image(content: bytes | Path, size: tuple[int, int], channels: int, name: str = "") -> Tensor:
    """An image to uint8 [C, H, W], resized bicubically without keeping the aspect ratio.

    Args:
        content: bytes of an image file, or its path.
        size: height and width.
        channels: 1 (gray) or 3 (RGB).
        name: name in messages.

    Raises:
        FileNotFoundError: no such file.
        BrokenFile: not a readable image.
    """
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    image = read_image(source, "L" if channels == 1 else "RGB", name)
    resized = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).copy()).view(*size, -1).permute(2, 0, 1)


def folds_case(charset: str) -> bool:
    """Whether labels are lower-cased for a charset: it has letters, and no capital among them."""
    return charset == charset.lower() != charset.upper()


class LmdbWords(Dataset):
    """Words of a set.

    Args:
        folder: an LMDB, or a folder of LMDBs.
        size: height and width of the images.
        channels: 1 (gray) or 3 (RGB).
        skip_broken: skip words that cannot be read (the log counts and names them); otherwise they are an error.

    Raises:
        FileNotFoundError: there is no LMDB.
        ValueError: an empty or truncated one.
    """

    def __init__(self, folder: Path, size: tuple[int, int], channels: int = 1, skip_broken: bool = False):
        self.folder, self.channels, self.skip_broken = Path(folder), channels, skip_broken
        self.size = size[0], size[1]
        self.name, self.parts = self.folder.name, lmdb_folders(self.folder)
        if not self.parts:
            raise FileNotFoundError(f"{self.folder}: is not an LMDB (no data.mdb here or in the folders below)")
        counts = []
        for part in self.parts:
            stored = _get(part, "num-samples")
            if not stored.isdigit() or int(stored) == 0:
                raise ValueError(f"{part}: empty LMDB (num-samples is {stored.decode(errors='replace')!r})")
            counts.append(int(stored))
        self.ends = list(accumulate(counts))
        self.broken = torch.zeros(self.ends[-1], dtype=torch.bool).share_memory_()  # loader processes write to it

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int) -> tuple[Path, str]:
        """LMDB of word `index` and its number there, as in keys."""
        part = bisect_right(self.ends, index)
        return self.parts[part], f"{index + 1 - (self.ends[part - 1] if part else 0):09d}"

    def label(self, index: int) -> str:
        """Label of word `index`, counted from 0. BrokenFile if it is not UTF-8."""
        part, number = self._place(index)
        content = _get(part, f"label-{number}")
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise BrokenFile(
                f"{part}: label-{number} is not UTF-8 ({content[:40]!r}); write labels as UTF-8, or pass --skip-broken"
            ) from None

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Image uint8 [C, H, W] and label of word `index`, counted from 0. BrokenFile for a broken one."""
        part, number = self._place(index)
        content = _get(part, f"image-{number}")
        return decode_image(content, self.size, self.channels, f"{part}: image-{number}"), self.label(index)

    def get(self, index: int) -> tuple[Tensor, str] | None:
        """Like indexing; with skip_broken, None for a broken word, which the log counts and names."""
        try:
            return self[index]
        except BrokenFile as error:
            if not self.skip_broken:
                raise
            self._skip(index, error)
            return None

    def _skip(self, index: int, error: BrokenFile) -> None:
        if not self.broken[index]:
            self.broken[index] = True
            logger.warning("skipped, %d broken so far: %s", int(self.broken.sum()), error)

    def usable(self, charset: str, max_length: int) -> np.ndarray:
        """Indices of words that can be trained on (known characters, 1 to max_length - 1 of them).

        Labels are lower-cased first if the charset has no capitals. The log counts what was left out. The list is
        cached next to the LMDB if that folder is writable.
        """
        files = [(file.st_size, file.st_mtime_ns) for file in ((part / "data.mdb").stat() for part in self.parts)]
        digest = hashlib.sha256(repr((sorted(charset), max_length, files)).encode()).hexdigest()[:12]
        kept = self.folder / f"satrn-usable-{digest}.npy"
        try:
            return np.load(kept)
        except FileNotFoundError:
            pass
        except (ValueError, EOFError, OSError):
            logger.warning("%s is damaged; the labels are read again", kept)
        found = self._read_labels(charset, max_length)
        if self.broken.any():
            return found  # not cached: the next run has to count them as well
        try:
            with whole_file(kept) as temporary, open(temporary, "wb") as open_file:
                np.save(open_file, found)
        except OSError:
            logger.info("%s cannot be written; its labels are read again next time", kept)
        return found

    def _read_labels(self, charset: str, max_length: int) -> np.ndarray:
        characters, fold, indices, unknown, length = set(charset), folds_case(charset), [], 0, 0
        with progress() as bar:
            for index in bar.track(range(len(self)), description=f"labels of {self.name}"):
                try:
                    label = self.label(index)
                except BrokenFile as error:
                    if not self.skip_broken:
                        raise
                    self._skip(index, error)
                    continue
                if not 0 < len(label) < max_length:
                    length += 1
                elif not characters.issuperset(label.lower() if fold else label):
                    unknown += 1
                else:
                    indices.append(index)
        logger.info(
            "%s: %d of %d words usable%s; %d with characters outside the charset, %d empty or too long",
            self.name, len(indices), len(self), ", lower-cased" if fold else "", unknown, length,
        )  # fmt: skip
        return np.array(indices, dtype=np.int64)

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """All words once: images uint8 [B, C, H, W] and labels; broken ones are skipped with skip_broken."""
        images, labels = [], []
        for index in range(len(self)):
            word = self.get(index)
            if word is not None:
                images.append(word[0])
                labels.append(word[1])
            if images and (len(images) == size or index == len(self) - 1):
                yield torch.stack(images), labels
                images, labels = [], []

    def checksum(self) -> str:
        """SHA-256 (16 digits) over size, labels and images of up to `CHECKED_WORDS` evenly spaced words."""
        digest = hashlib.sha256(repr(self.ends).encode())
        for index in np.unique(np.linspace(0, len(self) - 1, CHECKED_WORDS).astype(int)).tolist():
            part, number = self._place(index)
            digest.update(_get(part, f"label-{number}") + _get(part, f"image-{number}"))
        return digest.hexdigest()[:16]

    def identity(self) -> dict:
        """What identifies this set: name, size, checksum."""
        return {"name": self.name, "words": len(self), "sha256": self.checksum()}

    def record(self) -> dict:
        """For a run log: like `identity`, but counting the words that were read, with the number of skipped ones."""
        broken = int(self.broken.sum())
        return self.identity() | {"words": len(self) - broken} | ({"skipped": broken} if broken else {})


def _get(folder: Path, key: str) -> bytes:
    with _environment(str(folder)).begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise ValueError(f"{folder}: key {key!r} is missing")
    return value


class LmdbMixture(Dataset):
    """Training words of several sets, a fixed share of every batch from each.

    Args:
        folders: sets.
        s: settings (mix, img_size, in_channels, charset, max_length, batch_size).
        workers: loader processes.
        skip_broken: as for `LmdbWords`.

    Raises:
        ValueError: a set without usable words.
    """

    def __init__(self, folders: Sequence[Path], s: Settings, workers: int = 4, skip_broken: bool = False):
        self.sets = [LmdbWords(folder, s.img_size, s.in_channels, skip_broken) for folder in folders]
        self.indices = [words.usable(s.charset, s.max_length) for words in self.sets]
        for words, indices in zip(self.sets, self.indices, strict=True):
            if not len(indices):
                raise ValueError(f"{words.folder}: no usable words; do the labels fit the charset and max_length?")
        self.tokenizer, self.max_length, self.workers = Tokenizer(s.charset), s.max_length, workers
        self.fold = folds_case(s.charset)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, str]:
        """The word at (set, index); with skip_broken, a broken word is replaced by the set's next readable one."""
        number, index = place
        words, indices = self.sets[number], self.indices[number]
        for step in range(len(indices)):
            word = words.get(int(indices[(index + step) % len(indices)]))
            if word is not None:
                return word[0], word[1].lower() if self.fold else word[1]
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
            num_workers=self.workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )
        yield from loader

    def _collate(self, samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        targets = self.tokenizer.encode(labels, self.max_length, unknown="class")
        return torch.stack(images), F.pad(targets, (0, self.max_length - targets.shape[1]), value=IGNORED)

    def identity(self) -> dict:
        """What identifies these sets."""
        return {"sets": [words.identity() for words in self.sets]}

    def record(self) -> dict:
        """Names, sizes and checksums for a run log."""
        return {"sets": [words.record() | {"usable": len(i)} for words, i in zip(self.sets, self.indices, strict=True)]}


def write_lmdb(folder: Path, words: Iterable[tuple[Tensor, str]]) -> int:
    """Write words (uint8 [C, H, W] and label) as PNG into a new LMDB of this layout; returns their number.

    Raises:
        ValueError: the folder already holds an LMDB.
    """
    folder = Path(folder)
    if (folder / "data.mdb").exists():
        raise ValueError(f"{folder}: already holds an LMDB")
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
