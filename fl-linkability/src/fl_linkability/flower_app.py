"""Apps for `flwr run`: every process makes the same federation from the run's config.

Each node needs `partition-id=<device>` in its --node-config, 0 .. 2 U - 1, device 2u being user u's prior half.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_linkability import flower  # first: it sets Flower's environment
from fl_linkability.data.reading import Reading
from fl_linkability.evaluate import utility
from fl_linkability.experiments import Experiment, save_settings
from fl_linkability.federation import FedAvgConfig, Federation
from fl_linkability.settings import PRESETS
from fl_linkability.train import make_fabric

client_app = ClientApp()
server_app = ServerApp()


@lru_cache(maxsize=1)
def _experiment(preset: str, changes: str, seed: int, data_root: str) -> Experiment:
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return Experiment(replace(PRESETS[preset], **json.loads(changes)), seed, Reading(Path(data_root)), make_fabric())


def _federation(context: Context, folder: Path | None = None) -> tuple[Experiment, Federation]:
    config = context.run_config
    experiment = _experiment(config["preset"], config["settings"], int(config["seed"]), config["data-root"])
    s = experiment.settings
    rounds = FedAvgConfig(s.rounds, s.clients_per_round, experiment.local(s.local_epochs), experiment.seed)
    federation = Federation(
        experiment.bundle, experiment.model(), rounds, experiment.mitigation, experiment.fabric, folder, keep=s.keep
    )
    return experiment, federation


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Which device this node is."""
    return flower.answer_query(message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One round on this node's device."""
    return flower.make_client_app(_federation(context)[1])(message, context)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds that are left; updates and weights stay in the output folder."""
    folder = Path(str(context.run_config["output"]))
    experiment, federation = _federation(context, folder)
    save_settings(folder, experiment.settings, experiment.seed)
    federation.evaluate = partial(utility, experiment.bundle)
    federation.evaluate_from = experiment.settings.rounds - 5
    state = federation.resume(experiment.initial())
    flower.run_on_grid(federation, state, grid)
