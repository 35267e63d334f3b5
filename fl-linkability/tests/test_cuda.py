"""Engines, resuming, utility, features and table rows on a CUDA device, held against the CPU in float32."""

from functools import partial

import numpy as np
import pytest
import torch

from fl_linkability import catalogue
from fl_linkability.catalogue import tables
from fl_linkability.data.photos import embed
from fl_linkability.data.reading import Reading
from fl_linkability.engines import simulate
from fl_linkability.evaluate import predict, utility
from fl_linkability.experiments import run_tables
from fl_linkability.federation import FedAvgConfig
from fl_linkability.mitigations import Background, CentralDP, Compose, GaussianNoise
from fl_linkability.models import CNN, MLP, Head, TextLSTM
from fl_linkability.models.mobilenet import MobileNetV2
from fl_linkability.recording import difference, float_arrays
from fl_linkability.train import (
    LocalSGD,
    batch_table,
    epoch_orders,
    make_fabric,
    train_batched,
    train_one,
    trained_state,
)

DEVICE = "cuda"
TABLES = {table.id: table for table in tables()}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = FedAvgConfig(rounds=4, clients_per_round=5, local=LocalSGD(2, 8, 0.1), seed=3)
NETWORKS = {"mlp": MLP, "cnn": partial(CNN, 16, 64, 10)}


def relative_gap(ours, theirs):
    """Of two sets of updates (n, D): the largest distance of a pair of rows, relative to their length."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", ["batched", "loop"])
@pytest.mark.parametrize("precision, tolerance", [("auto", 0.3), ("32-true", 0.01)])
def test_updates_are_the_cpu_s(bundle, engine, network, precision, tolerance):
    """In bf16, the CPU's own updates are up to 0.18 from those in float32."""
    expected = simulate(bundle, NETWORKS[network], CONFIG, engine="loop")
    found = simulate(bundle, NETWORKS[network], CONFIG, engine=engine, fabric=make_fabric(DEVICE, precision))
    assert not found.faults and (found.updates.index == expected.updates.index).all()
    assert found.updates.delta.dtype == np.float32
    assert relative_gap(found.updates.delta, expected.updates.delta) < tolerance


def test_mitigated_updates_are_the_cpu_s(bundle):
    background = bundle.background
    parts = (Background(background.x, background.y, "random", 0.5), GaussianNoise(0.01), CentralDP(5.0, 0.01))
    results = [
        simulate(bundle, MLP, CONFIG, Compose(*parts[:2]), fabric=make_fabric(device)) for device in ("cpu", DEVICE)
    ]
    assert relative_gap(results[1].updates.delta, results[0].updates.delta) < 0.1
    assert results[1].raw_norm == pytest.approx(results[0].raw_norm, rel=0.05)
    private = simulate(bundle, MLP, CONFIG, parts[2], fabric=make_fabric(DEVICE))
    assert all(value.isfinite().all() for value in private.final_state.values())


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_labels_that_do_not_exclude_each_other(engine):
    """Binary cross-entropy of the head, momentum and weight decay, with one client of fewer samples."""
    generator, local = torch.Generator().manual_seed(0), LocalSGD(2, 4, 0.1, 0.9, 1e-3)
    x, y = torch.randn(22, 12, generator=generator), (torch.rand(22, 5, generator=generator) < 0.3).float()
    orders = [epoch_orders(n, 2, np.random.default_rng(n)) for n in (12, 10)]
    found = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        fabric, model = make_fabric(device), Head(12, 5)
        model = model.to(fabric.device)
        state, data = trained_state(model), (x.to(fabric.device), y.to(fabric.device))
        if engine == "batched":
            rows, weights = (part.to(fabric.device) for part in batch_table(orders, [0, 12], 4))
            deltas, _ = train_batched(model, state, *data, rows, weights, local, fabric.autocast)
        else:
            starts = ((0, 12), (12, 22))
            parts = [
                train_one(model, state, *(each[a:b] for each in data), order, local, fabric.autocast)[0]
                for (a, b), order in zip(starts, orders, strict=True)
            ]
            deltas = torch.stack(parts)
        found[device] = deltas.cpu().numpy()
    assert relative_gap(found[DEVICE], found["cpu"]) < 0.05


@pytest.mark.parametrize("next_word", [True, False])
@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_updates_of_an_lstm_are_the_cpu_s(engine, next_word):
    """Texts of several lengths, padded; in float32 whatever the precision."""
    generator, local = torch.Generator().manual_seed(0), LocalSGD(2, 4, 0.2)
    x = torch.randint(1, 9, (10, 6), generator=generator) * (torch.arange(6) < torch.arange(10)[:, None] % 4 + 3)
    y = x.roll(-1, 1) if next_word else torch.rand(10, generator=generator)
    order, found = epoch_orders(10, 2, np.random.default_rng(0)), {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        fabric, model = make_fabric(device), TextLSTM(9, 4, 5, next_word)
        model = model.to(fabric.device)
        state, data = trained_state(model), (x.to(fabric.device), y.to(fabric.device))
        if engine == "batched":
            rows, weights = (part.to(fabric.device) for part in batch_table([order], [0], 4))
            delta, _ = train_batched(model, state, *data, rows, weights, local, fabric.autocast)
        else:
            delta = train_one(model, state, *data, order, local, fabric.autocast)[0][None]
        found[device] = delta.cpu().numpy()
    assert relative_gap(found[DEVICE], found["cpu"]) < 0.01


@pytest.mark.parametrize("bn, engine", [("frozen", "batched"), ("local", "loop"), ("sent", "loop")])
def test_a_mobilenet_takes_steps(bn, engine):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 3, 32, 32, generator=generator), (torch.rand(8, 3, generator=generator) < 0.5).float()
    fabric, local = make_fabric(DEVICE), LocalSGD(1, 4, 0.01)
    torch.manual_seed(0)
    model = MobileNetV2(3, pretrained=False, bn=bn).to(fabric.device)
    state, order = trained_state(model), epoch_orders(8, 1, np.random.default_rng(0))
    x, y = x.to(fabric.device), y.to(fabric.device)
    if engine == "batched":
        rows, weights = (part.to(fabric.device) for part in batch_table([order], [0], 4))
        delta, losses = (each[0] for each in train_batched(model, state, x, y, rows, weights, local, fabric.autocast))
    else:
        delta, losses = train_one(model, state, x, y, order, local, fabric.autocast)
    assert delta.isfinite().all() and delta.abs().sum() > 0 and 0.3 < losses.mean() < 1.5


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_an_interrupted_run_ends_where_the_whole_one_does(bundle, tmp_path, engine):
    class Stop(Exception):
        pass

    def stop(finished):
        if finished == 3:
            raise Stop

    options = {"engine": engine, "fabric": make_fabric(DEVICE)}
    whole = simulate(bundle, MLP, CONFIG, **options)
    folder = {"folder": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(Stop):
        simulate(bundle, MLP, CONFIG, **options, **folder, on_round=stop)
    torch.manual_seed(99)
    resumed = simulate(bundle, MLP, CONFIG, **options, **folder)
    assert (resumed.updates.index == whole.updates.index).all()
    assert relative_gap(resumed.updates.delta, whole.updates.delta) < 0.02


def test_utility_is_the_cpu_s(bundle):
    """Float32 on both, up to TF32 in the convolutions."""
    torch.manual_seed(0)
    network = NETWORKS["cnn"]()
    state = simulate(bundle, lambda: network, CONFIG).final_state
    there = {name: value.to(DEVICE) for name, value in state.items()}
    moved = NETWORKS["cnn"]().to(DEVICE)
    logits, expected = predict(moved, there, bundle.test[0]), predict(network, state, bundle.test[0])
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.01)
    ours, theirs = utility(bundle, moved, there), utility(bundle, network, state)
    assert ours["user"] == pytest.approx(theirs["user"], abs=2)
    assert ours["population"] == pytest.approx(theirs["population"], abs=2)


def test_features_of_a_frozen_network_are_the_cpu_s(tmp_path):
    images = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    here, there = (embed(images, False, tmp_path / device, make_fabric(device)) for device in ("cpu", DEVICE))
    assert there.dtype == torch.float32 and there.device.type == "cpu"
    assert (there - here).norm() < 0.1 * here.norm()


def test_weights_on_the_device_are_recorded():
    before = {"fc.weight": torch.zeros(2, 3), "steps": torch.tensor(1)}
    after = {"fc.weight": torch.ones(2, 3, device=DEVICE, dtype=torch.bfloat16), "steps": torch.tensor(2)}
    assert difference(float_arrays(before), after).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "table, row",
    [("table-2", "Digits, federated"), ("table-2", "Digits, centralised SGD"), ("table-3", "Digits, random, MLP")],
)
def test_a_row_of_a_table(tmp_path, monkeypatch, table, row):
    monkeypatch.setattr(catalogue, "PROJECT", tmp_path)
    (record,) = run_tables([TABLES[table]], "smoke", Reading(tmp_path), rows=[row]).records()
    assert record["precision"] == "bf16-mixed" and record["device"] == torch.cuda.get_device_name()
    assert record["metrics"] and all(np.isfinite(value) for value in record["metrics"].values())
