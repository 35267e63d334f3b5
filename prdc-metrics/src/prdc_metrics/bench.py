"""Speed and memory against the peers on the same inputs: on a CPU every contender runs in a new process, in turn.

PyPI's prdc is the authors' code; dgm-eval calls the same distances of scikit-learn.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prdc_metrics.experiments import PACKAGES, PROJECT
from prdc_metrics.metrics import knn_radii, prdc
from prdc_metrics.single_samples import realism
from shared_utils.benchmark import Timing, in_turn, report, share_of_peak

N, LARGE = 10_000, 50_000
IN_CHUNKS = "PyTorch in chunks: products and topk"
UNITS = {"cpu": "CPU s", "wall": "s", "memory": "MB"}  # memory beyond the inputs


def run(repeats: int, threads: int) -> None:
    """Measure every comparison into runs/bench.json and print the table."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        report("prdc-metrics", _on_cuda(repeats), PROJECT, PACKAGES, {"repeats": repeats})
        return
    peers = ("prdc", "faiss-cpu", "torch-fidelity")
    report("prdc-metrics", _timings(repeats, threads), PROJECT, (*PACKAGES, *peers), {"repeats": repeats})


def _on_cuda(repeats: int) -> Iterator[Timing]:
    for dim in (64, 2048):
        generator = torch.Generator("cuda").manual_seed(0)
        real, fake = (torch.randn(LARGE, dim, device="cuda", generator=generator) for _ in range(2))
        ours, peer = partial(prdc, real, fake), partial(in_chunks, real, fake)
        theirs = peer()
        if any(abs(value - theirs[name]) > 1e-3 for name, value in ours().values[5].items()):
            raise RuntimeError("ours and the peer's metrics differ")
        times = in_turn(ours, peer, repeats, real.device)
        note = share_of_peak(peer, times[0], torch.float32)  # the peer's arithmetic: each distance once
        yield Timing(f"four metrics, {LARGE:,} x {LARGE:,} x {dim}", IN_CHUNKS, *times, target=">= 1", note=note)


def in_chunks(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 8192) -> dict[str, float]:
    """The four metrics in float32 by plain PyTorch, without rechecking pairs that rounding decides."""

    def squares(x: Tensor, y: Tensor) -> Tensor:
        return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1)[:, None]).clamp_min_(0)

    def radii(x: Tensor) -> Tensor:
        return torch.cat([squares(part, x).topk(k + 1, largest=False).values[:, k] for part in x.split(chunk)])

    fake_radii, balls = radii(fake), torch.zeros(len(fake), dtype=torch.long, device=fake.device)
    recalled, covered = torch.zeros(2, dtype=torch.double, device=fake.device)
    for part, own in zip(real.split(chunk), radii(real).split(chunk), strict=True):
        found = squares(part, fake)
        balls += (found < own[:, None]).sum(0)
        recalled += (found < fake_radii).any(1).sum()
        covered += (found.amin(1) < own).sum()
    shares = {"precision": (balls > 0).double().mean(), "recall": recalled / len(real)}
    shares |= {"density": balls.double().mean() / k, "coverage": covered / len(real)}
    return {name: share.item() for name, share in shares.items()}


def _timings(repeats: int, threads: int) -> Iterator[Timing]:
    for dim in (64, 512, 1024, 2048):
        size = f"{N:,} x {N:,} x {dim}"
        compare = partial(_compare, dim=dim, repeats=repeats)
        targets = {"cpu": ">= 5"} | ({"memory": ">= 10"} if dim == 64 else {})
        yield from compare(
            f"four metrics, {size}", "PyPI prdc", ("prdc", threads), ("pypi_prdc", threads), targets=targets
        )
        targets = {"cpu": ">= 1"}
        yield from compare(
            f"four metrics, {size}", IN_CHUNKS, ("prdc", threads), ("in_chunks", threads), targets=targets
        )
        what, sides = f"precision and recall, {size}", (("precision_recall", threads), ("torch_fidelity", threads))
        yield from compare(what, "torch-fidelity", *sides, targets=targets)
        what, sides = f"kNN radii + coverage, {size}", (("radii_and_coverage", threads), ("faiss", threads))
        yield from compare(what, "faiss, flat index", *sides, targets={"cpu": ">= 1.3"})
    compare = partial(_compare, dim=64, repeats=repeats)
    size = f"{N:,} x {N:,} x 64"
    yield from compare(
        f"realism, {size}", "our four metrics", ("realism", threads), ("prdc", threads), targets={"cpu": ">= 1/1.5"}
    )
    for dim in (64, 1024):
        what = f"four metrics, {N:,} x {N:,} x {dim}, two threads"
        yield from _compare(what, "one thread", ("prdc", 2), ("prdc", 1), {"wall": ">= 1.7"}, dim, repeats)
        what, sides = (
            f"kNN radii + coverage, {N:,} x {N:,} x {dim}, two threads",
            (("radii_and_coverage", 2), ("faiss", 2)),
        )
        yield from _compare(what, "faiss, flat index", *sides, {"wall": ">= 1.3"}, dim, repeats)
    used = _measure("prdc", LARGE, 64, 2)
    what = f"four metrics, {LARGE:,} x {LARGE:,} x 64, two threads"
    yield Timing(what, None, [used["wall"]], unit="s")
    yield Timing(f"{what}: memory", None, [used["memory"]], unit="MB", target="<= 1024")


def _compare(
    what: str,
    name: str,
    ours: tuple[str, int],
    peer: tuple[str, int],
    targets: dict[str, str],
    dim: int,
    repeats: int,
) -> Iterator[Timing]:
    """One timing per quantity with a target; contenders are functions and their number of threads."""
    pairs = [[_measure(function, N, dim, threads) for function, threads in (ours, peer)] for _ in range(repeats)]
    for quantity, target in targets.items():
        mine, theirs = ([used[quantity] for used in side] for side in zip(*pairs, strict=True))
        label = f"{what}: memory" if quantity == "memory" else what
        yield Timing(label, name, mine, theirs, unit=UNITS[quantity], target=target)


def _measure(contender: str, n: int, dim: int, threads: int) -> dict[str, float]:
    words = [sys.executable, "-m", "prdc_metrics.bench", contender, str(n), str(dim)]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _contender(name: str) -> Callable[[np.ndarray, np.ndarray], Any]:
    """A function of (real, fake); its imports are already done."""
    if name == "prdc":
        return prdc
    if name == "precision_recall":
        return partial(prdc, ks=(3,), metrics=("precision", "recall"))
    if name == "realism":
        return realism
    if name == "radii_and_coverage":

        def radii_and_coverage(real: np.ndarray, fake: np.ndarray) -> Any:
            knn_radii(fake, 5)
            return prdc(real, fake, metrics=("coverage",))

        return radii_and_coverage
    if name == "pypi_prdc":
        from prdc import compute_prdc

        return lambda real, fake: compute_prdc(real, fake, nearest_k=5)
    if name == "in_chunks":
        return lambda real, fake: in_chunks(torch.from_numpy(real), torch.from_numpy(fake), chunk=1024)
    if name == "torch_fidelity":
        full = import_module("torch_fidelity.metric_prc").calculate_precision_recall_full

        return lambda real, fake: full(torch.from_numpy(fake), torch.from_numpy(real))
    import faiss

    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def flat_index(real: np.ndarray, fake: np.ndarray) -> float:
        index = faiss.IndexFlatL2(real.shape[1])
        index.add(real)
        radii = index.search(real, 6)[0][:, 5]
        index_fake = faiss.IndexFlatL2(real.shape[1])
        index_fake.add(fake)
        index_fake.search(fake, 6)
        return (index_fake.search(real, 1)[0][:, 0] < radii).mean()

    return flat_index


def _child(name: str, n: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((n, dim), dtype=np.float32)
    fake = rng.standard_normal((n, dim), dtype=np.float32)
    work = _contender(name)
    work(real[:500], fake[:500])
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    work(real, fake)
    used = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    used["memory"] = max(1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(json.dumps(used))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
