"""Speed of decoding and training on the same inputs; equal tokens are checked first.

The first peer decodes as MMOCR does: at every one of 25 steps the whole decoder runs on all 26 positions, keys and
values of the encoder's tokens included. Only the decoding differs; encoder and weights are the same.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from satrn.charset import END
from satrn.config import preset
from satrn.decoding import greedy
from satrn.experiments import PACKAGES, PROJECT
from satrn.export import OnnxReader, export_onnx
from satrn.models import SATRN
from satrn.settings import PRESETS
from satrn.train import build_model, make_fabric, text_loss
from shared_utils.benchmark import Timing, in_turn, report

STEPS = 25
WORD_STEPS = 7  # a word of six characters and its end


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings: Iterator[Timing] = chain.from_iterable(_decoding(device, name, repeats) for name in ("mmocr", "paper"))
    packages: tuple[str, ...] = PACKAGES
    if device.type == "cuda":
        timings = chain(timings, _training_step(device, repeats))
    elif find_spec("onnx") and find_spec("onnxruntime"):
        timings, packages = chain(timings, _engines(repeats, threads)), (*PACKAGES, "onnx", "onnxruntime")
    report("satrn", timings, PROJECT, packages, {"repeats": repeats})


@torch.no_grad()
def recompute_everything(model: SATRN, memory: Tensor, hw: tuple[int, int], steps: int = STEPS) -> Tensor:
    """MMOCR's greedy decoding: the whole decoder on steps + 1 positions at every step; class numbers [B, steps]."""
    history = torch.full((len(memory), steps + 1), END, device=memory.device)
    history[:, 0] = model.cfg.classes
    for step in range(steps):
        history[:, step + 1] = model.decoder(history, memory, hw)[:, step].float().softmax(dim=-1).argmax(dim=-1)
    return history[:, 1:]


@torch.no_grad()
def _decoding(device: torch.device, variant: str, repeats: int) -> Iterator[Timing]:
    """6 + 6 layers, d = 256: the decoder alone at several batch sizes, then end to end and with early stop."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    cfg = preset("middle", enc_layers=6, variant=variant)
    model = SATRN(cfg).to(device).to(memory_format=torch.channels_last).eval()
    what, peer = f"{variant}, 6 + 6 layers, d 256, batch", "recompute everything, as MMOCR"

    def pictures(batch: int) -> Tensor:
        return (torch.rand(batch, 1, 32, 100, device=device) - 0.5).contiguous(memory_format=torch.channels_last)

    def cached(images: Tensor, steps: int = STEPS) -> Tensor:
        return greedy(model.decoder, model.encode(images), steps, early_stop=False)[0]

    def recomputed(images: Tensor) -> Tensor:
        encoded = model.encode(images)
        return recompute_everything(model, encoded.tokens, encoded.hw)

    usual = 64 if cuda else 4
    for batch in sorted((1, usual, 32)):
        ids = cached(images := pictures(batch))
        ended = (ids == END).long().cumsum(dim=1) > 0
        if not torch.equal(ids, recomputed(images).masked_fill(ended, END)):
            raise RuntimeError("cached and recomputed decoding read differently")
        encoded = model.encode(images)
        once = partial(greedy, model.decoder, encoded, STEPS, early_stop=False)
        again = partial(recompute_everything, model, encoded.tokens, encoded.hw)
        times = in_turn(once, again, repeats, device)
        yield Timing(f"decoder, {what} {batch}", peer, *times, target=">= 5")
    images = pictures(usual)
    # random weights never end a word: a stop after seven steps simulates words of six characters
    for part, steps, target in (
        ("end to end", STEPS, ">= 3"),
        (f"end to end, stopping after {WORD_STEPS} steps", WORD_STEPS, ">= 4.5"),
    ):
        times = in_turn(partial(cached, images, steps), partial(recomputed, images), repeats, device)
        yield Timing(f"{part}, {what} {usual}", peer, *times, target="" if cuda else target)


def _engines(repeats: int, threads: int) -> Iterator[Timing]:
    """SATRN-small end to end, words of six characters, against other ways to run the same network."""
    torch.manual_seed(0)
    model = SATRN(preset("small")).eval()
    compiled = copy.deepcopy(model)
    compiled.backbone.compile()
    if compiled.encoder is not None:
        compiled.encoder.compile()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder))
        peers: dict[str, SATRN | OnnxReader] = {"ONNX Runtime": OnnxReader(Path(folder), threads)}
    peers["torch.compile of the encoder"] = compiled
    for batch in (1, 32):
        images = torch.rand(batch, 1, 32, 100) - 0.5
        for name, peer in peers.items():
            if model.generate(images, WORD_STEPS).texts != peer.generate(images, WORD_STEPS).texts:
                raise RuntimeError(f"{name} reads differently")
            ours, theirs = (partial(each.generate, images, WORD_STEPS) for each in (model, peer))
            what = f"small, end to end, stopping after {WORD_STEPS} steps, batch {batch}, threads: {threads}"
            yield Timing(what, name, *in_turn(ours, theirs, repeats, torch.device("cpu")))


def _training_step(device: torch.device, repeats: int) -> Iterator[Timing]:
    """A training step of SATRN-small at batch 256, compiled against eager, both in bf16."""
    fabric = make_fabric(device.type)
    s = PRESETS["small"]
    images = torch.rand(s.batch_size, 1, *s.img_size, device=device) - 0.5
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(2, 96, (s.batch_size, s.max_length), device=device)

    def stepper(compiled: bool) -> Callable[[], None]:
        model = build_model(s, 0, fabric).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(model) if compiled else model

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = text_loss(forward(images, targets), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        return step

    times = in_turn(stepper(True), stepper(False), repeats, device)
    yield Timing(f"training step, small, bf16, batch {s.batch_size}: compiled", "eager", *times, target=">= 1.5")
