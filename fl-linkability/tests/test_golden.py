"""The fixtures of tests/golden, each to its stated tolerance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability import privacy
from fl_linkability.features import cosine, leave_one_out, unit
from fl_linkability.linkage import identification_metrics, matching_metrics, open_world_metrics
from fl_linkability.mitigations import CentralDP, water_filling, weighted_mean
from fl_linkability.train import LocalSGD, batch_table, flatten, train_batched, train_one, trained_state, unflatten

GOLDEN = Path(__file__).parent / "golden"
PARAMETERS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def load(name):
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


@pytest.mark.parametrize("case", ["gaussian", "ties_rounded", "constant", "absent_user"])
def test_identification(case):
    data, expected = load("identification.npz"), load("identification.json")[case]
    found = identification_metrics(data[f"{case}.scores"], data[f"{case}.labels"])
    for name, value in expected.items():
        value = np.array([np.nan if v is None else v for v in value] if isinstance(value, list) else value, float)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case, key", [("main", "scores"), ("tied", "scores_tied")])
def test_open_world(case, key):
    data, expected = load("open_world.npz"), load("open_world.json")[case]
    found = open_world_metrics(data[key], data["labels"], far=(0.01, 0.1, 0.5))
    assert abs(found["auroc"] - expected["auroc_known_vs_unknown"]) < 1e-9
    assert abs(found["ap"] - expected["ap_known"]) < 1e-9
    for rate in ("0.01", "0.1", "0.5"):
        assert found[f"dir_at_far_{rate}"] == pytest.approx(expected[f"dir_at_far_{rate}"], abs=1e-9)


def test_matching():
    data, expected = load("matching.npz"), load("matching.json")
    scores = cosine(data["device_a"], data["device_b"])
    np.testing.assert_allclose(scores, data["cosine"], rtol=0, atol=1e-9)
    found = matching_metrics(scores, data["users_a"], data["users_b"])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_centring_and_unit_length():
    data = load("features.npz")
    rounds = np.repeat(np.arange(4), 10)
    centred = leave_one_out(data["deltas"].reshape(40, 25), rounds)
    np.testing.assert_allclose(centred.reshape(4, 10, 25), data["loo_centred"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(unit(centred).reshape(4, 10, 25), data["unit"], rtol=0, atol=1e-9)


def test_weighted_mean_and_the_order_of_an_update():
    data = load("fedavg.npz")
    clients = [
        flatten({p: torch.from_numpy(data[f"clients.{p}"][k] - data[f"global.{p}"]) for p in PARAMETERS})
        for k in range(5)
    ]
    deltas = torch.stack(clients).numpy()
    np.testing.assert_array_equal(deltas, data["delta_flat"])
    like = {p: torch.from_numpy(data[f"global.{p}"]) for p in PARAMETERS}
    flat = torch.from_numpy(weighted_mean(deltas, data["num_examples"]))
    state = unflatten(flatten(like).double() + flat, like)
    uniform = unflatten(flatten(like).double() + torch.from_numpy(weighted_mean(deltas, np.ones(5))), like)
    for p in PARAMETERS:
        np.testing.assert_allclose(state[p], data[f"oracle64.{p}"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(state[p], data[f"flwr_agg.{p}"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(uniform[p], data[f"uniform64.{p}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_clipping(case):
    data, facts = load("clipping.npz"), load("dp.json")["clip_cases"][case]
    old, new = data[f"case{case}.global_flat"], data[f"case{case}.params_flat"]
    clipped = privacy.clip(new - old, facts["clipping_norm"])
    np.testing.assert_allclose(old + clipped, data[f"case{case}.clipped_params_flat"], rtol=0, atol=1e-6)
    assert (np.linalg.norm(new - old) > facts["clipping_norm"]) == facts["was_clipped"]


def test_central_noise_is_flower_s():
    for c in load("dp.json")["central_dp_sigma"]:
        found = CentralDP(c["clipping_norm"], c["noise_multiplier"]).sigma_of_mean(c["num_sampled_clients"])
        assert found == pytest.approx(c["sigma_of_average"], rel=1e-12)


def test_the_exact_accountant_lies_below_the_classical_formula_and_renyi_s_bound():
    """Both are upper bounds where they hold: the classical sigma up to epsilon 1, Renyi DP everywhere."""
    dp = load("dp.json")
    for c in dp["local_dp_sigma"]:
        exact = privacy.gaussian_sigma(c["epsilon"], c["delta"], c["sensitivity"])
        if c["epsilon"] <= 1:
            assert 0.5 * c["sigma"] < exact < c["sigma"]
    for c in dp["rdp_accountant_flwr"]:
        found = privacy.gaussian_epsilon(c["noise_multiplier"], c["releases"], c["delta"])
        assert 0.8 * c["epsilon"] < found < c["epsilon"]


def test_water_filling():
    for case in load("calibrated_allocation.json"):
        assert water_filling(case["counts"], case["m"]).tolist() == case["added"]


@pytest.mark.parametrize("form", ["batched", "loop"])
@pytest.mark.parametrize("dtype, key, atol", [(torch.float32, "f32", 2e-6), (torch.float64, "f64", 1e-10)])
def test_local_training(form, dtype, key, atol):
    data = load("local_training.npz")
    lr, momentum, weight_decay, epochs, batch_size = data["hyper"]
    local = LocalSGD(int(epochs), int(batch_size), lr, momentum, weight_decay)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)).to(dtype)
    model.load_state_dict({n[5:]: torch.from_numpy(data[n]).to(dtype) for n in data if n.startswith("init.")})
    state = trained_state(model)
    x, y = torch.from_numpy(data["x"]).to(dtype), torch.from_numpy(data["y"])
    if form == "batched":
        table = batch_table(list(data["order"]), [24 * k for k in range(6)], local.batch_size)
        deltas, losses = train_batched(model, state, x.flatten(0, 1), y.flatten(), *table, local)
    else:
        parts = [train_one(model, state, x[k], y[k], data["order"][k], local) for k in range(6)]
        deltas, losses = (torch.stack(each) for each in zip(*parts, strict=True))
    np.testing.assert_allclose(deltas, data[f"delta_{key}"], rtol=0, atol=atol)
    np.testing.assert_allclose(losses, data[f"loss_{key}"], rtol=0, atol=atol)
