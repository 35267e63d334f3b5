"""Speed against the plain composition of the reference's steps: same weights and images, equality checked, in turn."""

from __future__ import annotations

import io
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table as Grid
from torch import Tensor

from shared_utils.logging import console
from str_benchmark.charset import PRESETS
from str_benchmark.data.images import to_input
from str_benchmark.data.lmdb_store import LMDBDataset, load_samples, write_lmdb
from str_benchmark.models import Recognizer, build_model
from str_benchmark.models.attention import Attention
from str_benchmark.models.inference import for_inference
from str_benchmark.render import random_words, render_words

WORDS = 600
LABELS = 1_000_000
PAPER_LABELS = 14_400_000
Comparison = tuple[str, Callable[[], object], Callable[[], object], str]


def run(repeats: int, threads: int) -> None:
    """Print one line per comparison."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    columns = ("what", "ours (ms)", "plain (ms)", "ratio: median (min .. max)", "target")
    grid = Grid(*columns, title=f"str-benchmark bench, {name}")
    with tempfile.TemporaryDirectory() as folder:
        for part in (_loader(Path(folder)), _recognizer(device), _decoder(device), _start_up(Path(folder))):
            for what, ours, plain, target in part:
                times = _in_turn(ours, plain, repeats, device)
                ratios = [b / a for a, b in zip(*times, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
                grid.add_row(what, *(f"{1e3 * statistics.median(t):.1f}" for t in times), spread, target)
    console().print(grid)


def _in_turn(ours: Callable, plain: Callable, repeats: int, device: torch.device) -> tuple[list[float], list[float]]:
    def timed(work: Callable) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        for work in (ours, plain):
            work()
        pairs = [(timed(ours), timed(plain)) for _ in range(repeats)]
    return tuple(map(list, zip(*pairs, strict=True)))


# ---- loader ----------------------------------------------------------------


def _jpegs() -> Iterator[tuple[bytes, str]]:
    """Gray and colour JPEGs of words, about 31 pixels high."""
    words = random_words(WORDS, PRESETS["36"], (3, 9), np.random.default_rng(0))
    for number, (image, word) in enumerate(zip(*render_words(words, 0, warp="perspective"), strict=True)):
        picture = Image.fromarray(image)
        picture = picture.resize((31 * picture.width // picture.height, 31), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        (picture.convert("RGB") if number % 2 else picture).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue(), word


def plain_batch(environment: lmdb.Environment, numbers: range) -> tuple[Tensor, list[str]]:
    """A transaction per sample, Pillow, one float tensor per image, concatenated."""
    images, labels = [], []
    for number in numbers:
        with environment.begin(write=False) as transaction:
            labels.append(transaction.get(b"label-%09d" % number).decode("utf-8"))
            buffer = io.BytesIO(transaction.get(b"image-%09d" % number))
            images.append(Image.open(buffer).convert("L"))
    tensors = []
    for image in images:
        pixels = np.array(image.resize((100, 32), Image.Resampling.BICUBIC))
        tensors.append(torch.from_numpy(pixels)[None].float().div(255).sub_(0.5).div_(0.5)[None])
    return torch.cat(tensors), labels


def _loader(folder: Path) -> Iterator[Comparison]:
    write_lmdb(_jpegs(), folder / "jpeg")
    data = LMDBDataset(folder / "jpeg")
    copy = folder / "copy"  # the library refuses to open one folder twice
    copy.mkdir()
    shutil.copy(folder / "jpeg" / "data.mdb", copy / "data.mdb")
    environment = lmdb.open(str(copy), readonly=True, lock=False, readahead=False, meminit=False)
    samples, numbers = [(data, index) for index in range(WORDS)], range(1, WORDS + 1)

    def ours() -> tuple[Tensor, list[str]]:
        loaded = load_samples(samples, (32, 100))
        return to_input(loaded.pixels), loaded.labels

    (a, labels), (b, others) = ours(), plain_batch(environment, numbers)
    if not torch.equal(a, b) or labels != others:
        raise RuntimeError("the loaders differ")
    yield (
        f"read, decode, resize and normalise {WORDS} JPEG words",
        ours,
        lambda: plain_batch(environment, numbers),
        ">= 1.5",
    )


# ---- recognizer ------------------------------------------------------------


def plain_attention(head: Attention, columns: Tensor) -> Tensor:
    """Greedy attention as usually written: all projections and a one-hot vector at each of the steps."""
    cell, classes = head.attention_cell, head.generator.out_features
    hidden = columns.new_zeros(len(columns), head.hidden), columns.new_zeros(len(columns), head.hidden)
    characters, logits = torch.zeros(len(columns), dtype=torch.int64, device=columns.device), []
    for _ in range(head.steps):
        energies = cell.score(torch.tanh(cell.i2h(columns) + cell.h2h(hidden[0]).unsqueeze(1)))
        context = torch.bmm(F.softmax(energies, dim=1).permute(0, 2, 1), columns).squeeze(1)
        onehot = columns.new_zeros(len(columns), classes).scatter_(1, characters.unsqueeze(1), 1)
        hidden = cell.rnn(torch.cat([context, onehot], 1), hidden)
        logits.append(head.generator(hidden[0]))
        characters = logits[-1].argmax(1)
    return torch.stack(logits, 1)


def plain_recognizer(model: Recognizer, images: Tensor) -> Tensor:
    """The stages one after the other, unfolded, in the default memory layout."""
    columns = model.FeatureExtraction(model.Transformation(images)).permute(0, 3, 1, 2).mean(3)
    return plain_attention(model.Prediction, model.SequenceModeling(columns).contiguous())


def _recognizer(device: torch.device) -> Iterator[Comparison]:
    torch.manual_seed(0)
    model = build_model("TRBA").to(device).eval()
    fast = for_inference(model)
    for batch in (1, 8):
        images = torch.rand(batch, 1, 32, 100, device=device) * 2 - 1
        with torch.inference_mode():
            torch.testing.assert_close(fast(images), plain_recognizer(model, images), rtol=1e-3, atol=1e-3)
        target = ">= 1.3" if device.type == "cpu" else ">= 3 at batch 1"
        yield (
            f"TRBA, batch {batch}, all 26 steps",
            lambda images=images: fast(images),
            lambda images=images: plain_recognizer(model, images),
            target,
        )


# ---- decoder ---------------------------------------------------------------


def _taught_head(device: torch.device) -> tuple[Attention, Tensor, list[str]]:
    """TRBA's head, taught in seconds to say eight words of 3 to 9 characters, so that its words end."""
    torch.manual_seed(0)
    model = build_model("TRBA")
    head = model.Prediction.to(device)
    words = random_words(8, PRESETS["36"], (3, 9), np.random.default_rng(1))
    ids = model.tokenizer.encode(words, 9)[0].to(device)
    columns = torch.randn(8, 26, 256, device=device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(150):
        loss = F.cross_entropy(head(columns, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval(), columns, words


def _decoder(device: torch.device) -> Iterator[Comparison]:
    head, columns, words = _taught_head(device)
    singles = [columns[i : i + 1].contiguous() for i in range(len(columns))]
    with torch.inference_mode():
        plain = plain_attention(head, columns)
        torch.testing.assert_close(head(columns), plain, rtol=1e-3, atol=1e-3)
        for each, whole in zip(singles, plain, strict=True):
            short = head(each, early_stop=True)[0]
            torch.testing.assert_close(short, whole[: len(short)], rtol=1e-3, atol=1e-3)
    mean = sum(map(len, words)) / len(words)
    yield (
        f"attention decoder, batch 1, words of {mean:.1f} characters, stopping at [s]",
        lambda: [head(each, early_stop=True) for each in singles],
        lambda: [plain_attention(head, each) for each in singles],
        ">= 3",
    )
    yield (
        "attention decoder, batch 1, all 26 steps",
        lambda: [head(each) for each in singles],
        lambda: [plain_attention(head, each) for each in singles],
        "",
    )


# ---- start-up --------------------------------------------------------------


def plain_filter(folder: Path, charset: str) -> list[int]:
    """Every label read and tested at every start."""
    environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    kept = []
    with environment.begin(write=False) as transaction:
        for number in range(1, int(transaction.get(b"num-samples")) + 1):
            label = transaction.get(b"label-%09d" % number).decode("utf-8")
            if len(label) <= 25 and not re.search(f"[^{charset}]", label.lower()):
                kept.append(number)
    environment.close()
    return kept


def _start_up(folder: Path) -> Iterator[Comparison]:
    words = random_words(1000, PRESETS["36"] + "-!", (2, 9), np.random.default_rng(0))
    write_lmdb(((b"x", words[number % 1000]) for number in range(LABELS)), folder / "labels")
    copy = folder / "labels-copy"
    copy.mkdir()
    shutil.copy(folder / "labels" / "data.mdb", copy / "data.mdb")
    start = time.perf_counter()
    kept = LMDBDataset(folder / "labels").indices
    first = time.perf_counter() - start
    if kept.tolist() != plain_filter(copy, PRESETS["36"]):
        raise RuntimeError("the filters differ")
    scaled = PAPER_LABELS / LABELS
    start = time.perf_counter()
    LMDBDataset(folder / "labels")
    again = time.perf_counter() - start
    print(f"index of {LABELS:,} labels: {first:.2f} s once, {again:.4f} s after; for 14.4 M: {scaled * again:.2f} s")
    yield (
        f"start with {LABELS:,} labels, indexed",
        lambda: LMDBDataset(folder / "labels"),
        lambda: plain_filter(copy, PRESETS["36"]),
        ">= 20",
    )
