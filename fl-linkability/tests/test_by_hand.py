"""Few updates with the answer that a pencil gives: splits, features, mitigations, a round, when a run saves."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability import privacy
from fl_linkability.data.bundle import ANONYMOUS, PRIOR
from fl_linkability.engines import simulate
from fl_linkability.features import cosine, device_means, leave_one_out, unit
from fl_linkability.federation import FedAvgConfig, Federation, Reply, load_checkpoint
from fl_linkability.mitigations import Background, Mitigation
from fl_linkability.models import MLP
from fl_linkability.splits import balanced_pairs, split_closed, split_open, split_same_device
from fl_linkability.store import UpdateStore
from fl_linkability.train import LocalSGD, make_fabric, trained_state

CPU = make_fabric("cpu")


# ---- splits ----------------------------------------------------------------------------------------------


ROWS = [  # users 2, 5 and 7; the last has no prior device, and device 3 answers in the first rounds only
    (0, 0, 2, PRIOR), (0, 1, 2, ANONYMOUS), (1, 2, 5, PRIOR), (1, 3, 5, ANONYMOUS),
    (2, 4, 7, ANONYMOUS), (3, 1, 2, ANONYMOUS), (4, 0, 2, PRIOR), (4, 4, 7, ANONYMOUS),
]  # fmt: skip


def test_the_closed_world(store_of):
    split = split_closed(store_of(ROWS))
    assert split.aux.tolist() == [0, 2, 6] and split.aux_labels.tolist() == [0, 1, 0]
    assert split.probe.tolist() == [1, 3, 5] and split.probe_labels.tolist() == [0, 1, 0]
    assert split.known.tolist() == [2, 5]
    early = split_closed(store_of(ROWS), (0, 4), (3, None))
    assert early.aux.tolist() == [0, 2] and early.probe.tolist() == [5] and early.probe_labels.tolist() == [0]
    with pytest.raises(ValueError, match="no update of an anonymous device of a known user"):
        split_closed(store_of(ROWS), (0, None), (4, 5))


def test_tracking_goes_from_the_first_rounds_to_the_others(store_of):
    """Five rounds: 0 and 1 are known, 2 to 4 are probed; device 4 is not known, device 3 does not come again."""
    split = split_same_device(store_of(ROWS))
    assert split.aux.tolist() == [1, 3] and split.aux_labels.tolist() == [0, 1] and split.known.tolist() == [1, 3]
    assert split.probe.tolist() == [5] and split.probe_labels.tolist() == [0]
    with pytest.raises(ValueError, match="no anonymous device takes part in both halves"):
        split_same_device(store_of(ROWS[:5]))


def test_the_open_world(store_of):
    """One of three users becomes unknown beside the one without a prior device, unless it is that one."""
    seen = set()
    for seed in range(12):
        split = split_open(store_of(ROWS), 1 / 3, seed)
        unknown = ({2, 5, 7} - set(split.known.tolist())) - {7}
        seen.add(tuple(sorted(unknown)))
        assert len(unknown) <= 1 and split.probe.tolist() == [1, 3, 4, 5, 7]
        users = np.array([2, 5, 7, 2, 7])
        expected = [split.known.tolist().index(user) if user in split.known else -1 for user in users]
        assert split.probe_labels.tolist() == expected and 7 not in split.known
        assert split.aux.tolist() == [row for row in (0, 2, 6) if ROWS[row][2] in split.known]
        assert split.aux_labels.tolist() == [split.known.tolist().index(ROWS[row][2]) for row in split.aux]
    assert seen == {(), (2,), (5,)}
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"unknown_fraction must lie in \(0, 1\), got {share}"):
            split_open(store_of(ROWS), share)
    two = [row for row in ROWS if row[2] != 7]
    assert len(split_open(store_of(two), 0.01).known) == 1  # at least one is unknown


def test_within_one_set_two_updates_of_a_user_make_a_pair_and_one_does_not():
    users = np.array([4, 4, 6])
    (same_a, other_a), (same_b, other_b) = balanced_pairs(users, users, 20, np.random.default_rng(0), one_set=True)
    assert sorted(set(zip(same_a.tolist(), same_b.tolist(), strict=True))) == [(0, 1), (1, 0)]
    assert (users[other_a] != users[other_b]).all()
    with pytest.raises(ValueError, match="a user with two updates"):
        balanced_pairs(users[1:], users[1:], 20, np.random.default_rng(0), one_set=True)


# ---- features --------------------------------------------------------------------------------------------


def test_features_by_hand():
    length = unit(np.array([[1.0, 2, 2]], np.float32))
    assert length.dtype == np.float64 and np.abs(length - [[1 / 3, 2 / 3, 2 / 3]]).max() < 1e-15
    centred = leave_one_out(np.array([[1.0, 0], [3, 6], [9, 9], [5, 0]]), np.array([4, 1, 4, 4]))
    assert centred.tolist() == [[1 - 7, -4.5], [3, 6], [9 - 3, 9], [0, -4.5]]
    means, ids = device_means(np.array([[1.0, 2], [5, 5], [3, 4]]), np.array([8, 3, 8]))
    assert ids.tolist() == [3, 8] and means.tolist() == [[5, 5], [2, 3]]
    found = cosine(np.array([[3.0, 4], [0, 0]]), np.array([[0.0, 2], [4, 3], [-3, -4]]))
    np.testing.assert_allclose(found, [[0.8, 0.96, -1], [0, 0, 0]])


# ---- mitigations -----------------------------------------------------------------------------------------


def test_every_sample_of_the_background_is_drawn_also_the_only_one_of_its_class():
    x, y = torch.arange(1.0, 7)[:, None], torch.tensor([0, 0, 1, 1, 1, 2])
    own, labels = torch.zeros(60, 1), torch.zeros(60, dtype=torch.int64)
    for kind in ("repl", "random", "calibrated", "adversarial"):
        background = Background(x, y, kind, 1.0)
        drawn = torch.cat([background.prepare_data(own, labels, np.random.default_rng(seed))[0] for seed in range(9)])
        expected = {1.0, 2, 3, 4, 5, 6} - ({1.0, 2} if kind == "calibrated" else set())
        assert set(drawn[drawn > 0].tolist()) == expected


def test_clipping_and_its_accountant():
    clipped = privacy.clip(np.array([3.0, 4.0], np.float32), 1.0)
    assert clipped.dtype == np.float32 and clipped.tolist() == pytest.approx([0.6, 0.8])
    for delta in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"delta must lie in \(0, 1\), got {delta}"):
            privacy.gaussian_epsilon(1.0, 1, delta)
    for epsilon in (0.01, 1.0, 40.0):
        sigma = privacy.gaussian_sigma(epsilon, 1e-6, 3.0)
        assert privacy.gaussian_delta(epsilon, 3 / sigma) == pytest.approx(1e-6, rel=1e-8)
        assert privacy.gaussian_epsilon(sigma / 3, 1, 1e-6) == pytest.approx(epsilon, rel=1e-8)


# ---- the federation --------------------------------------------------------------------------------------


def test_a_run_saves_every_so_many_rounds_and_at_its_end(bundle, tmp_path, monkeypatch):
    saved, finished, save = [], [], Federation._save
    monkeypatch.setattr(Federation, "_save", lambda self, *each: (saved.append(self.next_round), save(self, *each)))
    config = FedAvgConfig(5, 3, LocalSGD(1, 8, 0.1))
    points = lambda model, state: {"norm": 1.0}  # noqa: E731
    options = {"evaluate": points, "evaluate_last": 2, "on_round": finished.append, "checkpoint_every": 2}
    result = simulate(bundle, MLP, config, folder=tmp_path, **options)
    assert saved == [2, 4, 5] and finished == [1, 2, 3, 4, 5] and len(result.utility) == 2
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (content["round"], content["updates"], len(content["utility"]), content["faults"]) == (5, 15, 2, [])
    assert set(content["run"]) == {"config", "data", "mitigation"} and len(content["raw_norms"]) > 0
    simulate(bundle, MLP, config, **options)
    assert len(saved) == 3


def test_a_client_gets_no_store_and_nothing_that_cannot_be_sent(bundle):
    federation = Federation(bundle, MLP(64, 8, 10), FedAvgConfig(2, 3), None, CPU)
    federation.evaluate, federation.on_round = (lambda *each: {}), (lambda number: None)
    client = federation.for_client()
    assert client.store is None and client.evaluate is None and not hasattr(client, "fabric")
    client.on_round(1)
    pickle.dumps(client)
    assert federation.store is not None and federation.evaluate is not None


def test_the_devices_of_a_round_are_ascending_and_depend_on_seed_and_round(bundle):
    federation = Federation(bundle, MLP(64, 8, 10), FedAvgConfig(2, 3, seed=6), None, CPU)
    rounds = [federation.devices_of_round(number).tolist() for number in range(20)]
    assert all(each == sorted(set(each)) and len(each) == 3 for each in rounds) and len(set(map(tuple, rounds))) > 5
    expected = np.sort(np.random.default_rng([6, 0, 4, 0]).permutation(8)[:3])
    assert rounds[4] == expected.tolist()
    draws = {
        stream: federation.rng(stream, 1, 2).random() for stream in ("devices", "order", "data", "update", "server")
    }
    assert len(set(draws.values())) == 5
    assert federation.rng("order", 1, 2).random() != federation.rng("order", 2, 1).random()


class Two(nn.Module):
    """Two weights, and a running variance that is sent as well."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("running_var", torch.tensor([0.5]))


def test_a_round_adds_the_weighted_mean_and_leaves_out_what_is_wrong(bundle):
    federation = Federation(bundle, Two(), FedAvgConfig(9, 4, min_clients=2), None, CPU)
    state = {"weight": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([0.5])}
    federation.like = {name: value.clone() for name, value in state.items()}
    federation.kept = slice(None)
    federation.store = UpdateStore({"weight": (0, 2), "running_var": (2, 3)})
    replies = [
        Reply(5, np.array([4.0, 0.0, -1.0], np.float32), 3, 2.5),
        Reply(2, np.array([0.0, 8.0, -1.0], np.float32), 1),
        Reply(7, np.array([np.nan, 0, 0], np.float32), 1),
        Reply(1, error="no battery"),
    ]
    after = federation.finish_round(3, state, replies)
    assert after["weight"].tolist() == [4, 4] and after["running_var"].tolist() == [0]  # never below 0
    assert federation.store.column("device").tolist() == [2, 5] and federation.next_round == 4
    assert federation.store.column("n_examples").tolist() == [1, 3] and federation.raw_norms == [2.5]
    assert federation.store.column("round").tolist() == [3, 3]
    assert federation.store.column("user").tolist() == [bundle.users.device_user[2], bundle.users.device_user[5]]
    assert federation.faults == [
        {"round": 3, "device": 1, "reason": "no battery"},
        {"round": 3, "device": 7, "reason": "sent NaN or infinite values"},
    ]
    with pytest.raises(
        RuntimeError, match="round 4: 1 of 1 updates are valid, min_clients is 2; last fault: {'round': 3"
    ):
        federation.finish_round(4, state, replies[:1])


def test_replies_of_two_ranks_are_gathered(bundle, monkeypatch):
    """This rank has an update and a fault, the other one two updates: all in the ranks' order, with their facts."""
    federation = Federation(bundle, MLP(), FedAvgConfig(2, 4), None, CPU)
    size = sum(value.numel() for value in federation.like.values())
    here = [Reply(3, np.full(size, 3, np.float32), 30, 0.3), Reply(5, error="no battery")]
    there = [Reply(4, None, 40, 0.4), Reply(6, None, 60)]
    assert federation._gather(here) is here
    federation.fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"))

    def all_gather_object(facts, mine):
        assert all(reply.delta is None for reply in mine)
        facts[:] = [mine, there]

    def all_gather(everyone, mine):
        assert mine.shape == (2, size) and mine[0].unique().item() == 3 and not mine[1].any()
        everyone[0].copy_(mine)
        everyone[1].copy_(torch.tensor([[4.0], [6.0]]).expand(2, size))

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    found = federation._gather(here)
    facts = [(r.device, r.n_examples, r.error, None if r.delta is None else r.delta[0].item()) for r in found]
    assert facts == [(3, 30, "", 3), (5, 0, "no battery", None), (4, 40, "", 4), (6, 60, "", 6)]
    assert [r.raw_norm for r in found[::2]] == [0.3, 0.4] and all(r.delta.shape == (size,) for r in found[2:])


def test_faults_of_a_reply():
    good = np.zeros(3, np.float32)
    assert Reply(0, good, 1).fault(3) == ""
    assert Reply(0, good, 0).fault(3) == "reports 0 examples"
    assert Reply(0, good, 1).fault(4) == "sent an update of shape (3,), expected (4,)"
    assert Reply(0).fault(3) == "sent no update" and Reply(0, good, 1, error="x").fault(3) == "x"
    with pytest.raises(ValueError, match="min_clients must lie in 1 .. 3, got 0"):
        FedAvgConfig(1, 3, min_clients=0)
    assert FedAvgConfig(1, 3, min_clients=3).min_clients == 3 and FedAvgConfig(1, 1).clients_per_round == 1
    for rounds, clients in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"need at least 1 round and 1 client, got {rounds} and {clients}"):
            FedAvgConfig(rounds, clients)


def test_the_checkpoint_tells_mitigations_apart(bundle):
    x, y = bundle.background.x, bundle.background.y
    told = [
        Federation(bundle, MLP(64, 8, 10), FedAvgConfig(2, 3), mitigation, CPU).run["mitigation"]
        for mitigation in (None, Mitigation("both"), Background(x, y, "random", 0.5), Background(x, y, "repl", 0.5))
    ]
    assert len(set(told)) == 4 and told[0] == "[('Mitigation', {'who': 'anon', 'refresh': 'fixed'})]"


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    content = {"run": {"config": tmp_path}, "state": {}, "round": 0}  # unpickling calls a constructor
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: cannot be read as a checkpoint .*eights only load failed"):
        load_checkpoint(tmp_path / "c.pt")


class Plain(nn.Module):
    """Without a form of its own for many clients."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("engine, network", [("loop", MLP), ("loop", Plain), ("batched", Plain)])
def test_half_precision_changes_the_updates_a_little(bundle, engine, network):
    config = FedAvgConfig(1, 3, LocalSGD(1, 8, 0.1))
    whole, half = (simulate(bundle, network, config, engine=engine, fabric=make_fabric("cpu", each)).updates.delta
                   for each in ("32-true", "bf16-mixed"))  # fmt: skip
    assert half.dtype == np.float32 and 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()


def test_results_say_what_ran(bundle):
    config = FedAvgConfig(2, 8, LocalSGD(1, 8, 0.1), seed=2)
    result = simulate(bundle, MLP, config, evaluate=lambda model, state: {"a": 1}, evaluate_last=1)
    model = MLP()
    assert result.dimension == sum(v.numel() for v in trained_state(model).values()) == result.updates.delta.shape[1]
    assert result.engine == {"name": "batched"} and result.utility == [{"a": 1}] and result.faults == []
    assert result.final_state.keys() == model.state_dict().keys()
    norms = np.linalg.norm(result.updates.delta[result.updates.column("role") == ANONYMOUS], axis=1)
    assert result.raw_norm == pytest.approx(float(np.median(norms)), rel=1e-5)
    nobody = simulate(bundle, MLP, FedAvgConfig(1, 8), evaluate_last=1)
    assert nobody.utility == []
