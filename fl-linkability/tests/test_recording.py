"""Updates of any strategy of Flower, and of other frameworks' dumps."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from torch import nn

from fl_linkability import ANONYMOUS, PRIOR, Recording, identification_metrics, identify, read_updates, split_closed
from fl_linkability.data.styled import make_digits_users
from fl_linkability.flower_grid import InProcessGrid, quiet_flower
from fl_linkability.recording import report_partition

OWNERS = {device: (device // 2, ANONYMOUS if device % 2 else PRIOR) for device in range(12)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(256), nn.Linear(256, 10)  # with an integer buffer

    def forward(self, x):
        return self.fc(self.norm(x.flatten(1)))


def client_app(users, mods=()):
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        net = Net()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        device = int(context.node_config["partition-id"])
        if device == 11:
            raise OSError("out of battery")
        x, y = users.of_device(device)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for part in torch.arange(len(x)).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam, FedProx])
def test_any_strategy_is_recorded_and_not_changed(strategy):
    quiet_flower()
    users = make_digits_users(0, n_users=6).users

    class Recorder(Recording, strategy):
        pass

    options = {"fraction_train": 1.0, "fraction_evaluate": 0.0, "min_train_nodes": 12, "min_available_nodes": 12}
    torch.manual_seed(0)
    start = Net().state_dict()
    final = []
    for kind in (strategy, Recorder):
        chosen = kind(**options)
        chosen.owners = OWNERS
        grid = InProcessGrid(client_app(users, [report_partition]), 12)
        final.append(chosen.start(grid, ArrayRecord(start), num_rounds=3).arrays.to_torch_state_dict())
    for name, value in final[0].items():
        torch.testing.assert_close(value, final[1][name], rtol=1e-4, atol=1e-5)
    store = chosen.updates
    assert len(store) == 3 * 11 and 11 not in store.column("device") and set(store.column("round")) == {0, 1, 2}
    assert (store.column("user") == store.column("device") // 2).all() and (store.column("n_examples") == 64).all()
    assert "norm.num_batches_tracked" not in store.layer_slices and "norm.running_var" in store.layer_slices
    split, features = split_closed(store), store.features("fc")
    scores = identify(features[split.aux], split.aux_labels, features[split.probe], "centroid")
    assert identification_metrics(scores, split.probe_labels)["top1"] > 0.6
    first = np.flatnonzero((store.column("round") == 0) & (store.column("device") == 0))
    net = Net()
    net.load_state_dict(start)
    x, y = users.of_device(0)
    nn.functional.cross_entropy(net(x[:8]), y[:8]).backward()
    a, b = store.layer_slices["fc.bias"]
    step = store.delta[first[0], a:b]  # eight steps, the first of them against the gradient
    assert np.corrcoef(step, -net.fc.bias.grad)[0, 1] > 0.5, "new minus old"


def test_clients_without_the_mod_are_told_apart_by_their_nodes():
    users = make_digits_users(0, n_users=6).users

    class Recorder(Recording, FedAvg):
        owners = {device + 1: OWNERS[device] for device in range(4)}  # the grid's node ids; the others are strangers

    chosen = Recorder(fraction_evaluate=0.0, min_train_nodes=12, min_available_nodes=12)
    chosen.start(InProcessGrid(client_app(users), 12), ArrayRecord(Net().state_dict()), num_rounds=1)
    assert sorted(chosen.updates.column("device")) == [0, 1, 2, 3]


def test_dumped_updates_of_other_frameworks(tmp_path):
    torch.manual_seed(0)
    before, after = Net().state_dict(), Net().state_dict()
    torch.save(before, tmp_path / "before.pt")
    torch.save({"model_state_dict": after, "epoch": 3}, tmp_path / "flute.pt")
    update = {name: (after[name] - before[name]).numpy() for name in before if "num" not in name}
    np.savez(tmp_path / "update.npz", **update)
    np.savez(tmp_path / "plain.npz", *update.values())
    np.savez(tmp_path / "nan.npz", **{name: value * np.nan for name, value in update.items()})
    lines = [
        "round,device,user,role,n_examples,after,before",
        "0,1,7,1,64,flute.pt,before.pt",
        "0,0,7,0,32,update.npz,",
    ]

    def read(*more):
        (tmp_path / "updates.csv").write_text("\n".join([*lines, *more]))
        return read_updates(str(tmp_path / "updates.csv"))

    store = read()
    np.testing.assert_allclose(store.delta[0], store.delta[1], rtol=0, atol=1e-6)
    assert store.index.tolist() == [[0, 1, 7, 1, 64], [0, 0, 7, 0, 32]] and store.features("fc").shape == (2, 2570)
    for line, message in (
        ("1,0,7,0,32,plain.npz,before.pt", "line 4: weights of different networks: .*weight"),
        ("1,0,7,0,x,update.npz,", "line 4: invalid literal"),
        ("1,0,7,0,32,updates.csv,", "updates.csv: holds no weights"),
        ("1,0,7,7,32,update.npz,", r"line 4: role must be 0 \(prior\) or 1 \(anonymous\), got 7"),
        ("1,0,7,0,32,nan.npz,", "line 4: the update holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            read(line)
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        read("1,0,7,0,32,none.pt,")
    lines[0] = "round,device"
    with pytest.raises(ValueError, match="no line with user, role, n_examples, after, before"):
        read()
