"""Run a federation with one of four engines.

`batched` trains the clients of a round at once (default), `loop` one after the other; `flower-inprocess` and
`flower-ray` run the same round through Flower's messages (flower.py). All four give the same updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fl_linkability.data.bundle import FederatedBundle
from fl_linkability.federation import FedAvgConfig, Federation, ignore
from fl_linkability.mitigations import Mitigation
from fl_linkability.store import UpdateStore
from fl_linkability.train import State, make_fabric, trained_state

if TYPE_CHECKING:
    from lightning.fabric import Fabric

ENGINES = ("batched", "loop", "flower-inprocess", "flower-ray")


@dataclass
class SimulationResult:
    """What `simulate` returns; `updates` is None on ranks other than 0."""

    updates: UpdateStore | None
    final_state: State
    """the whole network, frozen layers and running statistics included, as `load_state_dict` takes it"""
    dimension: int
    """numbers in an update"""
    utility: list[dict]
    """what `evaluate` returned after each of the last rounds"""
    faults: list[dict]
    """round, device and reason of every update left out"""
    raw_norm: float
    """median norm of the anonymous devices' updates before mitigation"""
    engine: dict
    """name, and for Flower its version and the number of nodes"""


def simulate(
    bundle: FederatedBundle,
    model_fn: Callable[[], nn.Module],
    config: FedAvgConfig,
    mitigation: Mitigation | None = None,
    engine: str = "batched",
    *,
    initial: State | None = None,
    evaluate: Callable[[nn.Module, State], dict] | None = None,
    evaluate_last: int = 5,
    folder: Path | None = None,
    checkpoint_every: int = 50,
    fabric: Fabric | None = None,
    clients_at_once: int = 0,
    keep: str = "all",
    on_round: Callable[[int], None] = ignore,
) -> SimulationResult:
    """Run the federation and keep all updates.

    Args:
        bundle: users and their devices.
        model_fn: makes the network; called once, with torch seeded by config.seed.
        config: rounds and local training.
        mitigation: what devices or server do against linking.
        engine: one of ENGINES.
        initial: weights to start from instead of fresh ones: all that are trained, or a whole state dict.
        evaluate: gives utility figures of network and weights, after each of the last `evaluate_last` rounds.
        evaluate_last: number of rounds that are evaluated.
        folder: for updates and checkpoint on disk; an interrupted run resumes from its last saved round.
        checkpoint_every: rounds between saves.
        fabric: device, precision and ranks; default: the CPU.
        clients_at_once: most clients in one batched step (limits memory); 0: all clients of the round.
        keep: parameters whose updates are stored: all, or name prefixes joined by |.
        on_round: called with the number of finished rounds.

    Raises:
        ValueError: unknown engine, more clients per round than devices, a folder of another run, initial weights of
            another network, a network that engine "batched" cannot run (dropout, batch norm in training mode).
        RuntimeError: a round with fewer than min_clients valid updates.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    torch.manual_seed(config.seed)
    fabric = fabric or make_fabric("cpu")
    model = model_fn().to(fabric.device)
    if initial is not None:
        _load(model, initial)
    federation = Federation(bundle, model, config, mitigation, fabric, folder, checkpoint_every, keep)
    federation.evaluate, federation.evaluate_from = evaluate, config.rounds - evaluate_last
    federation.clients_at_once, federation.on_round = clients_at_once, on_round
    state = trained_state(model)
    state = federation.resume(state)
    facts = {"name": engine}
    if engine.startswith("flower"):
        from fl_linkability import flower

        state, more = (flower.run_inprocess if engine == "flower-inprocess" else flower.run_ray)(federation, state)
        facts |= more
    else:
        for number in range(federation.next_round, config.rounds):
            devices = federation.devices_of_round(number)
            work = federation.batched_replies if engine == "batched" else federation.loop_replies
            state = federation.finish_round(number, state, work(state, devices, number))
    norms = np.array(federation.raw_norms)
    return SimulationResult(
        federation.store, {**model.state_dict(), **state}, sum(v.numel() for v in state.values()), federation.utility,
        federation.faults, float(np.median(norms)) if len(norms) else float("nan"), facts,
    )  # fmt: skip


def _load(model: nn.Module, initial: State) -> None:
    lacking = [name for name in trained_state(model) if name not in initial]
    try:
        unknown = model.load_state_dict(initial, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"initial: weights of another network ({str(error).splitlines()[-1].strip()})") from error
    if lacking or unknown:
        raise ValueError(f"initial: weights of another network (missing {lacking}, unexpected {unknown})")
