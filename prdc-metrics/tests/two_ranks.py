"""Run by torchrun from test_distributed.py: `two_ranks.py NAME` runs one function on two gloo ranks."""

import datetime
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_golden import CASES, check

from prdc_metrics import PRDCMetric, RealManifold, compute_prdc, knn_radii, prdc

warnings.simplefilter("ignore")
RNG = np.random.default_rng(0)
REAL, FAKE = RNG.standard_normal((400, 16)), RNG.standard_normal((301, 16)) + 0.3


def fixtures(rank: int) -> None:
    """Ranks that share the work find what one process finds."""
    for case in CASES:
        check(case, tile=64, group=dist.group.WORLD)
    for k in (1, 5):
        assert torch.equal(knn_radii(REAL, k, tile=64, group=dist.group.WORLD), knn_radii(REAL, k))
    manifold = RealManifold.fit(REAL, (3, 5), tile=64, group=dist.group.WORLD)
    assert manifold.score(FAKE, group=dist.group.WORLD).counts == prdc(REAL, FAKE, (3, 5)).counts


def shards(rank: int) -> None:
    """Each rank its own part, of unequal length: local unless sharded, and then the whole set's value."""
    whole, mine = compute_prdc(REAL, FAKE, 5), slice(rank * 150, 150 + rank * 300)
    alone = compute_prdc(REAL[mine], FAKE[mine], 5)
    assert compute_prdc(REAL[mine], FAKE[mine], 5, group=dist.group.WORLD, sharded=True) == whole != alone
    if rank == 1:
        assert alone["density"] != whole["density"]


def one_caller(rank: int) -> None:
    """A call on one rank alone neither waits nor changes."""
    if rank == 0:
        assert compute_prdc(REAL, FAKE, 5) == prdc(REAL, FAKE, (5,)).values[5]
        metric = PRDCMetric(sync_on_compute=False)
        metric.update(real=REAL, fake=FAKE)
        assert metric.compute() == compute_prdc(REAL, FAKE, 5)
    dist.barrier()


def disagreement(rank: int) -> None:
    """Other features, other order, other shape, other type: an error on every rank."""
    others = [REAL + 1e-9 * rank, REAL[:: 1 - 2 * rank], REAL[: 400 - rank], REAL.astype("f" if rank else "d")]
    for other in others:
        with pytest.raises(ValueError, match="real: ranks 1 of the group hold different features"):
            compute_prdc(other, FAKE, 5, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="fake: ranks 1"):
        compute_prdc(REAL, FAKE + rank, 5, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="15 dimensions of torch.float64 and 16"):
        compute_prdc(REAL[:, rank:], FAKE, 5, group=dist.group.WORLD, sharded=True)


def metric(rank: int) -> None:
    """torchmetrics gathers the ranks' features: unequal numbers of batches, and a rank without fakes."""
    found = PRDCMetric(ks=(3,), tile=64)
    for batch in np.array_split(REAL[200 * rank : 200 * rank + 200], 3 + rank):
        found.update(real=batch)
    if rank == 0:
        found.update(fake=FAKE)
    assert found.compute() == compute_prdc(REAL, FAKE, 3)
    found.update(fake=FAKE[:3] if rank else None, real=None)  # goes on with its own batches after compute
    assert sum(map(len, found.real)) == 200
    found.reset()
    with pytest.raises(ValueError, match="no real and no fake"):
        found.compute()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    for name in sys.argv[1:]:
        globals()[name](dist.get_rank())
        print(f"{name}: rank {dist.get_rank()} passed", flush=True)
    dist.destroy_process_group()
