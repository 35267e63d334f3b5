"""Federated averaging with every update kept (section 3, algorithm 1): one round, its faults and its checkpoint.

`engines.simulate` runs the rounds. Every random draw has its own generator, identified by seed, purpose, round and
device, so that engines, ranks and resumed runs agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fl_linkability.data.bundle import ANONYMOUS, FederatedBundle
from fl_linkability.mitigations import Mitigation
from fl_linkability.store import UpdateStore
from fl_linkability.train import (
    LocalSGD,
    State,
    batch_table,
    epoch_orders,
    flatten,
    layer_slices,
    train_batched,
    train_one,
    trained_state,
    unflatten,
)
from shared_utils.files import whole_file
from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = get_logger("fl_linkability")
STREAMS = ("devices", "order", "data", "update", "server", "network")


@dataclass(frozen=True)
class FedAvgConfig:
    """Rounds, clients per round and what they do; the defaults are the paper's where it gives them."""

    rounds: int = 200
    clients_per_round: int = 8
    local: LocalSGD = field(default_factory=LocalSGD)
    seed: int = 0
    min_clients: int = 1
    """valid updates that a round needs"""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.clients_per_round < 1:
            raise ValueError(f"need at least 1 round and 1 client, got {self.rounds} and {self.clients_per_round}")
        if not 1 <= self.min_clients <= self.clients_per_round:
            raise ValueError(f"min_clients must lie in 1 .. {self.clients_per_round}, got {self.min_clients}")


@dataclass
class Reply:
    """What came from a device in a round: an update (D,), or the reason why there is none."""

    device: int
    delta: np.ndarray | None = None
    n_examples: int = 0
    raw_norm: float = float("nan")
    error: str = ""

    def fault(self, dimension: int) -> str:
        """Why this is not an update of the expected size; empty if it is."""
        if self.error or self.delta is None:
            return self.error or "sent no update"
        if self.delta.shape != (dimension,):
            return f"sent an update of shape {self.delta.shape}, expected {(dimension,)}"
        if not np.isfinite(self.delta).all():
            return "sent NaN or infinite values"
        return "" if self.n_examples >= 1 else f"reports {self.n_examples} examples"


def ignore(finished: int) -> None:
    """Default `on_round`: does nothing."""


class Federation:
    """One run: its data, its network and what has been collected so far."""

    def __init__(
        self, bundle: FederatedBundle, model: nn.Module, config: FedAvgConfig, mitigation: Mitigation | None,
        fabric: Fabric, folder: Path | None = None, checkpoint_every: int = 50, keep: str = "all",
    ):  # fmt: skip
        if config.clients_per_round > bundle.users.n_devices:
            raise ValueError(f"{config.clients_per_round} clients per round, but {bundle.users.n_devices} devices")
        self.users, self.model, self.config, self.fabric = bundle.users, model, config, fabric
        self.mitigation = mitigation or Mitigation()
        self.like = trained_state(model)
        self.folder, self.checkpoint_every = folder, checkpoint_every
        self.kept, layers = kept_columns(layer_slices(self.like), keep)
        self.store = UpdateStore(layers, folder / "updates" if folder else None) if fabric.global_rank == 0 else None
        self.run = {"config": asdict(config), "data": bundle.record(), "mitigation": self._describe_mitigation()}
        self.next_round, self.evaluate_from, self.clients_at_once = 0, 0, 0
        self.utility: list[dict] = []
        self.faults: list[dict] = []
        self.raw_norms: list[float] = []
        self.evaluate: Callable[[nn.Module, State], dict] | None = None
        self.on_round: Callable[[int], None] = ignore

    def for_client(self) -> Federation:
        """A copy without fabric, the server's store and callbacks, to be sent to client processes."""
        client = copy.copy(self)
        client.store = client.evaluate = None
        client.on_round = ignore
        del client.fabric  # each process makes its own
        return client

    def rng(self, stream: str, number: int = 0, device: int = 0) -> np.random.Generator:
        """The generator of one purpose, round and device."""
        return np.random.default_rng([self.config.seed, STREAMS.index(stream), number, device])

    def devices_of_round(self, number: int) -> np.ndarray:
        """Devices that train in a round, ascending: each subset is equally likely."""
        chosen = self.rng("devices", number).permutation(self.users.n_devices)[: self.config.clients_per_round]
        return np.sort(chosen)

    def mitigates(self, device: int) -> bool:
        """Whether the mitigation is applied on this device."""
        return self.mitigation.who == "both" or self.users.device_role[device] == ANONYMOUS

    def data(self, device: int, number: int) -> tuple[Tensor, Tensor]:
        """What a device trains on in a round, mitigation included."""
        x, y = self.users.of_device(device)
        if self.mitigates(device):
            when = number + 1 if self.mitigation.refresh == "round" else 0
            x, y = self.mitigation.prepare_data(x, y, self.rng("data", when, device))
        return x, y

    def loop_reply(self, state: State, device: int, number: int) -> Reply:
        """One client's round, as Flower's clients run it."""
        x, y = (part.to(self.fabric.device) for part in self.data(device, number))
        order = epoch_orders(len(x), self.config.local.epochs, self.rng("order", number, device))
        cards = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(cards):  # dropout's masks do not depend on what ran before
            torch.manual_seed(int(self.rng("network", number, device).integers(2**63)))
            delta, _ = train_one(self.model, state, x, y, order, self.config.local, self.fabric.autocast)
        return self._reply(delta.cpu().numpy(), device, number, len(x))

    def loop_replies(self, state: State, devices: np.ndarray, number: int) -> list[Reply]:
        """The round, one client after the other; a client that raises counts as a fault and does not end the run."""
        replies = []
        for device in self._mine(devices):
            try:
                replies.append(self.loop_reply(state, int(device), number))
            except Exception as error:
                replies.append(Reply(int(device), error=repr(error)))
        return self._gather(replies)

    def batched_replies(self, state: State, devices: np.ndarray, number: int) -> list[Reply]:
        """The round, with its clients trained at once."""
        replies: list[Reply] = []
        ready: list[tuple[int, Tensor, Tensor]] = []
        for device in map(int, self._mine(devices)):
            try:
                ready.append((device, *self.data(device, number)))
            except Exception as error:
                replies.append(Reply(device, error=repr(error)))
        size = self.clients_at_once or max(len(ready), 1)
        for part in (ready[i : i + size] for i in range(0, len(ready), size)):
            numbers = [len(x) for _, x, _ in part]
            local = self.config.local
            orders = [epoch_orders(len(x), local.epochs, self.rng("order", number, device)) for device, x, _ in part]
            rows, weights = batch_table(orders, np.cumsum([0, *numbers[:-1]]), local.batch_size)
            x, y = torch.cat([x for _, x, _ in part]), torch.cat([y for *_, y in part])
            x, y, rows, weights = (t.to(self.fabric.device, non_blocking=True) for t in (x, y, rows, weights))
            deltas, _ = train_batched(self.model, state, x, y, rows, weights, local, self.fabric.autocast)
            for (device, *_), delta, n in zip(part, deltas.cpu().numpy(), numbers, strict=True):
                replies.append(self._reply(delta, device, number, n))
        return self._gather(replies)

    def _reply(self, delta: np.ndarray, device: int, number: int, n: int) -> Reply:
        norm = float("nan")
        if self.mitigates(device):
            norm = float(np.linalg.norm(delta))
            delta = self.mitigation.transform_update(delta, self.rng("update", number, device))
        return Reply(device, delta, n, norm)

    def _mine(self, devices: np.ndarray) -> np.ndarray:
        return devices[self.fabric.global_rank :: self.fabric.world_size]

    def _gather(self, replies: list[Reply]) -> list[Reply]:
        """All ranks' replies on every rank; updates travel as one float32 tensor per rank."""
        world = self.fabric.world_size
        if world == 1:
            return replies
        facts: list[list[Reply]] = [[] for _ in range(world)]
        dist.all_gather_object(facts, [Reply(r.device, None, r.n_examples, r.raw_norm, r.error) for r in replies])
        most, dimension = max(map(len, facts)), sum(v.numel() for v in self.like.values())
        mine = torch.zeros(most, dimension, device=self.fabric.device)
        for row, reply in enumerate(replies):
            if reply.delta is not None:
                mine[row] = torch.from_numpy(reply.delta).to(mine)
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        gathered = []
        for part, deltas in zip(facts, everyone, strict=True):
            for reply, delta in zip(part, deltas.cpu().numpy(), strict=False):
                gathered.append(reply if reply.error else Reply(**(vars(reply) | {"delta": delta})))
        return gathered

    def finish_round(self, number: int, state: State, replies: Sequence[Reply]) -> State:
        """Leave out invalid replies, store and average the others, and save when due.

        Raises:
            RuntimeError: fewer than min_clients valid updates.
        """
        valid = self._valid(number, sorted(replies, key=lambda reply: reply.device))
        deltas = np.stack([reply.delta for reply in valid if reply.delta is not None])
        counts, devices = (np.array([getattr(reply, n) for reply in valid]) for n in ("n_examples", "device"))
        if self.store is not None:
            users, roles = self.users.device_user[devices], self.users.device_role[devices]
            self.store.append(
                deltas[:, self.kept], round=number, device=devices, user=users, role=roles, n_examples=counts
            )
        self.raw_norms += [reply.raw_norm for reply in valid if np.isfinite(reply.raw_norm)]
        mean = self.mitigation.aggregate(deltas, counts, self.rng("server", number))
        flat = flatten(state)
        state = unflatten(flat + torch.from_numpy(mean).to(flat), self.like)
        for name, value in state.items():
            if name.endswith("running_var"):  # noise may have made a variance negative
                state[name] = value.clamp(min=0)
        if self.evaluate and number >= self.evaluate_from:
            self.utility.append(self.evaluate(self.model, state))
        self.next_round = number + 1
        if self.folder and (self.next_round % self.checkpoint_every == 0 or self.next_round == self.config.rounds):
            self._save(self.folder, state)
        self.on_round(self.next_round)
        return state

    def _valid(self, number: int, replies: Sequence[Reply]) -> list[Reply]:
        dimension, valid = sum(v.numel() for v in self.like.values()), []
        for reply in replies:
            if reason := reply.fault(dimension):
                self.faults.append({"round": number, "device": int(reply.device), "reason": reason})
                logger.warning("round %d: device %d is left out: %s", number, reply.device, reason)
            else:
                valid.append(reply)
        if len(valid) < self.config.min_clients:
            raise RuntimeError(
                f"round {number}: {len(valid)} of {len(replies)} updates are valid, min_clients is "
                f"{self.config.min_clients}; last fault: {self.faults[-1] if self.faults else 'no reply at all'}"
            )
        return valid

    def _describe_mitigation(self) -> str:
        """Names and numbers of the mitigation and its parts, for the checkpoint."""
        parts = getattr(self.mitigation, "parts", [self.mitigation])
        plain = [{k: v for k, v in vars(p).items() if isinstance(v, int | float | str)} for p in parts]
        return repr([(type(part).__name__, facts) for part, facts in zip(parts, plain, strict=True)])

    def _save(self, folder: Path, state: State) -> None:
        if self.store is not None:
            content = {
                "run": self.run, "round": self.next_round, "state": {k: v.cpu() for k, v in state.items()},
                "updates": len(self.store), "utility": self.utility, "faults": self.faults,
                "raw_norms": self.raw_norms, "rng": rng_state(),
            }  # fmt: skip
            with whole_file(folder / "checkpoint.pt") as temporary:
                torch.save(content, temporary)
        self.fabric.barrier()

    def resume(self, state: State) -> State:
        """Resume from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt" if self.folder else None
        if path is None or not path.exists():
            if self.store is not None:
                self.store.truncate(0)
            return state
        content = load_checkpoint(path)
        if content["run"] != self.run:
            names = [name for name in self.run if content["run"][name] != self.run[name]]
            raise ValueError(f"{path}: checkpoint of another run (different {', '.join(names)}); name another folder")
        if self.store is not None:
            self.store.truncate(content["updates"])
        self.next_round, self.utility = content["round"], content["utility"]
        self.faults, self.raw_norms = content["faults"], content["raw_norms"]
        restore_rng_state(content["rng"])
        logger.info("continuing after round %d from %s", self.next_round, path)
        return {name: value.to(self.fabric.device) for name, value in content["state"].items()}


def kept_columns(
    layers: dict[str, tuple[int, int]], keep: str
) -> tuple[slice | np.ndarray, dict[str, tuple[int, int]]]:
    """Which columns of an update are stored, and where each layer lies among them. ValueError if none is."""
    if keep == "all":
        return slice(None), layers
    chosen = {name: span for name, span in layers.items() if name.startswith(tuple(keep.split("|")))}
    if not chosen:
        raise ValueError(f"keep: no parameter begins with {keep!r}; the parameters are {', '.join(layers)}")
    ends = np.cumsum([b - a for a, b in chosen.values()]).tolist()
    spans = dict(zip(chosen, zip([0, *ends[:-1]], ends, strict=True), strict=True))
    return np.concatenate([np.arange(a, b) for a, b in chosen.values()]), spans


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of `simulate`, on the CPU and with weights_only. ValueError if it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["run"]["config"], content["state"], content["round"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({reason}); name another folder to start again"
        ) from error
    return content
