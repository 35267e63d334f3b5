"""Speed of mixing, training steps and corruptions against timm, torchvision, plain steps and imagecorruptions-imaug."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from cutmix_robustness.cutmix import CutMix
from cutmix_robustness.data.sources import ResidentImages
from cutmix_robustness.draws import generator_for
from cutmix_robustness.experiments import PACKAGES, PROJECT
from cutmix_robustness.networks import Classifier, pyramidnet
from cutmix_robustness.recipe import Recipe
from cutmix_robustness.settings import PRESETS
from cutmix_robustness.train import build_optimizer, make_fabric
from shared_utils.benchmark import Timing, in_turn, report
from shared_utils.logging import get_logger

logger = get_logger("cutmix-robustness")
PEER = "imagecorruptions-imaug"


def run(repeats: int, threads: int) -> None:
    """Measure mixing, training and corruptions into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixing, corruptions = (map(_who_wins, each) for each in (_mixing(repeats), _corruptions(device, repeats)))
    timings = chain(mixing, _training(device, repeats), corruptions)
    packages = (*PACKAGES, "timm", *([PEER] if _peer() else []))
    report("cutmix-robustness", timings, PROJECT, packages, {"repeats": repeats})


def _who_wins(timing: Timing) -> Timing:
    return replace(timing, note="the peer is faster") if timing.ratio and timing.ratio[0] < 1 else timing


def _mixing(repeats: int) -> Iterator[Timing]:
    """CutMix on the CPU against the peers; checks that ours weights each label by its pixels."""
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
    whole = CutMix(generator=generator_for(0))
    cpu = torch.device("cpu")
    times = in_turn(lambda: ours(small, small_labels), lambda: elem(small, small_labels), repeats, cpu)
    yield Timing("CutMix per sample, 128 x 3 x 32 x 32", "timm, elem", *times, target=">= 5")
    together = timm.data.mixup.Mixup(mixup_alpha=0, cutmix_alpha=1.0, mode="batch", num_classes=1000)
    times = in_turn(lambda: whole(large, large_labels), lambda: together(large.clone(), large_labels), repeats, cpu)
    yield Timing("CutMix per batch, 32 x 3 x 224 x 224", "timm, batch, on a copy", *times)
    times = in_turn(lambda: ours(large, large_labels), lambda: per_batch(large, large_labels), repeats, cpu)
    yield Timing("CutMix per sample, 32 x 3 x 224 x 224", "torchvision v2, per batch", *times, target=">= 3")
    times = in_turn(lambda: whole(large, large_labels), lambda: per_batch(large, large_labels), repeats, cpu)
    yield Timing("CutMix per batch, 32 x 3 x 224 x 224", "torchvision v2, per batch", *times)


def _training(device: torch.device, repeats: int) -> Iterator[Timing]:
    """A CutMix step against a baseline step; on CUDA also PyramidNet-200 as trained here against plain eager fp32."""
    size = (200, 240) if device.type == "cuda" else (110, 64)
    batch = 64 if device.type == "cuda" else 8
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(100, (batch,), device=device)
    data = ResidentImages(images, labels, "bench", device=device)
    mixed = _step(data, "cutmix", size, device.type, "auto", compile=False)
    plain = _step(data, "none", size, device.type, "auto", compile=False)
    what = f"training step with CutMix, PyramidNet-{size[0]}, batch {batch}"
    yield Timing(what, "baseline step", *in_turn(mixed, plain, repeats, device), target=">= 1/1.01")
    if device.type == "cuda":
        ours = _step(data, "cutmix", size, "cuda", "auto", compile=True)
        eager = _step(data, "cutmix", size, "cuda", "32-true", compile=False, channels_last=False)
        what = "training step, PyramidNet-200: bf16, channels_last, compile"
        yield Timing(what, "fp32, eager", *in_turn(ours, eager, repeats, device), target=">= 2")


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


def _corruptions(device: torch.device, repeats: int) -> Iterator[Timing]:
    """Milliseconds per image at severity 3, against the package image by image on one core; on smooth pictures."""
    peer = _peer()
    if peer is None:
        logger.warning(
            "imagecorruptions is missing, no corruption is timed: pip install --no-deps imagecorruptions-imaug"
        )
        return
    noise = torch.rand(16, 3, 14, 14, generator=generator_for(0))
    images = (255 * F.interpolate(noise, 224, mode="bicubic").clamp(0, 1)).byte().to(device)
    pictures = list(images[:4].permute(0, 2, 3, 1).cpu().contiguous().numpy())
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):

        def batched(name: str = name) -> Tensor:
            return corrupt(images, name, 3, "imagenet", generator=generator_for(0))

        def one_by_one(name: str = name) -> list:
            return [peer.corrupt(picture, corruption_name=name, severity=3) for picture in pictures]

        own, other = in_turn(batched, one_by_one, repeats, device)
        ours[name], theirs[name] = ([ms / n for ms in each] for each, n in ((own, len(images)), (other, len(pictures))))
        yield Timing(f"{name}, 224 x 224", PEER, ours[name], theirs[name], target=">= 1.5")
    all_ours, all_theirs = (
        [sum(each) for each in zip(*(times[name] for name in CORRUPTIONS), strict=True)] for times in (ours, theirs)
    )
    yield Timing("all 15 corruptions of mCE, 224 x 224", PEER, all_ours, all_theirs, target=">= 6")


def _peer() -> Any:
    return importlib.import_module("imagecorruptions") if importlib.util.find_spec("imagecorruptions") else None
