"""Speed in one process, contenders in turn on the same inputs, equality checked: ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.table import Table as Grid
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rebias.data.biased import BiasedDigits, assign_bias, colourise
from rebias.experiments import build_method
from rebias.hsic import hsic, rbf_gram
from rebias.models import SimpleConvNet
from rebias.settings import Settings
from rebias.train import make_fabric
from shared_utils.logging import console


def run(repeats: int, threads: int) -> None:
    """Print one line per comparison."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    grid = Grid(
        "what", "ours (ms)", "other (ms)", "ratio: median (min .. max)", "target", title=f"rebias bench, {name}"
    )
    for what, ours, other, target in (*_hsic(device), *_steps(device), *_colouring(device)):
        times = _in_turn(ours, other, repeats, device)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        grid.add_row(what, *(f"{1e3 * statistics.median(t):.1f}" for t in times), spread, target)
    console().print(grid)


def _in_turn(ours: Callable, other: Callable, repeats: int, device: torch.device) -> tuple[list[float], list[float]]:
    def timed(work: Callable) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for work in (ours, other):
        work()
    pairs = [(timed(ours), timed(other)) for _ in range(repeats)]
    return tuple(map(list, zip(*pairs, strict=True)))


def cubic_hsic(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The estimator as usually written, with matrix products: O(m^3)."""
    m = len(x)
    k, l = (rbf_gram(z, sigma) for z in (x, y))  # noqa: E741
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(m, 1, dtype=k.dtype, device=k.device)
    product = (one.T @ k @ one) * (one.T @ l @ one) / ((m - 1) * (m - 2))
    total = torch.trace(k @ l) + product.squeeze() - 2 / (m - 2) * (one.T @ (k @ l) @ one).squeeze()
    return total / (m * (m - 3))


def _hsic(device: torch.device):
    for m, d in ((256, 128), (1024, 128)):
        x, y = (torch.randn(m, d, device=device, requires_grad=True) for _ in range(2))
        a, b = hsic(x, y, 8.0), cubic_hsic(x, y, 8.0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        target = ">= 2" if m == 1024 else ""
        yield (
            f"HSIC forward + backward, m = {m}, d = {d}: O(m^2) against O(m^3)",
            lambda x=x, y=y: hsic(x, y, 8.0).backward(),
            lambda x=x, y=y: cubic_hsic(x, y, 8.0).backward(),
            target,
        )


class _Task:
    """Networks of Biased MNIST at the paper's size."""

    seed = 0
    memory_format = torch.channels_last

    def __init__(self, method: str, order: str, fabric):
        self.settings, self.fabric = replace(Settings(), method=method, order=order, n_g_nets=1), fabric

    def networks(self):
        return SimpleConvNet(kernel_size=7), [SimpleConvNet(kernel_size=1)]


def _steps(device: torch.device):
    fabric = make_fabric(device.type)
    batch = 256 if device.type == "cuda" else 32
    images = torch.rand(batch, 3, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (batch,), device=device)
    vanilla = build_method(_Task("vanilla", "g-first", fabric))
    for order, target in (("g-first", "<= 1.4"), ("f-first", "")):
        rebias = build_method(_Task("rebias", order, fabric))
        yield (
            f"step at k = 7, batch {batch}: vanilla; other: ReBias, {order}",
            lambda: vanilla.step(images, targets),
            lambda rebias=rebias: rebias.step(images, targets),
            target,
        )


class _PilImages(Dataset):
    """The usual way: one PIL image and its transforms per sample."""

    def __init__(self, rgb: Tensor, labels: Tensor):
        from torchvision.transforms import v2

        self.rgb, self.labels = rgb.numpy(), labels
        self.transform = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        return self.transform(Image.fromarray(self.rgb[index])), self.labels[index]


def _colouring(device: torch.device):
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 2, (2560, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (2560,), generator=generator)
    bias = assign_bias(labels, 0.99, generator=generator)
    resident = BiasedDigits(grey, labels, bias, "bench").to(device)
    loader = DataLoader(_PilImages(colourise(grey, bias), labels), batch_size=256)
    batches = torch.arange(2560).split(256)
    for (ours, _), (other, _) in zip(resident.batches(batches), loader, strict=True):
        torch.testing.assert_close(ours.cpu(), other, rtol=0, atol=1e-6)
    yield (
        "2,560 coloured images in batches of 256: on the device; other: PIL per image",
        lambda: [images for images, _ in resident.batches(batches)],
        lambda: [images.to(device) for images, _ in loader],
        ">= 10",
    )
