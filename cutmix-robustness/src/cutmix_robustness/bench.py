"""Speed in one process, contenders in turn on inputs of the same shape: ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from rich.table import Table as Grid
from torch import Tensor

from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from cutmix_robustness.cutmix import CutMix
from cutmix_robustness.data.sources import ResidentImages, generator_for
from cutmix_robustness.networks import Classifier, pyramidnet
from cutmix_robustness.recipe import Recipe
from cutmix_robustness.settings import PRESETS
from cutmix_robustness.train import build_optimizer, make_fabric
from shared_utils.logging import console

IMAGECORRUPTIONS_MS = {  # version 1.1.2, ms per 224 x 224 image, severity 3, one thread; recorded on another machine
    "gaussian_noise": 3.40, "shot_noise": 12.88, "impulse_noise": 5.58, "defocus_blur": 4.62, "glass_blur": 939.12,
    "motion_blur": 5.07, "zoom_blur": 60.23, "snow": 7.26, "frost": 4.88, "fog": 2.57, "brightness": 27.36,
    "contrast": 1.77, "elastic_transform": 11.75, "pixelate": 0.29, "jpeg_compression": 0.46,
    "speckle_noise": 2.99, "gaussian_blur": 2.53, "spatter": 4.94, "saturate": 19.05,
}  # fmt: skip


def run(repeats: int, threads: int) -> None:
    """Print mixing, corruptions and training, one table each."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    grid = Grid("what", "ours (ms)", "other (ms)", "ratio: median (min .. max)", "target", title=name)
    for what, ours, other, target in (*_mixing(), *_training(device)):
        times = _in_turn(ours, other, repeats, device)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        grid.add_row(what, *(f"{1e3 * statistics.median(each):.2f}" for each in times), spread, target)
    console().print(grid)
    console().print(_corruptions(device))


def _in_turn(ours: Callable, other: Callable, repeats: int, device: torch.device) -> tuple[list[float], list[float]]:
    for work in (ours, other):
        work()
    pairs = [(_timed(ours, device), _timed(other, device)) for _ in range(repeats)]
    return tuple(map(list, zip(*pairs, strict=True)))


def _timed(work: Callable, device: torch.device, calls: int = 5) -> float:
    """Seconds per call: of the wall on CUDA, of the processor on a CPU, where other programs may be running."""
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        work()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - start) / calls


def _mixing() -> Iterator[tuple[str, Callable, Callable, str]]:
    """Per-sample CutMix against the peers; ours is checked to give each label the weight of its pixels."""
    import timm.data.mixup
    from torchvision.transforms import v2

    small, large = torch.rand(128, 3, 32, 32), torch.rand(32, 3, 224, 224)
    small_labels, large_labels = torch.randint(100, (128,)), torch.randint(1000, (32,))
    ours = CutMix(mode="sample", generator=generator_for(0))
    for images, labels in ((small, small_labels), (large, large_labels)):
        batch = ours(images, labels)
        changed = (batch.images != images).any(1).flatten(1).double().mean(1)
        other = batch.perm != torch.arange(len(images))
        torch.testing.assert_close(1 - batch.lam[other].double(), changed[other], rtol=0, atol=1e-6)
    elem = timm.data.mixup.Mixup(mixup_alpha=0, cutmix_alpha=1.0, mode="elem", num_classes=100)
    per_batch = v2.CutMix(num_classes=1000)
    yield (
        "CutMix per sample, 128 x 3 x 32 x 32: ours; timm elem",
        lambda: ours(small, small_labels),
        lambda: elem(small, small_labels),
        ">= 5",
    )
    yield (
        "CutMix per sample, 32 x 3 x 224 x 224: ours; torchvision v2 (per batch)",
        lambda: ours(large, large_labels),
        lambda: per_batch(large, large_labels),
        ">= 3",
    )
    whole = CutMix(generator=generator_for(0))
    yield (
        "CutMix per batch, 32 x 3 x 224 x 224: ours; torchvision v2",
        lambda: whole(large, large_labels),
        lambda: per_batch(large, large_labels),
        "",
    )


def _training(device: torch.device) -> Iterator[tuple[str, Callable, Callable, str]]:
    """A CutMix step against a baseline step; on CUDA also PyramidNet-200 as trained here against plain eager fp32."""
    size = (200, 240) if device.type == "cuda" else (110, 64)
    batch = 64 if device.type == "cuda" else 8
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(100, (batch,), device=device)
    data = ResidentImages(images, labels, "bench", device=device)
    mixed = _step(data, "cutmix", size, device.type, "auto", compile=False)
    plain = _step(data, "none", size, device.type, "auto", compile=False)
    yield f"training step, PyramidNet-{size[0]}, batch {batch}: baseline; with CutMix", plain, mixed, "<= 1.01"
    if device.type == "cuda":
        ours = _step(data, "cutmix", size, "cuda", "auto", compile=True)
        eager = _step(data, "cutmix", size, "cuda", "32-true", compile=False, channels_last=False)
        yield "training step, PyramidNet-200: bf16, channels_last, compile; fp32 eager", ours, eager, ">= 2"


def _step(
    data: ResidentImages,
    mix: str,
    size: tuple[int, int],
    device: str,
    precision: str,
    compile: bool,
    channels_last: bool = True,
) -> Callable[[], Tensor]:
    settings = replace(PRESETS["cifar100"], mix=mix)
    fabric = make_fabric(device, precision)
    model = Classifier(pyramidnet(*size), (0.5,) * 3, (0.25,) * 3).to(fabric.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        model.compile()
    wrapped, optimizer = fabric.setup(model, build_optimizer(settings, model))
    recipe = Recipe(settings, model, wrapped)

    def step() -> Tensor:
        loss, _ = recipe.loss(data.images, data.labels, (0, 0, 0))
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        return loss

    return step


def _corruptions(device: torch.device) -> Grid:
    """Milliseconds per image; imagecorruptions no longer imports, its figures are quoted as recorded."""
    grid = Grid(
        "corruption", "ours (ms / image)", "imagecorruptions 1.1.2, recorded", "ratio", title="224 x 224, severity 3"
    )
    images = torch.randint(256, (16, 3, 224, 224), dtype=torch.uint8, device=device)
    spent = {}
    for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):

        def work(name: str = name) -> Tensor:
            return corrupt(images, name, 3, "imagenet", generator=generator_for(0))

        work()
        spent[name] = 1e3 * min(_timed(work, device, calls=1) for _ in range(3)) / len(images)
    for name, milliseconds in spent.items():
        recorded = IMAGECORRUPTIONS_MS[name]
        grid.add_row(name, f"{milliseconds:.2f}", f"{recorded:.2f}", f"{recorded / milliseconds:.1f}")
    ours, theirs = (sum(each[name] for name in CORRUPTIONS) for each in (spent, IMAGECORRUPTIONS_MS))
    grid.add_row("the 15 of mCE", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.1f}", style="bold")
    return grid
