"""Kinetics-10 and Mimetics-10 (section 4.4): the same ten actions with and without their usual scene.

Expected below the data root: kinetics/{train,val}.csv and mimetics/mimetics.csv in the Kinetics format (columns label,
youtube_id, time_start, time_end; seconds), videos next to them as <split>/<label>/<youtube_id>_<start>_<end>.mp4 with
six-digit seconds (Mimetics: <label>/...). Spaces in labels may be underscores, in the file and in folder names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from rebias.data.dataset import Reading
from rebias.data.images import broken_files, digest_of, loaded
from shared_utils.images import BrokenFile
from shared_utils.logging import get_logger

logger = get_logger("rebias")

CLASSES = (  # every fifth of the 50 alphabetically sorted classes of Mimetics
    "canoeing or kayaking",
    "climbing a rope",
    "driving car",
    "golf driving",
    "opening bottle",
    "playing piano",
    "playing volleyball",
    "shooting goal (soccer)",
    "surfing water",
    "writing",
)
FRAMES, SAMPLING_RATE, TARGET_FPS = 8, 8, 30
TEST_VIEWS = 10
MEAN, STD = 0.45, 0.225
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


class VideoFiles:
    """Labelled videos; in training one random clip each, in testing ten clips spread over time.

    A test set has TEST_VIEWS consecutive samples per video: sum their probabilities with `sum_views`.

    Args:
        paths: video files.
        labels: (n,) int64 labels of the videos.
        name: name in the run record.
        missing: names of annotated videos that were not found and are skipped.
        train: random clips, sizes, crops and flips; else views with the centre at 256 pixels.
        seed: seed of the random draws.
        device: device of the batches.
        reading: workers, and whether videos that cannot be decoded are dropped.

    Attributes:
        skipped: names of the videos that were dropped or are missing.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: Tensor,
        name: str,
        *,
        train: bool,
        seed: int = 0,
        device: torch.device | str = "cpu",
        reading: Reading = Reading(),  # noqa: B008  frozen
        missing: Sequence[str] = (),
    ):
        self.name, self.train, self.views = name, train, 1 if train else TEST_VIEWS
        self.seed, self.device, self.num_workers = seed, torch.device(device), reading.num_workers
        self.paths = paths
        broken = self.broken() if reading.skip_broken else {}
        kept = [number for number in range(len(paths)) if number not in broken]
        self.paths, self.labels = [paths[number] for number in kept], labels[kept].repeat_interleave(self.views)
        self.skipped = [*missing, *(paths[number].name for number in broken)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One normalised clip (3, 8, S, S) and its label."""
        return normalized(self.read(0, index)), int(self.labels[index])

    def to(self, device: torch.device | str) -> VideoFiles:
        """Set the device of the batches; returns itself."""
        self.device = torch.device(device)
        return self

    def read(self, epoch: int, index: int) -> Tensor:
        """One clip (3, 8, S, S) uint8, S = 224 in training and 256 in testing."""
        video, view = divmod(index, self.views)
        position = torch.rand(()).item() if self.train else view / self.views  # the last view ends before the video
        frames = read_clip(self.paths[video], position)  # (T, 3, H, W)
        if self.train:
            frames = F.resize(frames, [int(torch.randint(256, 321, ()))], antialias=True)
            top, left = (int(torch.randint(size - 224 + 1, ())) for size in frames.shape[-2:])
            frames = F.crop(frames, top, left, 224, 224)
            frames = frames.flip(-1) if torch.rand(()) < 0.5 else frames
        else:
            frames = F.center_crop(F.resize(frames, [256], antialias=True), [256, 256])
        return frames.transpose(0, 1)

    def broken(self) -> dict[int, str]:
        """Decode every video completely: see `broken_files`."""
        return broken_files(partial(read_clip, position=0.0), self.paths, self.num_workers)

    def batches(self, index_batches: Iterable[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """For every (B,) batch of indices: clips (B, 3, 8, S, S) on the device, targets (B,)."""
        for clips, index in loaded(self.read, self.seed, index_batches, epoch, self.num_workers, self.device):
            clips = clips.to(self.device, non_blocking=True, memory_format=torch.channels_last_3d)
            yield normalized(clips), self.labels[index].to(self.device, non_blocking=True)

    def sum_views(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(n * views, C) logits -> summed probabilities (n, C) and labels (n,)."""
        return logits.softmax(1).unflatten(0, (-1, self.views)).sum(1), self.labels[:: self.views]

    def record(self) -> dict:
        """Name, number of videos and checksum of names and labels, for the run record."""
        names, labels = [path.name for path in self.paths], self.labels[:: self.views]
        record = {"name": self.name, "videos": len(self.paths), "sha256": digest_of(names, labels)}
        return record | ({"skipped": self.skipped} if self.skipped else {})


def normalized(clips: Tensor) -> Tensor:
    """(..., 3, T, H, W) uint8 to the float32 that the networks take."""
    return clips.float().div_(255 * STD).sub_(MEAN / STD)


@lru_cache(maxsize=1)  # the ten views of a test video come one after the other
def decode(path: Path) -> tuple[list[np.ndarray], float]:
    """All frames (H, W, 3) uint8 of a video, and frames per second. BrokenFile if decoding fails."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or TARGET_FPS)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError) as error:
        raise BrokenFile(f"{path}: {error}; replace the video, or pass --skip-broken") from None
    if not frames:
        raise BrokenFile(f"{path}: contains no video frames; replace the video, or pass --skip-broken")
    return frames, fps


def read_clip(path: Path, position: float) -> Tensor:
    """Decode the clip of 8 frames, 8 apart at 30 frames a second, that starts at `position`.

    Args:
        path: any file that FFmpeg reads.
        position: 0 (first possible clip) .. 1 (last).

    Returns:
        (8, 3, H, W) uint8; the last frame is repeated if the video is too short.

    Raises:
        BrokenFile: the file cannot be decoded.
    """
    frames, fps = decode(path)
    length = FRAMES * SAMPLING_RATE * fps / TARGET_FPS
    start = max(len(frames) - length, 0) * position
    wanted = np.linspace(start, start + length - 1, FRAMES).clip(0, len(frames) - 1).astype(int)
    return torch.from_numpy(np.stack([frames[number] for number in wanted])).permute(0, 3, 1, 2)


def video_set(
    csv: Path,
    folder: Path,
    name: str,
    *,
    train: bool,
    reading: Reading = Reading(),  # noqa: B008  frozen
    **options: Any,
) -> VideoFiles:
    """The videos of the ten classes that an annotation file names.

    Raises:
        FileNotFoundError: no annotation file; or videos are missing and `reading.skip_missing` is False (if True, the
            log and the run record count and name them).
        ValueError: wrong columns, or no video of the ten classes.
    """
    if not csv.is_file():
        raise FileNotFoundError(f"{csv}: annotation file not found (columns {', '.join(COLUMNS)})")
    table = pd.read_csv(csv, skipinitialspace=True)
    if not set(COLUMNS) <= set(table.columns):
        raise ValueError(f"{csv}: needs the columns {', '.join(COLUMNS)}, has {', '.join(table.columns)}")
    table["label"] = table.label.str.replace("_", " ")
    table = table[table.label.isin(CLASSES)]
    if table.empty:
        raise ValueError(f"{csv}: names no video of the ten classes, such as {CLASSES[0]!r}")
    paths, labels, missing = [], [], []
    for row in table.itertuples():
        file = f"{row.youtube_id}_{int(row.time_start):06d}_{int(row.time_end):06d}.mp4"
        places = [folder / label / file for label in (row.label, row.label.replace(" ", "_"))]
        found = [place for place in places if place.is_file()]
        if found:
            paths.append(found[0])
            labels.append(CLASSES.index(row.label))
        else:
            missing.append(file)
    if missing:
        shown = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        message = f"{name}: {len(missing)} of {len(table)} videos are missing below {folder}: {shown}"
        if not reading.skip_missing or not paths:
            raise FileNotFoundError(f"{message}; fetch them, or pass --skip-missing")
        logger.warning(message)
    return VideoFiles(paths, torch.tensor(labels), name, train=train, reading=reading, missing=missing, **options)


def kinetics10(data_root: Path, train: bool, **options: Any) -> VideoFiles:
    """Kinetics' training or validation videos of the ten classes."""
    split, folder = "train" if train else "val", data_root / "kinetics"
    return video_set(folder / f"{split}.csv", folder / split, f"Kinetics-10 {split}", train=train, **options)


def mimetics10(data_root: Path, **options: Any) -> VideoFiles:
    """Mimetics' videos of the ten classes: 136 in its annotation file."""
    folder = data_root / "mimetics"
    return video_set(folder / "mimetics.csv", folder, "Mimetics-10", train=False, **options)
