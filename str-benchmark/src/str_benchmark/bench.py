"""Speed against the plain composition of the reference's steps, ONNX Runtime and torch.compile; equality is checked."""

from __future__ import annotations

import io
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import cast

import lmdb
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared_utils.benchmark import Timing, in_turn, report
from str_benchmark.charset import PRESETS
from str_benchmark.data.images import to_input
from str_benchmark.data.lmdb_store import LMDBDataset, write_lmdb
from str_benchmark.data.samples import load_samples
from str_benchmark.experiments import PACKAGES, PROJECT
from str_benchmark.models import Recognizer, build_model
from str_benchmark.models.attention import Attention
from str_benchmark.models.inference import for_inference
from str_benchmark.render import random_words, render_words

PEERS = (*PACKAGES, "onnx", "onnxruntime")
WORDS = 600
LABELS = 1_000_000
CPU = torch.device("cpu")


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        timings = chain(
            _loader(Path(folder), repeats),
            _recognizer(device, repeats),
            _decoder(device, repeats),
            _start_up(Path(folder), repeats),
            _engines(device, repeats, threads),
        )
        report("str-benchmark", timings, PROJECT, PEERS, {"repeats": repeats})


def run_network(model: Recognizer, repeats: int, threads: int) -> None:
    """Print the speed of one network, ready for inference, against other ways to run it."""
    with tempfile.TemporaryDirectory() as folder:  # the project's own record is not touched
        report("str-benchmark", _network(model, repeats, threads), Path(folder), PACKAGES, {})


def _network(model: Recognizer, repeats: int, threads: int, compiled: bool = True) -> Iterator[Timing]:
    """Batches of 1 and 8: ready for inference, against ONNX Runtime, torch.compile and the network as loaded."""
    torch.set_num_threads(threads)
    config, device = model.config, model.device
    fast = for_inference(model)
    peers: dict[str, Callable[[Tensor], Tensor]] = {"the network as loaded": model}
    if compiled:
        peers["torch.compile"] = torch.compile(model)
    if device.type == "cpu" and find_spec("onnx") and find_spec("onnxruntime"):
        peers["ONNX Runtime"] = for_inference(model, "onnxruntime")
    for batch in (1, 8):
        images = torch.rand(batch, config.in_channels, *config.img_size, device=device) * 2 - 1
        size = f"{config.img_size[0]} x {config.img_size[1]}"
        what = f"{config.name}, {size}, batch {batch}, threads: {threads}"
        for name, peer in peers.items():
            with torch.inference_mode():
                ours, theirs = fast(images), peer(images)
                steps = 1 if config.pred == "Attn" else None  # after a near tie of the fed-back argmax they may diverge
                near = 1e-3 * max(1.0, float(theirs.abs().max()))
                torch.testing.assert_close(ours[:, :steps], theirs[:, :steps], rtol=1e-3, atol=near)
                yield Timing(what, name, *in_turn(partial(fast, images), partial(peer, images), repeats, device))


def _engines(device: torch.device, repeats: int, threads: int) -> Iterator[Timing]:
    """CRNN and TRBA with one thread and two; TRBA, with its 26 unrolled steps, is not compiled."""
    for number, name in itertools.product((1, 2), ("CRNN", "TRBA")):
        torch.manual_seed(0)
        yield from _network(build_model(name).to(device).eval(), repeats, number, compiled=name == "CRNN")
    torch.set_num_threads(threads)


def _compare(
    what: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    repeats: int,
    device: torch.device = CPU,
    target: str = "",
) -> Timing:
    with torch.inference_mode():
        return Timing(what, "the plain composition", *in_turn(ours, plain, repeats, device), target=target)


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
            labels.append(transaction.get(b"label-%09d" % number, b"").decode("utf-8"))
            buffer = io.BytesIO(transaction.get(b"image-%09d" % number, b""))
            images.append(Image.open(buffer).convert("L"))
    tensors = []
    for image in images:
        pixels = np.array(image.resize((100, 32), Image.Resampling.BICUBIC))
        tensors.append(torch.from_numpy(pixels)[None].float().div(255).sub_(0.5).div_(0.5)[None])
    return torch.cat(tensors), labels


def _loader(folder: Path, repeats: int) -> Iterator[Timing]:
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
    what = f"read, decode, resize and normalise {WORDS} JPEG words"
    yield _compare(what, ours, lambda: plain_batch(environment, numbers), repeats, target=">= 1.5")


# ---- recognizer ------------------------------------------------------------


def plain_attention(head: Attention, columns: Tensor) -> Tensor:
    """Greedy attention in its usual form: all projections and a one-hot vector at each of the steps."""
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
    return plain_attention(cast(Attention, model.Prediction), model.SequenceModeling(columns).contiguous())


def _recognizer(device: torch.device, repeats: int) -> Iterator[Timing]:
    torch.manual_seed(0)
    model = build_model("TRBA").to(device).eval()
    fast = for_inference(model)
    for batch in (1, 8):
        images = torch.rand(batch, 1, 32, 100, device=device) * 2 - 1
        with torch.inference_mode():
            torch.testing.assert_close(fast(images), plain_recognizer(model, images), rtol=1e-3, atol=1e-3)
        target = ">= 1.3" if device.type == "cpu" else ">= 3" if batch == 1 else ""
        yield _compare(
            f"TRBA, batch {batch}, all 26 steps",
            partial(fast, images),
            partial(plain_recognizer, model, images),
            repeats,
            device,
            target,
        )


# ---- decoder ---------------------------------------------------------------


def _taught_head(device: torch.device) -> tuple[Attention, Tensor, list[str]]:
    """TRBA's head, trained in seconds to output eight words of 3 to 9 characters, so that its words end."""
    torch.manual_seed(0)
    model = build_model("TRBA")
    head = cast(Attention, model.Prediction.to(device))
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


def _decoder(device: torch.device, repeats: int) -> Iterator[Timing]:
    head, columns, words = _taught_head(device)
    singles = [columns[i : i + 1].contiguous() for i in range(len(columns))]
    with torch.inference_mode():
        plain = plain_attention(head, columns)
        torch.testing.assert_close(head(columns), plain, rtol=1e-3, atol=1e-3)
        for each, whole in zip(singles, plain, strict=True):
            short = head(each, early_stop=True)[0]
            torch.testing.assert_close(short, whole[: len(short)], rtol=1e-3, atol=1e-3)
    mean = sum(map(len, words)) / len(words)
    yield _compare(
        f"attention decoder, batch 1, words of {mean:.1f} characters, stopping at [s]",
        lambda: [head(each, early_stop=True) for each in singles],
        lambda: [plain_attention(head, each) for each in singles],
        repeats,
        device,
        ">= 3",
    )
    yield _compare(
        "attention decoder, batch 1, all 26 steps",
        lambda: [head(each) for each in singles],
        lambda: [plain_attention(head, each) for each in singles],
        repeats,
        device,
    )


# ---- start-up --------------------------------------------------------------


def _start_up(folder: Path, repeats: int) -> Iterator[Timing]:
    words = random_words(1000, PRESETS["36"] + "-!", (2, 9), np.random.default_rng(0))
    write_lmdb(((b"x", words[number % 1000]) for number in range(LABELS)), folder / "labels")
    start = time.perf_counter()
    LMDBDataset(folder / "labels")
    first = time.perf_counter() - start
    yield Timing(f"index of {LABELS:,} labels, made once", None, [first], unit="s")
    again, _ = in_turn(lambda: LMDBDataset(folder / "labels"), None, repeats, CPU)
    yield Timing(f"start with {LABELS:,} labels, indexed", None, again)
