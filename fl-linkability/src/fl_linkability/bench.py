"""Speed of the batched trainer (against a loop and JAX), of Flower's messages and of Ray; results must be equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from typing import cast

import numpy as np
import torch

from fl_linkability.bench_jax import Work, fedjax_round, whole_round
from fl_linkability.catalogue import PROJECT
from fl_linkability.data.styled import make_digits_users
from fl_linkability.engines import simulate
from fl_linkability.experiments import PACKAGES
from fl_linkability.federation import FedAvgConfig
from fl_linkability.models import MLP
from fl_linkability.store import UpdateStore
from fl_linkability.train import LocalSGD, batch_table, epoch_orders, train_batched, train_one, trained_state
from shared_utils.benchmark import Timing, in_turn, report
from shared_utils.logging import get_logger

logger = get_logger("fl_linkability")
CLIENTS, SAMPLES = 80, 64
CPU = torch.device("cpu")


def run(repeats: int, threads: int, ray: bool) -> None:
    """Measure every comparison, write runs/bench.json and print the table; time Ray too if asked."""
    torch.set_num_threads(threads)
    timings = chain(_trainers(repeats), _messages(repeats), _ray() if ray else ())
    packages = [*PACKAGES, *(name for name in ("jax", "fedjax") if find_spec(name))]
    report("fl-linkability", timings, PROJECT, packages, {"repeats": repeats, "ray": ray})


def _trainers(repeats: int) -> Iterator[Timing]:
    """80 clients x 64 samples x 2 epochs in batches of 8, MLP 256-32-10."""
    torch.manual_seed(0)
    rng, local = np.random.default_rng(0), LocalSGD(epochs=2, batch_size=8, lr=0.1)
    x, y = torch.rand(CLIENTS * SAMPLES, 1, 16, 16), torch.randint(10, (CLIENTS * SAMPLES,))
    orders = [epoch_orders(SAMPLES, local.epochs, rng) for _ in range(CLIENTS)]
    starts = [SAMPLES * client for client in range(CLIENTS)]

    def batched(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            rows, weights = batch_table(orders, starts, local.batch_size)
            return train_batched(model, trained_state(model), x, y, rows, weights, local)[0]

        return work

    def loop() -> torch.Tensor:
        parts = [slice(start, start + SAMPLES) for start in starts]
        return torch.stack([train_one(net, state, x[p], y[p], o, local)[0] for p, o in zip(parts, orders, strict=True)])

    net = MLP()
    state = trained_state(net)
    for what, model, target in (
        ("batched, the MLP's own gradient", MLP(), ">= 8"),
        ("batched by vmap, any network", _WithoutOwnForms(net), ""),
    ):
        model.load_state_dict(state)
        torch.testing.assert_close(batched(model)(), loop(), rtol=0, atol=1e-5)
        times = in_turn(batched(model), loop, repeats, CPU)
        yield Timing(f"{what}, {CLIENTS} clients", "a loop over the clients", *times, target=target)

    net = MLP()
    peers = {"jax": ("a whole round compiled by JAX (vmap)", whole_round), "fedjax": ("FedJAX's own", fedjax_round)}
    for package, (peer, make) in peers.items():
        if not find_spec(package):
            logger.info("%s is not installed (pip install fedjax): its row is left out", package)
            continue
        round_of, ours = make(trained_state(net), x, y, local.lr), batched(net)

        def theirs(round_of: Work = round_of) -> np.ndarray:
            return round_of(*batch_table(orders, starts, local.batch_size))

        np.testing.assert_allclose(ours().numpy(), theirs(), rtol=0, atol=1e-5)
        what = f"batched, the MLP's own gradient, {CLIENTS} clients"
        yield Timing(what, peer, *in_turn(ours, theirs, repeats, CPU))


class _WithoutOwnForms(torch.nn.Module):
    """An MLP without a stacked form, so that vmap is used."""

    def __init__(self, net: MLP):
        super().__init__()
        self.fc1, self.fc2 = net.fc1, net.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x.flatten(1)).relu())


def _messages(repeats: int) -> Iterator[Timing]:
    """What Flower's in-process messages add to a client's round."""
    bundle = make_digits_users(0, n_users=20)
    config = FedAvgConfig(rounds=5, clients_per_round=40, local=LocalSGD(2, 8, 0.1))
    results = {engine: simulate(bundle, MLP, config, engine=engine) for engine in ("loop", "flower-inprocess")}
    a, b = (cast(UpdateStore, result.updates).delta for result in results.values())
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    times = in_turn(
        lambda: simulate(bundle, MLP, config, engine="flower-inprocess"),
        lambda: simulate(bundle, MLP, config, engine="loop"),
        repeats,
        CPU,
    )
    count = config.rounds * config.clients_per_round
    ours, peers = ([ms / count for ms in each] for each in times)
    yield Timing("a client's round with Flower's messages in process", "the same round without", ours, peers)


def _ray() -> Iterator[Timing]:
    """Wall time of flwr's simulation on Ray: the cost of one more round; the rest is start-up."""
    bundle = make_digits_users(0, n_users=10)
    seconds = {}
    for rounds in (1, 4):
        start = time.perf_counter()
        simulate(bundle, MLP, FedAvgConfig(rounds, 20, LocalSGD(2, 8, 0.1)), engine="flower-ray")
        seconds[rounds] = time.perf_counter() - start
    per_round = (seconds[4] - seconds[1]) / 3
    yield Timing("Flower on Ray, 20 clients: start-up", None, [seconds[1] - per_round], unit="s, wall")
    yield Timing("Flower on Ray, 20 clients: a round", None, [per_round], unit="s, wall")
