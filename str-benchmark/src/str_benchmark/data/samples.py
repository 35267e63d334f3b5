"""The interface of every store of word images, and whole batches of samples from any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from shared_utils.images import BrokenFile
from str_benchmark.data import images
from str_benchmark.data.filters import FilterReport, LabelFilter


class WordDataset(Dataset, ABC):
    """Samples of one store that a label filter keeps; items are (Pillow image, cleaned label).

    A store numbers its samples from 1; `indices` are the numbers of those kept, uint32, of `total`.

    Args:
        path: of the store.
        charset: preset or characters.
        case_sensitive: False lower-cases labels; None: as the charset says.
        max_length: longest label.
        filter: "report", "strip", "reference" or "off", see `LabelFilter`.
        channels: 1 (gray) or 3 (RGB).
        cleaning: further options of `LabelFilter`: columns, nfkd, drop_whitespace.
    """

    total: int
    indices: np.ndarray
    report: FilterReport

    def __init__(
        self,
        path: Path | str,
        charset: str = "36",
        case_sensitive: bool | None = None,
        max_length: int = 25,
        filter: str = "report",
        channels: int = 1,
        **cleaning: Any,
    ):
        self.path, self.channels = Path(path).resolve(), channels
        self.filter = LabelFilter(charset, case_sensitive, max_length, filter, **cleaning)

    @abstractmethod
    def key(self, index: int) -> str:
        """What the store calls a sample."""

    @abstractmethod
    def text(self, index: int) -> str:
        """The label of a sample as it was written."""

    @abstractmethod
    def encoded(self, index: int) -> bytes | memoryview | None:
        """The file of its image; None where it is missing."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the store's index or data file, for records."""

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, count: int) -> Self:
        """This data set with its first samples only."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.indices = self.indices[:count]
        return part

    def name(self, index: int) -> str:
        """Where a sample lies, for messages."""
        return f"{self.path} {self.key(index)}"

    def label(self, index: int) -> str:
        """The cleaned label of a sample."""
        return self.filter.clean(self.text(index))

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        """BrokenFile, naming store and key, if the image is missing or broken."""
        data = self.encoded(index)
        if data is None:
            raise BrokenFile(f"{self.name(index)}: missing; repair the data set, or pass --skip-broken")
        return images.decode(data, self.channels, self.name(index)), self.label(index)


class Decoded(NamedTuple):
    """Samples as they lie in their files."""

    pictures: list[Image.Image]
    labels: list[str]
    kept: list[int]
    """positions among the samples asked for"""
    broken: list[str]
    """messages of those left out"""


class Loaded(NamedTuple):
    """Samples as one batch."""

    pixels: Tensor
    """(n, C, H, W) uint8"""
    labels: list[str]
    broken: list[str]
    """messages of those left out"""


def decode_samples(samples: Sequence[tuple[WordDataset, int]], skip_broken: bool = False) -> Decoded:
    """Samples of any data sets, decoded.

    Raises:
        BrokenFile: naming the first broken image, unless skip_broken.
    """
    pictures, labels, kept, broken = [], [], [], []
    for position, (data, index) in enumerate(samples):
        try:
            picture, label = data[index]
        except BrokenFile as error:
            if not skip_broken:
                raise
            broken.append(str(error))
            continue
        pictures.append(picture)
        labels.append(label)
        kept.append(position)
    return Decoded(pictures, labels, kept, broken)


def load_samples(
    samples: Sequence[tuple[WordDataset, int]], size: tuple[int, int], pad: bool = False, skip_broken: bool = False
) -> Loaded:
    """Samples of any data sets, decoded and fitted to (H, W); BrokenFile as in `decode_samples`."""
    pictures, labels, _, broken = decode_samples(samples, skip_broken)
    pixels = images.stack(pictures, size, pad) if pictures else torch.empty(0, 1, *size, dtype=torch.uint8)
    return Loaded(pixels, labels, broken)
