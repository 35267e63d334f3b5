"""Networks with frozen layers, dropout and batch norm: the same updates by every engine, or a refusal."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability.data.bundle import Background, FederatedBundle, UserDataset
from fl_linkability.engines import simulate
from fl_linkability.evaluate import predict
from fl_linkability.federation import FedAvgConfig
from fl_linkability.mitigations import GaussianNoise
from fl_linkability.models import MLP
from fl_linkability.train import LocalSGD, epoch_orders

CONFIG = FedAvgConfig(rounds=4, clients_per_round=5, local=LocalSGD(2, 8, 0.1), seed=3)


class Frozen(nn.Module):
    """Its first layer and one bias stay as they are."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(256, 16), nn.Linear(16, 10)
        self.body.requires_grad_(False)
        self.fc.bias.requires_grad_(False)

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).relu())


class FrozenMLP(MLP):
    """Has a stacked form by inheritance, which trains everything."""

    def __init__(self):
        super().__init__()
        self.fc1.requires_grad_(False)


class OtherForward(MLP):
    """Inherits a stacked form that is not its own network's."""

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)).tanh())


class Normed(nn.Module):
    def __init__(self, momentum=0.5):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum)
        self.fc = nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.fc(nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.drop, self.fc = nn.Linear(256, 16), nn.Dropout(0.5), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.drop(self.body(x.flatten(1)).relu()))


@pytest.mark.parametrize("make", [Frozen, FrozenMLP, OtherForward])
def test_any_network_gives_the_same_updates_by_every_engine(bundle, make):
    results = {e: simulate(bundle, make, CONFIG, engine=e) for e in ("loop", "batched", "flower-inprocess")}
    reference = results["loop"]
    for result in results.values():
        np.testing.assert_allclose(result.updates.delta, reference.updates.delta, rtol=0, atol=1e-5)
        assert np.linalg.norm(result.updates.delta, axis=1).min() > 0.01 and result.faults == []


@pytest.mark.parametrize("engine", ["batched", "loop", "flower-inprocess"])
def test_frozen_layers_do_not_move_and_are_not_sent(bundle, engine):
    torch.manual_seed(CONFIG.seed)
    start = Frozen().state_dict()
    result = simulate(bundle, Frozen, CONFIG, engine=engine)
    assert list(result.updates.layer_slices) == ["fc.weight"] and result.dimension == 160
    for name, value in result.final_state.items():
        assert torch.equal(value, start[name]) == (name != "fc.weight")


@pytest.mark.parametrize("make, reason", [(Normed, "batch norm in training mode"), (Dropping, "random operation")])
def test_batched_refuses_what_it_would_train_otherwise(bundle, make, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        simulate(bundle, make, CONFIG)
    assert 'needs engine "loop"' in str(refused.value) and "\n" not in str(refused.value)


def test_dropout_is_the_client_s_own(bundle):
    """Alike by loop and Flower, whoever else trains in the round, and whatever torch drew before."""
    loop, flower = (simulate(bundle, Dropping, CONFIG, engine=e).updates for e in ("loop", "flower-inprocess"))
    assert (loop.delta == flower.delta).all()
    everyone = simulate(bundle, Dropping, FedAvgConfig(1, 8, CONFIG.local, CONFIG.seed), engine="loop").updates
    first = loop.column("round") == 0
    assert (everyone.delta[loop.column("device")[first]] == loop.delta[first]).all()


def test_two_clients_with_the_same_data_drop_other_units():
    x, y = torch.rand(1, 1, 16, 16).repeat(24, 1, 1, 1), torch.full((24,), 3)  # so that no order matters
    device = torch.arange(4).repeat_interleave(6)
    users = UserDataset(x, y, device // 2, device, check_images=False)
    bundle = FederatedBundle("same", users, (x, y, device // 2), (x, y), Background(x, y), 10)
    whole = FedAvgConfig(1, 4, LocalSGD(1, 6, 0.1))
    for make, alike in ((Frozen, True), (Dropping, False)):
        delta = simulate(bundle, make, whole, engine="loop").updates.delta
        assert all(np.allclose(delta[0], other, atol=1e-6) == alike for other in delta[1:])


@pytest.mark.parametrize("momentum", [0.5, None])
def test_running_statistics_are_sent_and_not_shared(bundle, momentum):
    make = partial(Normed, momentum)
    alone = FedAvgConfig(1, 8, LocalSGD(1, 4, 0.05))
    loop = simulate(bundle, make, alone, engine="loop")
    assert {"norm.running_mean", "norm.running_var"} < set(loop.updates.layer_slices)
    a, b = loop.updates.layer_slices["norm.running_mean"]
    torch.manual_seed(0)
    for row, device in enumerate(loop.updates.column("device")):  # each starts from the common statistics
        net, (x, y) = make(), bundle.users.of_device(int(device))
        net.load_state_dict(simulate_start(make))
        order = epoch_orders(len(x), 1, np.random.default_rng([0, 1, 0, int(device)]))
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for rows in torch.from_numpy(order[0]).split(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        np.testing.assert_allclose(loop.updates.delta[row, a:b], net.norm.running_mean, rtol=0, atol=1e-6)
    flower = simulate(bundle, make, alone, engine="flower-inprocess")
    np.testing.assert_allclose(flower.updates.delta, loop.updates.delta, rtol=0, atol=1e-6)
    fresh = make()
    fresh.load_state_dict(loop.final_state)  # complete: what was trained is what is evaluated
    x, _, _ = bundle.user_test
    torch.testing.assert_close(fresh.eval()(x), predict(make(), loop.final_state, x))


def simulate_start(make):
    torch.manual_seed(0)
    return make().state_dict()


def test_noise_does_not_make_a_variance_negative(bundle):
    config = FedAvgConfig(2, 8, LocalSGD(1, 4, 0.05))
    state = simulate(bundle, Normed, config, GaussianNoise(5.0, "both"), "loop").final_state
    assert state["norm.running_var"].min() >= 0 and torch.isfinite(predict(Normed(), state, bundle.test[0])).all()


def test_weights_to_start_from(bundle):
    first = simulate(bundle, Frozen, CONFIG)
    torch.manual_seed(9)
    again = simulate(bundle, Frozen, FedAvgConfig(1, 2, seed=7), initial=first.final_state)
    assert torch.equal(again.final_state["body.weight"], first.final_state["body.weight"])  # frozen ones as well
    for wrong in ({"fc.weight": torch.zeros(10, 16)} | {"more": torch.zeros(1)}, {}, {"fc.weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="initial: weights of another network"):
            simulate(bundle, Frozen, CONFIG, initial=wrong)
