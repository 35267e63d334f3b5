"""Commands that work on checkpoints, word images and data sets; heavy imports are inside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro


def default_data_root() -> Path:
    """DATA_ROOT, else ~/.cache/satrn."""
    return Path(os.environ.get("DATA_ROOT") or Path.home() / ".cache" / "satrn")


def loader_processes(workers: int) -> int:
    """The given number; -1: one per core, at most eight."""
    return min(8, os.cpu_count() or 1) if workers < 0 else workers


def read_characters(dictionary: Path | None) -> str | None:
    """Characters of an MMOCR dictionary file, if one is given."""
    from satrn.pretrained import read_dictionary

    return None if dictionary is None else read_dictionary(dictionary)


@dataclass
class Eval:
    """Evaluate a checkpoint of satrn or MMOCR on its test sets or on others; prints JSON."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint."""
    test_sets: tuple[str, ...] = ()
    """Sets below the data root; default: the checkpoint's, or the paper's seven for MMOCR's checkpoints."""
    protocol: str = "case-insensitive"
    """case-insensitive (the field's: letters and digits), case-sensitive (the same) or exact (every character)."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds evaluation/ (or test/, u14m/)."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    skip_broken: bool = False
    """Skip broken words (they are counted and named)."""

    def __call__(self) -> None:
        from satrn.measure import evaluate_checkpoint

        metrics, words = evaluate_checkpoint(
            self.checkpoint, self.data_root, self.device, self.test_sets, self.skip_broken, self.protocol,
            read_characters(self.dictionary),
        )  # fmt: skip
        print(json.dumps(metrics | ({"words": words} if words else {}), indent=2))


@dataclass
class McNemar:
    """McNemar's test of two checkpoints on the same words, by test set and over all: CSV on stdout."""

    first: tyro.conf.Positional[Path]
    """Checkpoint."""
    second: tyro.conf.Positional[Path]
    """Another."""
    test_sets: tuple[str, ...] = ()
    """Sets below the data root; default: the paper's seven."""
    protocol: str = "case-insensitive"
    """case-insensitive, case-sensitive or exact."""
    dictionary: Path | None = None
    """File with MMOCR checkpoints' characters, one per line; needed if their number does not identify them."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds evaluation/ (or test/, u14m/)."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    skip_broken: bool = False
    """Skip broken words (they are counted and named)."""

    def __call__(self) -> None:
        from satrn.measure import compare_checkpoints

        frame = compare_checkpoints(
            (self.first, self.second), self.data_root, self.device, self.test_sets, self.skip_broken, self.protocol,
            read_characters(self.dictionary),
        )  # fmt: skip
        print(frame.to_csv(index=False, float_format="%.6g"), end="")


@dataclass
class Read:
    """Read word images: file, text and confidence, one line each."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, one word each."""
    checkpoint: Path = Path("satrn.pt")
    """Checkpoint of satrn or MMOCR, or a folder of `satrn export` (read by ONNX Runtime)."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""
    beam: int = 1
    """Width of the beam; 1 is greedy."""
    attention: Path | None = None
    """Also write a PNG with the attention map of every character (greedy)."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.predict import read_images

        dictionary = read_characters(self.dictionary)
        words = read_images(self.images, self.checkpoint, self.beam, self.attention, self.device, dictionary)
        for image, (text, confidence) in zip(self.images, words, strict=True):
            print(f"{image}\t{text}\t{confidence:.4f}")


@dataclass
class RotateCurve:
    """Word accuracy by angle of a checkpoint on an LMDB of upright words: CSV on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of satrn or MMOCR."""
    words: tyro.conf.Positional[Path]
    """LMDB folder."""
    angles: tuple[float, ...] = tuple(range(0, 360, 30))
    """Degrees, anticlockwise."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""

    def __call__(self) -> None:
        from satrn.predict import rotation_frame

        dictionary = read_characters(self.dictionary)
        frame = rotation_frame(self.checkpoint, self.words, self.angles, self.device, dictionary)
        print(frame.to_csv(index=False), end="")


@dataclass
class Aspect:
    """A2DPE's r = |alpha| / |beta| of word images: file and r, one line each (figure 7)."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, one word each."""
    checkpoint: Path = Path("satrn.pt")
    """Checkpoint of satrn or MMOCR."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""

    def __call__(self) -> None:
        from satrn.predict import image_ratios

        ratios = image_ratios(self.images, self.checkpoint, read_characters(self.dictionary))
        for image, ratio in zip(self.images, ratios, strict=True):
            print(f"{image}\t{ratio:.4f}")


@dataclass
class Render:
    """Write an LMDB of rendered words (two-line words to train multi-line reading; scene words to read real ones)."""

    output: tyro.conf.Positional[Path]
    """New LMDB folder."""
    count: int = 10000
    """Words."""
    warp: str = "multi_line"
    """straight, rotate, curve, multi_line, upright_or_vertical or scene (as words cut from photographs)."""
    words: Path | None = None
    """Text file with one word per line, taken in turn (scene: in lower case, capitalised or in capitals); else random
    strings."""
    charset: str = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    """Characters of random strings."""
    word_lengths: tuple[int, int] = (4, 12)
    """Shortest and longest random string."""
    img_size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    seed: int = 0
    """Seed of words and pictures."""

    def __call__(self) -> None:
        from satrn.predict import render_lmdb

        written = render_lmdb(
            self.output, self.count, self.warp, self.words, self.charset, self.word_lengths, self.img_size, self.seed
        )
        print(f"{written} words in {self.output}")


@dataclass
class Export:
    """Write a checkpoint as two ONNX graphs, encoder.onnx and step.onnx."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of satrn or MMOCR."""
    output: Path = Path("onnx")
    """Folder."""
    dictionary: Path | None = None
    """File with an MMOCR checkpoint's characters, one per line; needed if their number does not identify them."""

    def __call__(self) -> None:
        from satrn.export import export_onnx
        from satrn.pretrained import load_pretrained

        model = load_pretrained(self.checkpoint, dictionary=read_characters(self.dictionary))
        print(*export_onnx(model, self.output), sep="\n")


@dataclass
class Data:
    """List which data are needed, where they are looked for, and what is there."""

    action: tyro.conf.Positional[Literal["list", "verify"]] = "list"
    """list; or verify, which decodes every word below the data root completely and names the broken ones."""
    data_root: Path = field(default_factory=default_data_root)
    """Folder to search."""
    tiny: Path | None = None
    """Write tiny archives in the layout of the real ones into this new folder, to show what a data root looks like."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from satrn.data.inventory import inventory, verify
        from shared_utils.logging import console

        if self.tiny:
            from satrn.data.tiny import write

            return write(self.tiny)
        if self.action == "verify":
            checked = verify(self.data_root)
            for name, (count, broken) in checked.items():
                print(f"{name}: {count:,} words, {len(broken)} broken")
            lines = [line for _, broken in checked.values() for line in broken]
            if lines:
                raise RuntimeError("\n".join([f"{len(lines)} broken words", *lines]))
            return None

        columns = ("data", "scale", "size", "licence", "found", "where", "if missing")
        grid = Grid(*columns, title=f"below {self.data_root}")
        for row in inventory(self.data_root):
            grid.add_row(*row)
        console().print(grid)
        return None
