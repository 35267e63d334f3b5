"""Speed against the peer's way of computing the same loss, and the cost of all-pairs evaluation."""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from hib_ndigit_mnist.data import NDigitSet
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.experiments import PROJECT
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.pair_nll import pair_nll
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import CHUNK, GRAPH_WARMUP, train
from shared_utils.logging import console

BATCH, SAMPLES, DIM, IMAGES = 128, 8, 2, 10_000
EPS = 1e-6


def bench(repeats: int) -> None:
    """Measure, print, and write runs/bench.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    results = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"}
    table = Table("work", "ours", "peer", "ratio (min to max)", "to reach", title=f"medians of {repeats}, {device}")
    ours, peer = pair_loss(device, repeats)
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=True))
    results["pair loss"] = {"ours_ms": ours, "peer_ms": peer, "ratio": ratios}
    spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    name = f"pair loss, forward + backward, B = {BATCH}, K = {SAMPLES}, all pairs"
    table.add_row(name, f"{statistics.median(ours):.2f} ms", f"{statistics.median(peer):.2f} ms", spread, ">= 3")
    for method in ("mc", "quadrature"):
        seconds, megabytes = all_pairs(device, method)
        results[f"all pairs, {method}"] = {"seconds": seconds, "megabytes": megabytes}
        name = f"{IMAGES:,} x {IMAGES:,} match probabilities, {method}"
        table.add_row(name, f"{seconds:.1f} s, {megabytes:.0f} MB", "-", "-", "< 1 GB")
    for models in (1, 12):
        rate = steps_per_second(device, models)
        results[f"steps per second, {models} models"] = rate
        name = f"training steps per second, LeNet, batch {BATCH}, {models} stacked"
        goal = ">= 3,000 on a GPU" if models == 1 else ""
        table.add_row(name, f"{rate:,.1f} x {models} models", "-", "-", goal)
    path = PROJECT / "runs" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    console().print(table)


def pair_loss(device: str, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of ours and of PCME's way, in turn on the same inputs; values and gradients must agree."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, SAMPLES, DIM, generator=generator).to(device).requires_grad_()
    a, b = (torch.tensor(value, device=device, requires_grad=True) for value in (3.0, 2.0))
    labels = (torch.arange(BATCH) % 70).to(device)
    as_list = labels.tolist()
    first, second = torch.triu_indices(BATCH, BATCH, 1, device=device)
    match = labels[first] == labels[second]
    contenders = (
        lambda: pair_nll(z, first, second, match, a, b, "log_mean", EPS).mean(),
        lambda: index_list_loss(z, as_list, a, b),
    )
    values = [_gradients(each, (z, a, b)) for each in contenders]
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    times = ([], [])
    for _ in range(repeats):
        for each, record in zip(contenders, times, strict=True):
            record.append(_milliseconds(lambda each=each: _gradients(each, (z, a, b)), device))
    return times


def index_list_loss(z: Tensor, labels: list[int], a: Tensor, b: Tensor) -> Tensor:
    """As PCME does: both orders of each pair in Python lists, all K x K logits kept, log-sum-exp by autograd."""
    first, second, sign = [], [], []
    for i, label in enumerate(labels):
        for j, other in enumerate(labels):
            if i != j:
                first.append(i)
                second.append(j)
                sign.append(1.0 if label == other else -1.0)
    distance = ((z[first].unsqueeze(2) - z[second].unsqueeze(1)).square().sum(-1) + EPS).sqrt()
    logits = (b - a * distance).view(len(first), -1)  # (P, K K)
    log_right = F.logsigmoid(logits * torch.tensor(sign, device=z.device)[:, None])
    return -(log_right.logsumexp(1) - math.log(logits.shape[1])).mean()


def all_pairs(device: str, method: str) -> tuple[float, float]:
    """Seconds and extra megabytes of all match probabilities of 10,000 embeddings, a block of queries at a time."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 1, DIM)
    e = GaussianMixtureEmbedding(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) - 3)
    e, match = e.to(device), MatchProbability(2.0, 3.5).to(device)
    match.pairwise(e[:64], e[:64], SAMPLES, method, tolerance=1e-3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    total = 0.0
    for queries in range(0, IMAGES, 500):
        total += float(match.pairwise(e[queries : queries + 500], e, SAMPLES, method, tolerance=1e-3).sum())
    seconds = time.perf_counter() - start
    if device == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 2**20
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def steps_per_second(device: str, models: int) -> float:
    """Steps of the paper's network on two-digit images of noise, timed after warm-up."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(256, (2000, 28, 28), generator=generator, dtype=torch.uint8)
    data = NDigitSet(digits, torch.randint(2000, (7000, 2), generator=generator), torch.arange(7000) % 70)
    chunks = (4, 100) if device == "cuda" else (1, 2)
    warm = GRAPH_WARMUP + chunks[0] * CHUNK
    steps = chunks[1] * CHUNK // (1 if device == "cuda" else models)
    stamps: list[float] = []

    def stamp(*_) -> list:
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return []

    training = Training(steps=warm + steps)
    train(data, [training] * models, range(models), device=device, visit_at=[warm, warm + steps], visit=stamp)
    return steps / (stamps[1] - stamps[0])


def _gradients(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    value = loss()
    return value.detach(), *torch.autograd.grad(value, inputs)


def _milliseconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
