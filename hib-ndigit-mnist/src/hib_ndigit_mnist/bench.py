"""The public pair loss against other ways to compute it, and the cost of all-pairs evaluation.

All contenders score each pair of a batch once, matches and other pairs weighing half each, and compute the gradient of
samples, a and b. Peers that gather samples work in chunks of pairs, so that none is slow only because of its memory.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hib_ndigit_mnist.data import NDigitSet
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding, default_logvar
from hib_ndigit_mnist.experiments import PACKAGES, PROJECT
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.losses import VIBPairLoss
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import CHUNK, train
from shared_utils.benchmark import Timing, in_turn, report
from shared_utils.cuda_graph import WARMUP

SAMPLES, DIM, IMAGES = 8, 2, 10_000
EPS = 1e-12
PEER_SCALARS = 1 << 18  # pairs times dimensions that a peer holds at once


def run(repeats: int, threads: int) -> None:
    """Measure everything into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report("hib-ndigit-mnist", _timings(device, repeats), PROJECT, PACKAGES, {"repeats": repeats})


def _timings(device: torch.device, repeats: int) -> Iterator[Timing]:
    for method in ("mc", "quadrature"):  # first: it would not see memory that the process already holds
        seconds, megabytes = all_pairs(device.type, method)
        what = f"{IMAGES:,} x {IMAGES:,} match probabilities, {method}"
        yield Timing(what, None, [seconds], unit="s")
        yield Timing(f"{what}: memory", None, [megabytes], unit="MB", target="<= 1024")
    for batch in (128, 512):
        for dim in (2, 64, 512):
            what = f"VIBPairLoss, forward + backward, all pairs, B = {batch}, D = {dim}, K = {SAMPLES}"
            for peer, distances in PEERS.items():
                if peer != PCME or batch * batch * dim <= 1 << 24:  # beyond this, a call takes a minute
                    yield Timing(what, peer, *pair_loss(device, batch, dim, distances, repeats), target=">= 1")
    for models in (1, 12):
        target = ">= 3000" if device.type == "cuda" and models == 1 else ""
        what = f"training steps per second, LeNet, batch 128, {models} stacked"
        yield Timing(what, None, [steps_per_second(device.type, models)], unit="/ s", target=target)


Distances = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_differences(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """As in PCME, with its index lists as tensors: (B, K, D) -> (P, K, K)."""
    return ((z[first].unsqueeze(2) - z[second].unsqueeze(1)).square().sum(-1) + EPS).sqrt()


def by_products(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The straightforward way at its best: gathered samples, one product per pair."""
    left, right = z[first], z[second]
    squares = left.square().sum(2)[:, :, None] + right.square().sum(2)[:, None]
    return (squares - 2 * left @ right.transpose(1, 2)).clamp_min(EPS).sqrt()


def by_cdist(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch.cdist of the whole batch; the pairs are taken from it."""
    batch, samples, _ = z.shape
    distance = torch.cdist(z.flatten(0, 1), z.flatten(0, 1)).clamp_min(EPS)
    return distance.view(batch, samples, batch, samples).transpose(1, 2)[first, second]


PCME = "differences of index lists, as PCME"
PEERS: dict[str, Distances] = {
    PCME: by_differences,
    "autograd on triu_indices": by_products,
    "torch.cdist": by_cdist,
}


def pair_loss(
    device: torch.device, batch: int, dim: int, distances: Distances, repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of ours and of a peer, timed in turn on the same samples; values and gradients must agree."""
    generator = torch.Generator().manual_seed(0)
    mu = (torch.randn(batch, 1, dim, generator=generator) / dim**0.5).to(device).requires_grad_()
    labels = (torch.arange(batch) // 2 % 70).to(device)
    loss = VIBPairLoss(beta=0.0, samples=SAMPLES, negatives="all", a=3.0, b=2.0).to(device)
    embedding = GaussianMixtureEmbedding(mu, torch.full_like(mu, default_logvar(dim)))
    inputs = (mu, loss.match.a_raw, loss.match.b)
    first, second = torch.triu_indices(batch, batch, 1, device=device)
    match = labels[first] == labels[second]
    weight = torch.where(match, 0.5 / match.sum(), 0.5 / (~match).sum())

    def samples() -> Tensor:
        return embedding.sample(SAMPLES, torch.Generator(device).manual_seed(1))

    def ours() -> tuple[Tensor, ...]:
        found = loss(embedding, labels, generator=torch.Generator(device).manual_seed(1)).loss
        return found.detach(), *torch.autograd.grad(found, inputs)

    def peer() -> tuple[Tensor, ...]:
        z = samples()
        leaf = z.detach().requires_grad_()
        total = torch.zeros((), device=device)
        parts = (first, second, match, weight)
        chunk = len(first) if distances is by_cdist else PEER_SCALARS // dim
        for f, s, m, w in zip(*(part.split(chunk) for part in parts), strict=True):
            sign = m.to(z.dtype)[:, None, None] * 2 - 1
            right = F.logsigmoid(sign * (loss.match.b - loss.match.a * distances(leaf, f, s))).flatten(1)
            part = -((right.logsumexp(1) - math.log(SAMPLES**2)) * w).sum()
            part.backward(inputs=[leaf, *inputs[1:]])
            total += part.detach()
        grads = (*torch.autograd.grad(z, mu, leaf.grad), *(x.grad for x in inputs[1:]))
        for x in inputs[1:]:
            x.grad = None
        return total, *grads

    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5)
    return in_turn(ours, peer, repeats, device)


def all_pairs(device: str, method: str) -> tuple[float, float]:
    """Seconds and extra megabytes of all match probabilities of 10,000 embeddings, a block of queries at a time."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 1, DIM)
    e = GaussianMixtureEmbedding(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) - 3)
    e, match = e.to(device), MatchProbability(2.0, 3.5).to(device)
    match.pairwise(e[:64], e[:64], SAMPLES, method, tolerance=1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to what is held now
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
    """Training speed of the paper's network on two-digit images of noise, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(256, (2000, 28, 28), generator=generator, dtype=torch.uint8)
    data = NDigitSet(digits, torch.randint(2000, (7000, 2), generator=generator), torch.arange(7000) % 70)
    chunks = (4, 100) if device == "cuda" else (1, 2)
    warm = WARMUP + chunks[0] * CHUNK
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
