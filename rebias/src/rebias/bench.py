"""Speed against the usual forms on the same inputs; equality is checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from rebias.data.biased import BiasedDigits, assign_bias, colourise
from rebias.experiments import PACKAGES, PROJECT, build_method
from rebias.independence import hsic, rbf_gram
from rebias.methods import Method
from rebias.models import SimpleConvNet
from rebias.settings import Settings
from rebias.tasks import Task
from rebias.train import make_fabric
from shared_utils.benchmark import Timing, in_turn, report, share_of_peak


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings = chain(
        _hsic(device, repeats), _steps(device, repeats), _reference(device, repeats), _colouring(device, repeats)
    )
    report("rebias", timings, PROJECT, PACKAGES, {"repeats": repeats})


def cubic_hsic(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The estimator as usually written, with matrix products: O(m^3)."""
    m = len(x)
    k, l = (rbf_gram(z, sigma) for z in (x, y))  # noqa: E741
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(m, 1, dtype=k.dtype, device=k.device)
    product = (one.T @ k @ one) * (one.T @ l @ one) / ((m - 1) * (m - 2))
    total = torch.trace(k @ l) + product.squeeze() - 2 / (m - 2) * (one.T @ (k @ l) @ one).squeeze()
    return total / (m * (m - 3))


def _hsic(device: torch.device, repeats: int) -> Iterator[Timing]:
    for m, d in ((256, 128), (1024, 128)):
        x, y = (torch.randn(m, d, device=device, requires_grad=True) for _ in range(2))
        a, b = hsic(x, y, 8.0), cubic_hsic(x, y, 8.0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        ours, peer = (partial(_backward, estimator, x, y) for estimator in (hsic, cubic_hsic))
        times = in_turn(ours, peer, repeats, device)
        target = ">= 2" if m == 1024 else ""
        yield Timing(f"HSIC forward + backward, m = {m}, d = {d}", "the usual O(m^3) form", *times, target=target)


def _backward(estimator: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    estimator(x, y, 8.0).backward()


class _Task:
    """Networks of Biased MNIST at the paper's size."""

    seed, train = 0, range(60_000)
    memory_format = torch.channels_last

    def __init__(self, method: str, order: str, fabric: Fabric):
        self.settings, self.fabric = replace(Settings(), method=method, order=order, n_g_nets=1), fabric

    def networks(self) -> tuple[SimpleConvNet, list[SimpleConvNet]]:
        return SimpleConvNet(kernel_size=7), [SimpleConvNet(kernel_size=1)]


def _method(name: str, order: str, fabric: Fabric) -> Method:
    return build_method(cast(Task, _Task(name, order, fabric)))


def _steps(device: torch.device, repeats: int) -> Iterator[Timing]:
    fabric = make_fabric(device.type)
    batch = 256 if device.type == "cuda" else 32
    images = torch.rand(batch, 3, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    targets, index = torch.randint(10, (batch,), device=device), torch.arange(batch)
    vanilla = _method("vanilla", "g-first", fabric)
    for order, target in (("g-first", ">= 1/1.4"), ("f-first", "")):
        rebias = _method("rebias", order, fabric)
        ours, peer = (partial(method.step, images, targets, index) for method in (rebias, vanilla))
        times = in_turn(ours, peer, repeats, device)
        what, note = f"ReBias step, {order}, k = 7, batch {batch}", share_of_peak(ours, times[0], torch.bfloat16)
        yield Timing(what, "vanilla step", *times, target=target, note=note)


class ReferenceStep:
    """A step of clovaai/rebias's trainer, g first.

    Both updates run both networks with gradient, although each updates only one, and HSIC uses matrix products.
    """

    def __init__(self, f: nn.Module, g: nn.Module, settings: Settings, dtype: torch.dtype = torch.float32):
        self.f, self.g, self.dtype = f, g, dtype
        self.f_adam, self.g_adam = (
            torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
            for network in (f, g)
        )

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Parts of f's loss, named as in `ReBias.step`."""
        (g_logits, g_feat), (_, f_feat) = self._both(images)
        loss = F.cross_entropy(g_logits, targets) - cubic_hsic(g_feat, f_feat, 1.0)
        self.g_adam.zero_grad()
        loss.backward()
        self.g_adam.step()
        (g_logits, g_feat), (f_logits, f_feat) = self._both(images)
        classification, dependence = F.cross_entropy(f_logits, targets), cubic_hsic(f_feat, g_feat, 1.0)
        self.f_adam.zero_grad()
        (classification + dependence).backward()
        self.f_adam.step()
        return {"f_cross_entropy": classification.detach(), "f_hsic": dependence.detach()}

    def _both(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = [network(images) for network in (self.g, self.f)]
        return [(logits.float(), features.float()) for logits, features in found]


def _reference(device: torch.device, repeats: int) -> Iterator[Timing]:
    """The unchanged released loop (float32, no channels-last) and, on CUDA, its fastest form; ours as in training."""
    batch = 256 if device.type == "cuda" else 32
    images = torch.rand(batch, 3, 28, 28, device=device)
    targets, index = torch.randint(10, (batch,), device=device), torch.arange(batch)
    fast = images.contiguous(memory_format=torch.channels_last)
    method = _method("rebias", "g-first", make_fabric(device.type))
    ours = partial(method.step, fast, targets, index)
    what = f"ReBias step, g-first, k = 7, batch {batch}"
    reference = _reference_step(method, device, torch.float32)
    if device.type == "cpu":
        mine, theirs = ours(), reference(images, targets)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    times = in_turn(ours, partial(reference, images, targets), repeats, device)
    yield Timing(what, "the released trainer's step", *times, target=">= 1.2")
    if device.type == "cuda":
        best = _reference_step(method, device, torch.bfloat16)
        times = in_turn(ours, partial(best, fast, targets), repeats, device)
        yield Timing(what, "the same in bf16, channels-last", *times, target=">= 1.2")


def _reference_step(method: Method, device: torch.device, dtype: torch.dtype) -> ReferenceStep:
    """Start from the present weights of a method."""
    f, g = SimpleConvNet(kernel_size=7).to(device), SimpleConvNet(kernel_size=1).to(device)
    for network, name in ((f, "f"), (g, "g0")):
        network.load_state_dict(method.modules[name].state_dict())
        if dtype != torch.float32:
            network.to(memory_format=torch.channels_last)
    return ReferenceStep(f, g, Settings(), dtype)


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


def _colouring(device: torch.device, repeats: int) -> Iterator[Timing]:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 2, (2560, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (2560,), generator=generator)
    bias = assign_bias(labels, 0.99, generator=generator)
    resident = BiasedDigits(grey, labels, bias, "bench").to(device)
    loader = DataLoader(_PilImages(colourise(grey, bias), labels), batch_size=256)
    batches = torch.arange(2560).split(256)
    for (coloured, _), (other, _) in zip(resident.batches(batches), loader, strict=True):
        torch.testing.assert_close(coloured.cpu(), other, rtol=0, atol=1e-6)

    def ours() -> list[Tensor]:
        return [images for images, _ in resident.batches(batches)]

    times = in_turn(ours, lambda: [images.to(device) for images, _ in loader], repeats, device)
    yield Timing("2,560 coloured images in batches of 256", "a PIL image per sample", *times, target=">= 10")
    workers = DataLoader(loader.dataset, batch_size=256, num_workers=2, persistent_workers=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # wall time, which includes the workers' work
    times = in_turn(ours, lambda: [images.to(device) for images, _ in workers], repeats, device)
    torch.set_num_threads(threads)
    yield Timing("the same", "a loader with two workers", *times, target=">= 10", note="wall time, two threads")
