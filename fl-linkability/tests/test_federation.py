"""Engines agree; faults are named; killed and continued; two ranks; Flower in process, on Ray and deployed."""

import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability.data.bundle import UserDataset
from fl_linkability.engines import simulate
from fl_linkability.federation import FedAvgConfig, Reply, kept_columns, load_checkpoint
from fl_linkability.mitigations import Background, CentralDP, Compose, GaussianNoise, Mitigation
from fl_linkability.models import MLP, Head
from fl_linkability.store import UpdateStore
from fl_linkability.train import LocalSGD, batch_table, epoch_orders, train_batched, train_one, trained_state

CONFIG = FedAvgConfig(rounds=4, clients_per_round=5, local=LocalSGD(2, 8, 0.1), seed=3)


def everything(bundle):
    """A mitigation that touches data, updates and the mean."""
    background = bundle.background
    parts = (Background(background.x, background.y, "random", 0.5), GaussianNoise(0.01), CentralDP(5.0, 0.01))
    return Compose(*(_as_both(part) for part in parts))


def _as_both(part):
    part.who = "both"
    return part


@pytest.mark.parametrize("mitigated", [False, True])
def test_engines_agree(bundle, mitigated):
    mitigation = everything(bundle) if mitigated else None
    results = {e: simulate(bundle, MLP, CONFIG, mitigation, e) for e in ("batched", "loop", "flower-inprocess")}
    reference = results["loop"].updates
    assert len(reference) == 20 and np.linalg.norm(reference.delta, axis=1).min() > 0.01
    for engine, result in results.items():
        np.testing.assert_allclose(result.updates.delta, reference.delta, rtol=0, atol=1e-5)
        assert (result.updates.index == reference.index).all() and result.faults == []
        assert result.engine["name"] == engine
        assert result.raw_norm == pytest.approx(results["loop"].raw_norm, rel=1e-4)
        for name, value in result.final_state.items():
            torch.testing.assert_close(value, results["loop"].final_state[name], rtol=0, atol=1e-5)
    assert results["flower-inprocess"].engine["flwr"] == version("flwr")


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(bundle):
    a, b = (simulate(bundle, MLP, CONFIG).updates.delta for _ in range(2))
    c = simulate(bundle, MLP, FedAvgConfig(4, 5, LocalSGD(2, 8, 0.1), seed=4)).updates.delta
    assert (a == b).all() and (a != c).any()


def test_only_anonymous_devices_mitigate_unless_told_otherwise(bundle):
    clean = simulate(bundle, MLP, FedAvgConfig(1, 8)).updates
    for who, changed in (("anon", [1]), ("both", [0, 1])):
        noisy = simulate(bundle, MLP, FedAvgConfig(1, 8), GaussianNoise(0.1, who)).updates
        differs = (noisy.delta != clean.delta).any(1)
        assert (differs == np.isin(clean.column("role"), changed)).all()


def test_fixed_background_stays_and_refreshed_changes(bundle):
    background = bundle.background
    for refresh, same in (("fixed", True), ("round", False)):
        seen = []
        mitigation = Background(background.x, background.y, "random", 1.0, refresh=refresh)
        simulate(bundle, MLP, FedAvgConfig(2, 8), _Spy(mitigation, seen))
        first, second = seen[:4], seen[4:]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == same


class _Spy(Mitigation):
    def __init__(self, inner, seen):
        super().__init__(inner.who, inner.refresh)
        self.inner, self.seen = inner, seen

    def prepare_data(self, x, y, rng):
        x, y = self.inner.prepare_data(x, y, rng)
        self.seen.append(x)
        return x, y


def test_every_device_is_as_likely(bundle):
    store = simulate(bundle, MLP, FedAvgConfig(400, 2)).updates
    counts = np.bincount(store.column("device"), minlength=8)
    assert counts.sum() == 800 and abs(counts - 100).max() < 40
    assert all(len(set(store.column("device")[store.column("round") == r])) == 2 for r in range(50))


# ---- local training --------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Without a stacked form, so that vmap is used."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3 * 16, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("make, multi", [(Conv, False), (lambda: MLP(36, 7, 4), False), (lambda: Head(36, 4), True)])
def test_batched_equals_loop_on_clients_of_different_sizes(make, multi):
    torch.manual_seed(0)
    model, rng = make().double(), np.random.default_rng(0)
    sizes, local = [13, 5, 8, 1], LocalSGD(2, 4, 0.1, momentum=0.9, weight_decay=0.01)
    x = torch.rand(sum(sizes), 1, 6, 6, dtype=torch.float64)
    y = torch.randint(0, 2, (len(x), 4)).float() if multi else torch.randint(4, (len(x),))
    orders = [epoch_orders(n, local.epochs, rng) for n in sizes]
    starts = np.cumsum([0, *sizes[:-1]])
    state = trained_state(model)
    deltas, losses = train_batched(model, state, x, y, *batch_table(orders, starts, 4), local)
    for k, (start, n) in enumerate(zip(starts, sizes, strict=True)):
        part = slice(start, start + n)
        expected, history = train_one(model, state, x[part], y[part], orders[k], local)
        atol = 1e-6 if multi else 1e-12  # the multi-label loss is taken in float32
        torch.testing.assert_close(deltas[k], expected, rtol=0, atol=atol)
        torch.testing.assert_close(losses[k][~losses[k].isnan()], history, rtol=0, atol=atol, check_dtype=False)


def test_uint8_images_train_as_floats(bundle):
    users = bundle.users
    bytes_ = (users.x * 255).round().to(torch.uint8)
    model, local = MLP(), LocalSGD(1, 4, 0.1)
    state, order = trained_state(model), epoch_orders(12, 1, np.random.default_rng(0))
    a, _ = train_one(model, state, bytes_[:12], users.y[:12], order, local)
    b, _ = train_one(model, state, bytes_[:12].float() / 255, users.y[:12], order, local)
    assert torch.equal(a, b)


# ---- faults ----------------------------------------------------------------------------------------------------


class _Faulty(Mitigation):
    """The second anonymous device that trains raises, or the second that sends has something else to send."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.prepared, self.sent = fault, 0, 0

    def prepare_data(self, x, y, rng):
        self.prepared += 1
        if self.fault == "raises" and self.prepared == 2:
            raise OSError("disk gone")
        return x, y

    def transform_update(self, delta, rng):
        self.sent += 1
        if self.sent != 2 or self.fault == "raises":
            return delta
        return np.full_like(delta, np.nan) if self.fault == "nan" else delta[:-1]


@pytest.mark.parametrize("engine", ["batched", "loop"])
@pytest.mark.parametrize("fault, reason", [("raises", "disk gone"), ("nan", "NaN"), ("shape", "of shape (8553,)")])
def test_a_faulty_client_is_named_left_out_and_counted(bundle, engine, fault, reason):
    result = simulate(bundle, MLP, FedAvgConfig(1, 8), _Faulty(fault), engine)
    (found,) = result.faults
    assert reason in found["reason"] and found["round"] == 0 and found["device"] % 2 == 1
    assert len(result.updates) == 7 and found["device"] not in result.updates.column("device")
    assert all(torch.isfinite(v).all() for v in result.final_state.values())
    with pytest.raises(RuntimeError, match="round 0: 7 of 8 updates are valid, min_clients is 8; last fault"):
        simulate(bundle, MLP, FedAvgConfig(1, 8, min_clients=8), _Faulty(fault), engine)


@pytest.mark.parametrize("fault, reason", [("raises", "failed: OSError('disk gone')"), ("nan", "NaN")])
def test_faulty_clients_of_flower(bundle, fault, reason):
    result = simulate(bundle, MLP, FedAvgConfig(1, 8), _Faulty(fault), "flower-inprocess")
    assert len(result.updates) == 7 and reason in result.faults[0]["reason"]


def test_replies_of_flower_that_are_no_updates(bundle, monkeypatch):
    from fl_linkability import flower

    original = flower.make_client_app

    def tampering(federation):
        app = original(federation)

        def call(message, context):
            reply = app(message, context)
            device = context.node_config["partition-id"]
            if message.metadata.message_type == "train" and device < 3:
                if device == 0:
                    del reply.content["arrays"]
                elif device == 1:
                    arrays = reply.content["arrays"].to_torch_state_dict()
                    arrays["fc2.bias"] = torch.zeros(3)
                    reply.content["arrays"] = flower.ArrayRecord(arrays)
                else:
                    reply.content["metrics"]["num-examples"] = 0
            return reply

        return call

    monkeypatch.setattr(flower, "make_client_app", tampering)
    result = simulate(bundle, MLP, FedAvgConfig(1, 8), engine="flower-inprocess")
    reasons = [fault["reason"] for fault in result.faults]
    assert "sent no 'arrays'" in reasons[0] and "wrong shapes {'fc2.bias': (3,)}" in reasons[1]
    assert "reports 0 examples" in reasons[2] and len(result.updates) == 5


def test_a_reply_without_update(bundle):
    from fl_linkability.federation import Federation
    from fl_linkability.train import make_fabric

    federation = Federation(bundle, MLP(), FedAvgConfig(1, 2), None, make_fabric("cpu"))
    replies = [Reply(4), Reply(1, np.zeros(8554, np.float32), 12)]
    federation.finish_round(0, trained_state(federation.model), replies)
    assert federation.faults == [{"round": 0, "device": 4, "reason": "sent no update"}]


def test_wrong_arguments(bundle):
    for make, message in (
        (lambda: simulate(bundle, MLP, FedAvgConfig(1, 9)), "9 clients per round, but 8 devices"),
        (lambda: simulate(bundle, MLP, CONFIG, engine="ray"), "engine must be one of batched, loop"),
        (lambda: LocalSGD(lr=0.0), "lr must be positive, got 0.0"),
        (lambda: LocalSGD(lr=float("nan")), "lr must be positive, got nan"),
        (lambda: LocalSGD(epochs=0), "must be at least 1, got 0"),
        (lambda: FedAvgConfig(rounds=0), "need at least 1 round"),
        (lambda: FedAvgConfig(clients_per_round=2, min_clients=3), "min_clients must lie in 1 .. 2, got 3"),
        (lambda: kept_columns({"fc": (0, 3)}, "conv"), "no parameter begins with 'conv'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- store and resume ------------------------------------------------------------------------------------------


def test_store_on_disk_and_in_memory_are_one(bundle, tmp_path):
    memory = simulate(bundle, MLP, CONFIG).updates
    simulate(bundle, MLP, CONFIG, folder=tmp_path)
    disk = UpdateStore.open(tmp_path / "updates")
    assert (disk.delta == memory.delta).all() and (disk.index == memory.index).all()
    assert isinstance(disk.delta, np.memmap) and not disk.delta.flags.writeable
    for options in ({}, {"layers": "fc2", "center": "leave-one-out"}, {"normalize": False}):
        np.testing.assert_allclose(disk.features(**options), memory.features(**options), rtol=0, atol=1e-12)
    assert disk.features("fc2").shape == (20, 330)
    with pytest.raises(ValueError, match="no layer begins with 'conv'; the layers are fc1.weight"):
        disk.features("conv")
    with pytest.raises(ValueError, match="center must be none or leave-one-out"):
        disk.features(center="mean")
    with pytest.raises(ValueError, match="holds updates of another network"):
        UpdateStore({"fc": (0, 4)}, tmp_path / "updates")
    with pytest.raises(ValueError, match=r"updates must be \(k, 8554\), got \(1, 3\)"):
        disk.append(np.zeros((1, 3)), round=0, device=0, user=0, role=0, n_examples=1)
    with pytest.raises(FileNotFoundError, match="no update store"):
        UpdateStore.open(tmp_path / "none")


def test_chosen_layers_are_stored(bundle):
    whole = simulate(bundle, MLP, CONFIG).updates
    part = simulate(bundle, MLP, CONFIG, keep="fc1.bias|fc2").updates
    assert part.delta.shape == (20, 32 + 330)
    np.testing.assert_array_equal(part.features("fc2"), whole.features("fc2"))


LONG = FedAvgConfig(12, 5, LocalSGD(1, 8, 0.1))


def long_run(bundle, folder, engine="batched", on_round=lambda finished: None):
    return simulate(
        bundle, MLP, LONG, GaussianNoise(0.01), engine, folder=folder, checkpoint_every=3, on_round=on_round,
        evaluate=lambda model, state: {"norm": sum(v.norm().item() for v in state.values())},
    )  # fmt: skip


def assert_equal_runs(a, b):
    assert all(torch.equal(a.final_state[name], b.final_state[name]) for name in a.final_state)
    assert a.utility == b.utility and len(a.utility) == 5 and a.raw_norm == b.raw_norm
    assert len(a.updates) == 60 and (a.updates.index == b.updates.index).all()
    assert (a.updates.delta == b.updates.delta).all()


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from fl_linkability.data.styled import make_digits_users
from test_federation import long_run
bundle = make_digits_users(0, n_users=4, n_per_device=12, background_size=120)
long_run(bundle, Path(sys.argv[2]), on_round=lambda finished: time.sleep(0.1))
"""


def test_sigkill_and_continue_is_bit_equal(bundle, tmp_path):
    command = [sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path / "killed"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.02)
        assert child.poll() is None
    time.sleep(0.25)  # some way into the rounds after the checkpoint
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["round"]
    assert 3 <= reached < 12
    assert_equal_runs(long_run(bundle, tmp_path / "whole"), long_run(bundle, tmp_path / "killed"))


@pytest.mark.parametrize("engine", ["loop", "flower-inprocess"])
def test_interrupted_and_continue_is_bit_equal(bundle, tmp_path, engine):
    def interrupt(finished):
        if finished == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        long_run(bundle, tmp_path / "cut", engine, interrupt)
    assert len(UpdateStore.open(tmp_path / "cut" / "updates")) == 40  # two rounds that no checkpoint knows
    assert_equal_runs(long_run(bundle, tmp_path / "whole", engine), long_run(bundle, tmp_path / "cut", engine))


def test_a_checkpoint_of_another_run_or_damaged_is_refused(bundle, tmp_path):
    simulate(bundle, MLP, CONFIG, folder=tmp_path)
    assert len(simulate(bundle, MLP, CONFIG, folder=tmp_path).updates) == 20  # nothing is run again
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different mitigation\)"):
        simulate(bundle, MLP, CONFIG, GaussianNoise(1.0), folder=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different config\)"):
        simulate(bundle, MLP, FedAvgConfig(5, 5, CONFIG.local, 3), folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        simulate(bundle, MLP, CONFIG, folder=tmp_path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none")


DISTRIBUTED = """
import sys
import torch
torch.set_num_threads(1)
from fl_linkability.data.styled import make_digits_users
from fl_linkability.engines import simulate
from fl_linkability.federation import FedAvgConfig
from fl_linkability.mitigations import GaussianNoise
from fl_linkability.models import MLP
from fl_linkability.train import LocalSGD, make_fabric
fabric = make_fabric("cpu")
bundle = make_digits_users(0, n_users=4, n_per_device=12, background_size=120)
result = simulate(bundle, MLP, FedAvgConfig(3, 5, LocalSGD(1, 8, 0.1)), GaussianNoise(0.01), fabric=fabric)
state = torch.cat([v.flatten() for v in result.final_state.values()])
everyone = fabric.all_gather(state).view(fabric.world_size, -1)
if fabric.global_rank == 0:
    assert fabric.world_size == 2 and (everyone == state).all()
    delta, index = torch.from_numpy(result.updates.delta), torch.from_numpy(result.updates.index)
    torch.save({"state": state, "delta": delta, "index": index, "norm": result.raw_norm}, sys.argv[1])
else:
    assert result.updates is None
"""


def test_two_ranks_equal_one(bundle, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, tmp_path / "two"], check=True, capture_output=True)
    two = torch.load(tmp_path / "two", weights_only=True)
    one = simulate(bundle, MLP, FedAvgConfig(3, 5, LocalSGD(1, 8, 0.1)), GaussianNoise(0.01))
    assert (two["index"].numpy() == one.updates.index).all() and one.raw_norm == pytest.approx(two["norm"], rel=1e-5)
    np.testing.assert_allclose(two["delta"], one.updates.delta, rtol=0, atol=1e-6)
    state = torch.cat([v.flatten() for v in one.final_state.values()])
    torch.testing.assert_close(two["state"], state, rtol=0, atol=1e-6)


def test_users_without_their_own_devices_are_refused():
    with pytest.raises(ValueError, match="device 1 has no images"):
        UserDataset(torch.rand(2, 3), torch.zeros(2).long(), torch.tensor([0, 0]), torch.tensor([0, 2]))
