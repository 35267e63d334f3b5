"""The same federation through Flower's Message API: a ClientApp, a ServerApp and a FedAvg that records every update.

Engines: `run_inprocess` calls the client app directly (no Ray), `run_ray` is flwr's own simulation. `flower_app.py`
holds the apps for `flwr run` against a SuperLink.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in ENVIRONMENT.items():  # before flwr and ray are imported; the user's own values stay
    os.environ.setdefault(_name, _value)
if "FLWR_HOME" not in os.environ:  # else flwr writes to ~/.flwr
    os.environ["FLWR_HOME"] = tempfile.mkdtemp(prefix="flwr-")
    atexit.register(shutil.rmtree, os.environ["FLWR_HOME"], ignore_errors=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402

from fl_linkability.federation import Federation, Reply  # noqa: E402
from fl_linkability.train import State, flatten, make_fabric, unflatten  # noqa: E402

FLWR_VERSION = version("flwr")


def answer_query(message: Message, context: Context) -> Message:
    """The node's partition-id, which is its device."""
    record = MetricRecord({"partition-id": int(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": record}), reply_to=message)


def make_client_app(federation: Federation) -> ClientApp:
    """A client that trains as `Federation.loop_reply` does on the device numbered by the node's partition-id.

    "query" answers with that number, so that the server can address devices; "train" answers with the new weights.
    """
    app = ClientApp()

    app.query()(answer_query)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if not hasattr(federation, "fabric"):  # Ray has sent the app to another process
            federation.fabric = make_fabric()
        device = int(context.node_config["partition-id"])
        content: Any = message.content
        number = int(content["config"]["server-round"]) - 1
        state = content["arrays"].to_torch_state_dict()
        start = {name: value.to(federation.fabric.device) for name, value in state.items()}
        reply = federation.loop_reply(start, device, number)
        arrays = ArrayRecord(unflatten(flatten(state) + torch.from_numpy(reply.delta), state))
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "num-examples": reply.n_examples,
            "partition-id": device,
        }
        if np.isfinite(reply.raw_norm):
            metrics["raw-norm"] = reply.raw_norm
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    return app


class RecordingFedAvg(FedAvg):
    """FedAvg whose server keeps every update, as the adversary of the paper does.

    The devices of a round, the check of replies, the store, the mean and the checkpoint are the federation's, so that
    all engines agree. Replies are taken in the order of devices: float sums then do not depend on when they arrive.

    Args:
        federation: the run.
        state: weights to start from.
        node_of_device: node id of each device, from `find_devices`.
    """

    def __init__(self, federation: Federation, state: State, node_of_device: dict[int, int]):
        clients = federation.config.clients_per_round
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.federation, self.state, self.node_of_device = federation, state, node_of_device

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the devices of the round, wherever they run."""
        number = self.federation.next_round
        config["server-round"] = number + 1
        self.asked = [int(device) for device in self.federation.devices_of_round(number)]
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, [self.node_of_device[device] for device in self.asked], "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Updates from the replies, then the federation's round; devices that did not answer are faults."""
        device_of_node = {node: device for device, node in self.node_of_device.items()}
        by_device = {device_of_node[message.metadata.src_node_id]: message for message in replies}
        read = [
            self._read(device, by_device[device]) if device in by_device else Reply(device, error="did not answer")
            for device in self.asked
        ]
        self.state = self.federation.finish_round(self.federation.next_round, self.state, read)
        return _arrays(self.state), MetricRecord({"updates": len(read)})

    def _read(self, device: int, message: Message) -> Reply:
        if message.has_error():
            return Reply(device, error=f"failed: {message.error.reason}".strip())
        try:
            content: Any = message.content
            received, metrics = content["arrays"].to_torch_state_dict(), content["metrics"]
            n_examples = int(metrics["num-examples"])
        except KeyError as error:
            return Reply(device, error=f"sent no {error}")
        if set(received) != set(self.state):
            return Reply(device, error=f"sent arrays {', '.join(received)}, expected {', '.join(self.state)}")
        ordered = {name: received[name] for name in self.state}
        shapes = {name: tuple(v.shape) for name, v in ordered.items() if v.shape != self.state[name].shape}
        if shapes:
            return Reply(device, error=f"sent wrong shapes {shapes}")
        delta = (flatten(ordered).float() - flatten(self.state).cpu()).numpy()
        return Reply(device, delta, n_examples, float(metrics.get("raw-norm", float("nan"))))


def _arrays(state: State) -> ArrayRecord:
    return ArrayRecord({name: value.cpu() for name, value in state.items()})


def find_devices(grid: Grid, n_devices: int, wait: float = 120.0) -> dict[int, int]:
    """Ask every node for its partition-id: node id by device. Waits until enough nodes are connected.

    Raises:
        RuntimeError: fewer nodes after `wait` seconds, or two nodes with the same partition-id.
    """
    deadline = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < n_devices:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(nodes)} of {n_devices} nodes are connected after {wait:.0f} s")
        time.sleep(0.2)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=wait))
    answers: list[tuple[Any, int]] = [(r.content, r.metadata.src_node_id) for r in replies if not r.has_error()]
    found = {int(content["metrics"]["partition-id"]): node for content, node in answers}
    if sorted(found) != list(range(n_devices)):
        raise RuntimeError(f"partition-ids must be 0 .. {n_devices - 1}, got {sorted(found)}")
    return found


def run_on_grid(federation: Federation, state: State, grid: Grid) -> State:
    """All rounds that are left, over any grid; returns the final weights."""
    left = federation.config.rounds - federation.next_round
    if left == 0:
        return state
    strategy = RecordingFedAvg(federation, state, find_devices(grid, federation.users.n_devices))
    strategy.start(grid, _arrays(state), num_rounds=left)
    return strategy.state


def make_server_app(federation: Federation, state: State, result: dict) -> ServerApp:
    """A server app that runs all rounds and leaves the final weights and the number of nodes in `result`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        result["state"] = run_on_grid(federation, state, grid)
        result["nodes"] = len(list(grid.get_node_ids()))

    return app


def run_inprocess(federation: Federation, state: State) -> tuple[State, dict]:
    """All rounds through Flower's messages in this process."""
    from fl_linkability.flower_grid import InProcessGrid, quiet_flower

    quiet_flower()
    grid = InProcessGrid(make_client_app(federation), federation.users.n_devices)
    state = run_on_grid(federation, state, grid)
    return state, {"flwr": FLWR_VERSION, "nodes": federation.users.n_devices}


def run_ray(federation: Federation, state: State) -> tuple[State, dict]:
    """All rounds in flwr's simulation: one Ray actor per core, a node per device.

    Raises:
        RuntimeError: a single core (flwr's actor pool would be empty), or a simulation that ends early.
    """
    from flwr.simulation import run_simulation

    from fl_linkability.flower_grid import quiet_flower

    cores = os.cpu_count() or 1
    quiet_flower()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gpus = federation.fabric.device.type == "cuda"
    ray = tempfile.mkdtemp(prefix="ray-")  # a short path: it holds sockets
    atexit.register(shutil.rmtree, ray, ignore_errors=True)
    backend: dict[str, dict[str, Any]] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 1.0 / cores if gpus else 0.0},
        "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False, "_temp_dir": ray},
    }
    result: dict = {}
    run_simulation(
        server_app=make_server_app(federation, state, result),
        client_app=make_client_app(federation.for_client()),
        num_supernodes=federation.users.n_devices,
        backend_config=backend,
    )
    if "state" not in result:
        raise RuntimeError("Flower's simulation ended before the last round; see its messages above")
    return result["state"], {"flwr": FLWR_VERSION, "nodes": result["nodes"]}
