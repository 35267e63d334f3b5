"""The peers of the benchmark give our updates; each is optional."""

import numpy as np
import pytest
import torch

from fl_linkability import bench_jax
from fl_linkability.models import MLP
from fl_linkability.train import LocalSGD, batch_table, epoch_orders, train_batched, trained_state


@pytest.mark.parametrize("peer, package", [("whole_round", "jax"), ("fedjax_round", "fedjax")])
def test_jax_gives_the_same_updates(peer, package):
    """Clients with a short last batch, and one with fewer steps than the others."""
    pytest.importorskip(package)
    torch.manual_seed(0)
    x, y, model = torch.rand(30, 1, 4, 4), torch.randint(10, (30,)), MLP(16, 8)
    orders = [epoch_orders(n, 2, np.random.default_rng(n)) for n in (11, 11, 8)]
    rows, weights = batch_table(orders, [0, 11, 22], 4)
    state, local = trained_state(model), LocalSGD(2, 4, 0.3)
    expected, _ = train_batched(model, state, x, y, rows, weights, local)
    found = getattr(bench_jax, peer)(state, x, y, local.lr)(rows, weights)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert np.abs(found).max() > 0.01
