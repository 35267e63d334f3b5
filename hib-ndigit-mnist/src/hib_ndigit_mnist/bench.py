"""Speed against the peer's way of computing the same loss, and the cost of all-pairs evaluation."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hib_ndigit_mnist.data import NDigitSet
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.experiments import PACKAGES, PROJECT
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.pair_nll import pair_nll
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import CHUNK, GRAPH_WARMUP, train
from shared_utils.benchmark import Timing, in_turn, report

BATCH, SAMPLES, DIM, IMAGES = 128, 8, 2, 10_000
EPS = 1e-6


def run(repeats: int, threads: int) -> None:
    """Measure everything into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report("hib-ndigit-mnist", _timings(device, repeats), PROJECT, PACKAGES, {"repeats": repeats})


def _timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    what = f"pair loss, forward + backward, B = {BATCH}, K = {SAMPLES}, all pairs"
    yield Timing(what, "index lists, as PCME", *pair_loss(device, repeats), target=">= 3")
    for method in ("mc", "quadrature"):
        seconds, megabytes = all_pairs(device.type, method)
        what = f"{IMAGES:,} x {IMAGES:,} match probabilities, {method}"
        yield Timing(what, None, [seconds], unit="s")
        yield Timing(f"{what}: memory", None, [megabytes], unit="MB", target="<= 1024")
    for models in (1, 12):
        target = ">= 3000" if device.type == "cuda" and models == 1 else ""
        what = f"training steps per second, LeNet, batch {BATCH}, {models} stacked"
        yield Timing(what, None, [steps_per_second(device.type, models)], unit="/ s", target=target)


def pair_loss(device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of ours and of PCME's way, in turn on the same inputs; values and gradients must agree."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, SAMPLES, DIM, generator=generator).to(device).requires_grad_()
    a, b = (torch.tensor(value, device=device, requires_grad=True) for value in (3.0, 2.0))
    labels = (torch.arange(BATCH) % 70).to(device)
    as_list = labels.tolist()
    first, second = torch.triu_indices(BATCH, BATCH, 1, device=device)
    match = labels[first] == labels[second]

    def ours() -> tuple[Tensor, ...]:
        return _gradients(pair_nll(z, first, second, match, a, b, "log_mean", EPS).mean(), (z, a, b))

    def peer() -> tuple[Tensor, ...]:
        return _gradients(index_list_loss(z, as_list, a, b), (z, a, b))

    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    return in_turn(ours, peer, repeats, device)


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
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
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

    def stamp(*_: object) -> list:
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return []

    training = Training(steps=warm + steps)
    train(data, [training] * models, range(models), device=device, visit_at=[warm, warm + steps], visit=stamp)
    return steps / (stamps[1] - stamps[0])


def _gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs)
