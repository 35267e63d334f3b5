"""Speed and memory against PyPI prdc and faiss: CPU seconds, every contender in a fresh process on the same inputs."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from prdc_metrics.experiments import PROJECT
from prdc_metrics.metrics import knn_radii, prdc
from shared_utils.logging import console, progress


@dataclass(frozen=True)
class Job:
    """A piece of work, ours and (if there is one) the peer's, and the ratio to reach."""

    name: str
    ours: str
    peer: str | None
    n: int
    dim: int
    reach: str
    threads: int = 1


JOBS = (
    Job("four metrics, D=64", "prdc", "pypi_prdc", 10_000, 64, "CPU <= 1/5, memory <= 1/10"),
    Job("four metrics, D=512", "prdc", "pypi_prdc", 10_000, 512, "CPU <= 1/4"),
    Job("kNN radii + coverage, D=64", "radii_and_coverage", "faiss", 10_000, 64, "CPU <= 1.3"),
    Job("kNN radii + coverage, D=512", "radii_and_coverage", "faiss", 10_000, 512, "CPU <= 1.3"),
    Job("four metrics, D=64, two threads against one", "prdc", "one_thread", 10_000, 64, "wall <= 1/1.6", threads=2),
    Job("four metrics, 50,000 x 50,000 x 64", "prdc", None, 50_000, 64, "< 1 GB extra", threads=2),
)


@dataclass
class Bench:
    """Measure ours against the peers and print the ratios; writes runs/bench.json."""

    repeats: int = 3
    """Processes per contender; medians are compared."""

    def __call__(self) -> None:
        rows = []
        with progress() as bar:
            for job in bar.track(JOBS, description="bench"):
                repeats = 1 if job.n > 20_000 else self.repeats
                ours = [_measure(job.ours, job, job.threads) for _ in range(repeats)]
                contender = job.ours if job.peer == "one_thread" else job.peer
                peer = [_measure(contender, job, 1) for _ in range(repeats)] if contender else []
                rows.append({"job": job.name, "reach": job.reach, "ours": ours, "peer": peer})
        path = PROJECT / "runs" / "bench.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows, indent=2) + "\n")
        console().print(_table(rows))


def _table(rows: list[dict]) -> Table:
    table = Table("work", "ours", "peer", "ratio (min to max)", "to reach", title="CPU s / wall s / extra MB, medians")
    for row in rows:
        ratios = []
        for name in ("cpu", "wall", "megabytes"):
            pairs = [a[name] / max(b[name], 1e-9) for a, b in zip(row["ours"], row["peer"], strict=False)]
            if pairs:
                ratios.append(f"{name} {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")
        table.add_row(row["job"], _medians(row["ours"]), _medians(row["peer"]), "\n".join(ratios), row["reach"])
    return table


def _medians(runs: list[dict]) -> str:
    if not runs:
        return "-"
    return " / ".join(f"{statistics.median(run[name] for run in runs):.2f}" for name in ("cpu", "wall", "megabytes"))


def _measure(contender: str, job: Job, threads: int) -> dict:
    words = [sys.executable, "-m", "prdc_metrics.bench", contender, str(job.n), str(job.dim)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment["OPENBLAS_NUM_THREADS"] = str(threads)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _contender(name: str):
    """A function of (real, fake) with its imports done."""
    if name == "prdc":
        return prdc
    if name == "radii_and_coverage":

        def radii_and_coverage(real, fake):
            knn_radii(fake, 5)
            return prdc(real, fake, metrics=("coverage",))

        return radii_and_coverage
    if name == "pypi_prdc":
        from prdc import compute_prdc

        return lambda real, fake: compute_prdc(real, fake, nearest_k=5)
    import faiss

    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def flat_index(real, fake):
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
    used["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(json.dumps(used))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
