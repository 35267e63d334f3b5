"""Attack any federation: keep every update that reaches a Flower strategy, or read updates from files.

    class Recorder(Recording, FedAdam): ...

The mixin sees the raw replies before the strategy does, as a curious server would, even inside a server-side
differential privacy wrapper.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fl_linkability.data.bundle import ANONYMOUS, PRIOR
from fl_linkability.store import COLUMNS, UpdateStore
from fl_linkability.train import State, flatten, layer_slices

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid

STATE_KEYS = ("model_state_dict", "state_dict")


class Recording:
    """Mixin before a strategy: `updates` holds each reply's change of the float arrays; integers are not weights.

    A client is identified by "partition-id" among its metrics if it reports one (`report_partition` does), else by its
    node id.

    Attributes:
        owners: (user, role) of each client, role PRIOR or ANONYMOUS: labels for the evaluation, which no attack sees.
            Clients that are not listed are left out.
        updates: None before the first round.
    """

    owners: Mapping[int, tuple[int, int]] = {}
    updates: UpdateStore | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As in the strategy; what is sent is kept."""
        sent = float_arrays(arrays.to_torch_state_dict())
        if self.updates is None:
            self.updates = UpdateStore(layer_slices(sent))
        self._sent = {name: sent[name] for name in self.updates.layer_slices}  # averaged counters have become floats
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[misc]  # the strategy's

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep the updates, then do what the strategy does."""
        replies = list(replies)
        for reply in replies:
            if not reply.has_error():
                self._record(server_round, reply)
        return super().aggregate_train(server_round, replies)  # type: ignore[misc]  # the strategy's

    def _record(self, server_round: int, reply: Message) -> None:
        content: Any = reply.content
        metrics: Any = next(iter(content.metric_records.values()), {})
        client = int(metrics.get("partition-id", reply.metadata.src_node_id))
        if client not in self.owners or self.updates is None:
            return
        user, role = self.owners[client]
        after = next(iter(content.array_records.values())).to_torch_state_dict()
        self.updates.append(
            difference(self._sent, after)[None], round=server_round - 1, device=list(self.owners).index(client),
            user=user, role=role, n_examples=int(metrics.get("num-examples", 1)),
        )  # fmt: skip


def report_partition(message: Message, context: Any, call_next: Any) -> Message:
    """A mod for a ClientApp, `ClientApp(mods=[report_partition])`: its replies say which partition they come from."""
    reply = call_next(message, context)
    if not reply.has_error():
        for metrics in reply.content.metric_records.values():
            metrics["partition-id"] = int(context.node_config["partition-id"])
    return reply


def float_arrays(state: Mapping[str, Any]) -> State:
    """What an update consists of: float32 copies of the float arrays, in the state's order."""
    tensors = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        for name, value in state.items()
    }
    return {name: value.float().clone() for name, value in tensors.items() if value.is_floating_point()}


def difference(before: State, after: Mapping[str, Any]) -> np.ndarray:
    """The update (D,), new minus old. ValueError if an array is missing or has another shape."""
    new = float_arrays(after)
    differ = [name for name, value in before.items() if name not in new or new[name].shape != value.shape]
    if differ:
        raise ValueError(f"weights of different networks: {', '.join(differ[:3])} differ")
    return (flatten({name: new[name] for name in before}) - flatten(before)).numpy()


def read_updates(table: Path | str, path: Path | None = None) -> UpdateStore:
    """Read updates that another framework has saved, listed in a CSV file.

    Columns: round, device, user, role (0 prior, 1 anonymous), n_examples, after and before: files relative to the
    table. `before` holds the weights that the server sent; if it is empty, `after` is the update itself. Files: .pt
    or .pth (a state dict, or one below "model_state_dict" or "state_dict", as FLUTE saves it; pfl-research saves
    checkpoint.pt), or .npz with an array per layer (arrays without names, as `numpy.savez` and Flower's
    `to_numpy_ndarrays` give them, are called arr_0, arr_1, ...).

    Args:
        table: the CSV.
        path: folder of the store; None keeps it in memory.

    Raises:
        FileNotFoundError: the table or a file is missing.
        ValueError: a missing column, a role other than 0 and 1, a file that holds no weights, weights that are not
            finite, or weights of different networks.
    """
    table = Path(table)
    with open(table, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file, skipinitialspace=True))
    missing = [name for name in (*COLUMNS, "after", "before") if not lines or name not in lines[0]]
    if missing:
        raise ValueError(f"{table}: no line with {', '.join(missing)}")
    store: UpdateStore | None = None
    sent: tuple[str, State] = "", {}
    for number, line in enumerate(lines, 2):
        try:
            after = load_weights(table.parent / line["after"])
            if line["before"] and line["before"] != sent[0]:
                sent = line["before"], load_weights(table.parent / line["before"])
            before = sent[1] if line["before"] else {name: torch.zeros_like(v) for name, v in after.items()}
            delta = difference(before, after)
            if not np.isfinite(delta).all():
                raise ValueError("the update holds NaN or infinity")
            columns = {name: int(line[name]) for name in COLUMNS}
            if columns["role"] not in (PRIOR, ANONYMOUS):
                raise ValueError(f"role must be {PRIOR} (prior) or {ANONYMOUS} (anonymous), got {columns['role']}")
            store = store or UpdateStore(layer_slices(before), path)
            store.append(delta[None], **columns)
        except ValueError as error:
            raise ValueError(f"{table} line {number}: {error}") from error
    assert store is not None
    return store


def load_weights(path: Path) -> State:
    """Float arrays of a .pt, .pth or .npz file; pickled objects are not loaded. ValueError if there are none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                return float_arrays(dict(content))
        content = torch.load(path, map_location="cpu", weights_only=True)
        return float_arrays(next((content[key] for key in STATE_KEYS if key in content), content))
    except Exception as error:  # zip, pickle and key errors of a foreign file
        raise ValueError(f"{path}: holds no weights ({str(error).splitlines()[0]})") from error
