"""Speed in one process, contenders in turn on the same inputs, equality checked: ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table as Grid

from fl_linkability.data.styled import make_digits_users
from fl_linkability.federation import FedAvgConfig, simulate
from fl_linkability.models import MLP
from fl_linkability.train import LocalSGD, batch_table, epoch_orders, train_batched, train_one, trained_state
from shared_utils.logging import console

CLIENTS, SAMPLES = 80, 64


def run(repeats: int, threads: int, ray: bool) -> None:
    """Print one table on the trainer, one on Flower's messages, and Ray's seconds where asked."""
    torch.set_num_threads(threads)
    grid = Grid(
        "what", "ours (ms)", "other (ms)", "ratio: median (min .. max)", "target",
        title=f"fl-linkability bench, CPU, {threads} threads, CPU time",
    )  # fmt: skip
    for what, ours, other, target in _trainers():
        times = _in_turn(ours, other, repeats)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        grid.add_row(what, *(f"{1e3 * statistics.median(t):.1f}" for t in times), spread, target)
    console().print(grid)
    _messages(repeats)
    if ray:
        _ray()


def _in_turn(ours: Callable, other: Callable, repeats: int) -> tuple[list[float], list[float]]:
    def timed(work: Callable) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    for work in (ours, other):
        work()
    pairs = [(timed(ours), timed(other)) for _ in range(repeats)]
    return tuple(map(list, zip(*pairs, strict=True)))


def _trainers():
    """80 clients x 64 samples x 2 epochs in batches of 8, MLP 256-32-10."""
    torch.manual_seed(0)
    rng, local = np.random.default_rng(0), LocalSGD(epochs=2, batch_size=8, lr=0.1)
    x, y = torch.rand(CLIENTS * SAMPLES, 1, 16, 16), torch.randint(10, (CLIENTS * SAMPLES,))
    orders = [epoch_orders(SAMPLES, local.epochs, rng) for _ in range(CLIENTS)]
    starts = [SAMPLES * client for client in range(CLIENTS)]

    def batched(model: torch.nn.Module) -> Callable:
        def work() -> torch.Tensor:
            rows, weights = batch_table(orders, starts, local.batch_size)
            return train_batched(model, trained_state(model), x, y, rows, weights, local)[0]

        return work

    def loop() -> torch.Tensor:
        parts = [slice(start, start + SAMPLES) for start in starts]
        return torch.stack([train_one(net, state, x[p], y[p], o, local)[0] for p, o in zip(parts, orders, strict=True)])

    net = MLP()
    state = trained_state(net)
    generic = _WithoutOwnForms(net)
    contenders = [("batched, the MLP's own gradient", MLP(), ">= 8"), ("batched by vmap, any network", generic, "")]
    for what, model, target in contenders:
        model.load_state_dict(state)
        torch.testing.assert_close(batched(model)(), loop(), rtol=0, atol=1e-5)
        yield f"{what}; other: a loop over {CLIENTS} clients", batched(model), loop, target


class _WithoutOwnForms(torch.nn.Module):
    """An MLP that has no stacked form, so that vmap is used."""

    def __init__(self, net: MLP):
        super().__init__()
        self.fc1, self.fc2 = net.fc1, net.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x.flatten(1)).relu())


def _messages(repeats: int) -> None:
    """CPU milliseconds that Flower's messages add to a client and round, in process."""
    bundle = make_digits_users(0, n_users=20)
    config = FedAvgConfig(rounds=5, clients_per_round=40, local=LocalSGD(2, 8, 0.1))
    results = {engine: simulate(bundle, MLP, config, engine=engine) for engine in ("loop", "flower-inprocess")}
    a, b = (result.updates.delta for result in results.values())
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    loop, flower = _in_turn(
        lambda: simulate(bundle, MLP, config, engine="loop"),
        lambda: simulate(bundle, MLP, config, engine="flower-inprocess"),
        repeats,
    )
    count = config.rounds * config.clients_per_round
    added = [1e3 * (f - l) / count for l, f in zip(loop, flower, strict=True)]  # noqa: E741
    console().print(
        f"Flower's messages in process: {statistics.median(added):.2f} ms ({min(added):.2f} .. {max(added):.2f}) "
        f"of CPU per client and round, on top of {1e3 * statistics.median(loop) / count:.2f} ms of training"
    )


def _ray() -> None:
    """Wall seconds of flwr's simulation on Ray by number of rounds: start-up is what is left at none."""
    bundle = make_digits_users(0, n_users=10)
    seconds = {}
    for rounds in (1, 4):
        start = time.perf_counter()
        simulate(bundle, MLP, FedAvgConfig(rounds, 20, LocalSGD(2, 8, 0.1)), engine="flower-ray")
        seconds[rounds] = time.perf_counter() - start
    per_round = (seconds[4] - seconds[1]) / 3
    console().print(
        f"Flower on Ray, 20 clients: {seconds[1]:.0f} s for 1 round, {seconds[4]:.0f} s for 4: {per_round:.1f} s per "
        f"round after {seconds[1] - per_round:.0f} s of start-up"
    )
