"""What each step computes and logs, with the answer that a pencil gives, and where a training saves."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from rebias import SimpleConvNet, train
from rebias.experiments import build_method
from rebias.methods import gather_with_gradient
from rebias.objectives import bias_contrastive
from rebias.settings import PRESETS, Settings
from rebias.supervised import CLASSIFICATION_WEIGHT, Balanced, rarity
from rebias.tasks import TASKS
from rebias.train import fit, index_batches, learning_rate, load_checkpoint, make_fabric

FABRIC = make_fabric("cpu")


def task(**changes):
    settings = replace(PRESETS["digits"], epochs=1, **changes)
    return TASKS["digits"](settings, 3, Path("nowhere"), FABRIC)


def batch(size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1
    return images, torch.randint(10, (size,), generator=generator), torch.arange(size)


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


# ---- methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"method": "vanilla"}, "f_cross_entropy"),
        ({"method": "vanilla", "penalty": "feature-norm"}, "f_cross_entropy feature_norm"),
        ({"method": "rebias"}, "f_cross_entropy f_hsic g_cross_entropy g_hsic"),
        ({"method": "rubi"}, "fused question"),
        ({"method": "learnedmixin", "pretrain_epochs": 1}, "mixed entropy"),
        ({"method": "hex"}, "f_cross_entropy"),
        ({"method": "lff"}, "f_weighted_cross_entropy"),
        ({"method": "jtt", "pretrain_epochs": 1}, "f_weighted_cross_entropy wrong"),
        ({"method": "balanced"}, "f_balanced_cross_entropy"),
        ({"method": "biascon"}, "f_cross_entropy f_contrast"),
    ],
)
def test_the_parts_that_a_step_logs(changes, names):
    method = build_method(task(**changes))
    parts = method.step(*batch())
    assert sorted(parts) == sorted(names.split()) and not any(part.requires_grad for part in parts.values())
    if changes.get("pretrain_epochs"):
        assert list(method.pretrain_step(*batch())) == ["g_cross_entropy"]


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"method": "rebias", "n_g_nets": 2}, "f g0 g1"),
        ({"method": "rubi"}, "f f.head g0"),
        ({"method": "learnedmixin", "head": "frozen", "pretrain_epochs": 1}, "f f.head g0"),
        ({"method": "lff"}, "f f.losses g0 g0.losses"),
        ({"method": "jtt"}, "f g0"),
    ],
)
def test_a_checkpoint_holds_everything_that_a_method_remembers(changes, names, tmp_path):
    of = task(**changes, batch_size=2400)
    method = build_method(of)
    fit(method, of.train, 3, checkpoint=tmp_path / "c.pt")
    modules = load_checkpoint(tmp_path / "c.pt")["modules"]
    assert sorted(modules) == names.split()
    for name, state in modules.items():
        now = method.modules[name].state_dict()
        assert state.keys() == now.keys() and all(torch.equal(value, now[key]) for key, value in state.items())
    if changes["method"] == "lff":
        assert int(modules["f.losses"]["seen"].sum()) == int(modules["g0.losses"]["seen"].sum()) == 4800


def test_the_prior_of_a_bias_counts_its_samples():
    """Bias 0 has one sample, of class 2; bias 1 none; bias 2 three of class 0 and one of class 1."""
    data = SimpleNamespace(labels=torch.tensor([2, 0, 0, 0, 1]), bias=torch.tensor([0, 2, 2, 2, 2]))
    method = Balanced(
        Settings(method="balanced"), FABRIC, SimpleConvNet(num_classes=3, kernel_size=1, widths=(4,)), [], data
    )
    expected = torch.zeros(3, 3)
    expected[0, 2], expected[2, 0], expected[2, 1] = 1, 0.75, 0.25
    assert torch.equal(method.prior, expected)


def test_vanilla_with_a_penalty_on_the_features_and_a_network_that_only_watches():
    method = build_method(task(method="vanilla", penalty="feature-norm", f_lambda=0.5, monitor_g=True))
    (images, targets, _), losses = batch(), []
    method.descend = lambda name, loss: losses.append((name, loss.item()))
    logits, features = method.f(images)
    norm, watched = features.square().mean().item(), cross_entropy(method.g(images)[0], targets).item()
    parts = method.step(images, targets)
    classification = cross_entropy(logits, targets).item()
    assert parts == {"f_cross_entropy": pytest.approx(classification), "feature_norm": pytest.approx(norm)}
    assert losses == [("f", pytest.approx(classification + norm / 2)), ("g0", pytest.approx(watched))]


def test_jtt_trains_its_first_network_alone_and_never_again():
    method, (images, targets, index) = build_method(task(method="jtt", pretrain_epochs=1)), batch()
    f, g = method.modules["f"], method.modules["g0"]
    before, expected = (weights(f), weights(g)), cross_entropy(g(images)[0], targets)
    assert method.pretrain_step(images, targets, index)["g_cross_entropy"] == pytest.approx(expected.item())
    assert torch.equal(before[0], weights(f)) and not torch.equal(before[1], weights(g))
    before = weights(f), weights(g)
    with torch.no_grad():
        wrong = (g.eval()(images)[0].argmax(1) != targets).double().mean()
    assert method.step(images, targets, index)["wrong"] == pytest.approx(wrong.item())
    assert not torch.equal(before[0], weights(f)) and torch.equal(before[1], weights(g))


def test_biascon_adds_a_hundredth_of_the_batch_s_loss_to_the_contrast_of_two_views():
    """Its views are given pictures in [0, 1]; here each is the negative, as f must then see it in [-1, 1]."""
    method, (images, targets, index) = build_method(task(method="biascon")), batch()
    shown, losses = [], []

    def negative(image):
        assert image.shape == (3, 8, 8) and 0 <= image.min() <= image.max() <= 1
        return 1 - image

    method.views, method.descend = negative, lambda name, loss: losses.append((name, loss.item()))
    network = method.f
    method.f = lambda x: (shown.append(x), network(x))[1]
    torch.manual_seed(5)
    parts = method.step(images, targets, index)
    torch.manual_seed(5)
    chosen = torch.multinomial(method.chances, 16, replacement=True)
    (rare, labels), *_ = method.data.batches([chosen])
    torch.testing.assert_close(shown[1], -torch.cat([rare, rare]))
    features, bias = network(-torch.cat([rare, rare]))[1], method.data.bias[chosen]
    contrast = bias_contrastive(features, torch.cat([labels, labels]), torch.cat([bias, bias]))
    assert parts["f_contrast"].item() == pytest.approx(contrast.item(), rel=1e-4)
    assert parts["f_cross_entropy"].item() == pytest.approx(cross_entropy(network(images)[0], targets).item(), rel=1e-4)
    expected = CLASSIFICATION_WEIGHT * parts["f_cross_entropy"] + parts["f_contrast"]
    assert CLASSIFICATION_WEIGHT == 0.01 and losses == [("f", pytest.approx(expected.item(), rel=1e-4))]


def test_rare_biases_of_a_class_are_drawn_more_often_but_at_most_ten_times():
    """Class 0 has the biases 0, 0, 1; class 1 thirty of bias 2 and a single one of bias 0."""
    labels, bias = torch.tensor([0, 0, 0] + [1] * 31), torch.tensor([0, 0, 1] + [2] * 30 + [0])
    smallest = 31 / 30
    expected = [1.5, 1.5, 3] + [smallest] * 30 + [10 * smallest]
    assert rarity(labels, bias).tolist() == pytest.approx(expected)


def test_features_of_two_ranks_are_joined_and_the_gradient_comes_back(monkeypatch):
    """The other rank holds twice what this one has."""
    x = torch.tensor([[1.0, 2], [3, 4]], requires_grad=True)
    assert gather_with_gradient(x) is x
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert gather_with_gradient(x) is x
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.nn.functional.all_gather", lambda each: [each, 2 * each])
    joined = gather_with_gradient(x)
    assert joined.tolist() == [[1, 2], [3, 4], [2, 4], [6, 8]]
    joined.sum().backward()
    assert x.grad.tolist() == [[3, 3], [3, 3]]

    def all_gather(parts, each):
        for number, part in enumerate(parts, 1):
            part.copy_(number * each)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert gather_with_gradient(torch.tensor([1, 5])).tolist() == [1, 5, 2, 10]


# ---- training --------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """The options with which a Fabric was made."""
    options = {}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "Fabric", lambda **given: options.update(given) or type("F", (), {"launch": int})())
    return options


@pytest.mark.parametrize("capability, precision", [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), (None, "32-true")])
def test_device_and_precision_follow_the_machine(monkeypatch, made, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    make_fabric()
    assert (made["accelerator"], made["precision"]) == ("cuda" if capability else "cpu", precision)
    make_fabric("cpu", "bf16-mixed")
    assert (made["accelerator"], made["precision"]) == ("cpu", "bf16-mixed")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (1, 1, "auto")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (2, 4, "ddp")),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, (4, 2, "ddp")),
        ({"SLURM_NTASKS": "4"}, (4, 1, "ddp")),
    ],
)
def test_processes_and_nodes(monkeypatch, made, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_fabric("cpu")
    assert (made["devices"], made["num_nodes"], made["strategy"]) == expected


def test_learning_rates():
    settings = replace(PRESETS["digits"], lr=0.5, epochs=40, schedule="step", step_epochs=20)
    assert [learning_rate(settings, epoch) for epoch in (-2, 0, 19, 20, 40)] == pytest.approx([0.5] * 3 + [0.05, 0.005])
    cosine = replace(settings, schedule="cosine")
    assert [learning_rate(cosine, epoch) for epoch in (-1, 0, 20, 30)] == pytest.approx([0.5, 0.5, 0.25, 0.0732233])
    assert learning_rate(replace(settings, schedule="constant"), 39) == 0.5


def test_seed_and_epoch_set_the_order_and_no_other_pair_shares_it():
    orders = {(s, e): torch.cat(index_batches(64, 8, s, e, 0, 1)).tolist() for s in (0, 1, 2) for e in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 9
    assert orders[1, 2] == torch.randperm(64, generator=torch.Generator().manual_seed((1 << 20) + 2)).tolist()
    assert len(index_batches(64, 64, 0, 0, 0, 1)) == 1


def test_a_training_saves_every_so_many_steps_and_at_its_end(monkeypatch, tmp_path):
    """Two epochs of three batches: after steps 2, 4 and 6, and at the end; a finished one trains no further."""
    of = task(method="vanilla")
    settings = replace(of.settings, epochs=2, batch_size=len(of.train) // 3)
    of = TASKS["digits"](settings, 3, Path("nowhere"), FABRIC)
    file, saved, steps, points = tmp_path / "c.pt", [], [], []
    save = train._save

    def spy(path, run, state, method):
        saved.append((path.name, state["total"], state["epoch"], state["step"]))
        save(path, run, state, method)

    monkeypatch.setattr(train, "_save", spy)
    options = {
        "before_step": steps.append,
        "on_epoch": lambda epoch, losses: points.append((epoch, losses)) or {"a": epoch},
    }
    curve = fit(build_method(of), of.train, 3, checkpoint=file, checkpoint_every=2, **options)
    assert saved == [("c.pt", 2, 0, 2), ("c.pt", 4, 1, 1), ("c.pt", 6, 1, 3), ("c.pt", 6, 2, 0)]
    assert steps == [0, 1, 2, 3, 4, 5] and [point["epoch"] for point in curve] == [1, 2]
    assert [(epoch, {"epoch": epoch, **losses, "a": epoch}) for epoch, losses in points] == list(enumerate(curve, 1))
    content = load_checkpoint(file)
    assert content["run"]["seed"] == 3 and content["state"]["sums"] == {} and content["bandwidths"] == {}
    again = fit(build_method(of), of.train, 3, checkpoint=file, **options)
    assert again == curve and len(steps) == 6
    fit(build_method(of), of.train, 3, checkpoint_every=2)
    assert len(saved) == 5


def test_the_curve_s_losses_are_means_over_the_epoch_s_batches():
    of = task(method="vanilla")
    twin, expected = build_method(of), []
    curve = fit(build_method(of), of.train, 3)
    twin.modules["f"].train()
    batches = index_batches(len(of.train), of.settings.batch_size, 3, 0, 0, 1)
    for images, targets in of.train.batches(batches):
        expected.append(twin.step(images, targets)["f_cross_entropy"].item())
    assert curve[0]["f_cross_entropy"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"run": {"settings": Path("/")}, "modules": {"f": {}}}, tmp_path / "c.pt")  # calls a constructor
    with pytest.raises(ValueError, match="c.pt: cannot be read as a checkpoint .*eights only load failed"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_resumed_training_has_its_bandwidths_back(tmp_path):
    of = task(method="rebias", sigma="median", sigma_every="epoch", batch_size=1000)
    method = build_method(of)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(method, of.train, 3, checkpoint=tmp_path / "c.pt", checkpoint_every=3, before_step=stop)
    saved = load_checkpoint(tmp_path / "c.pt")["bandwidths"]
    assert saved == {"sigma_f": method.loss.sigma_f, "sigma_g": method.loss.sigma_g} and saved["sigma_f"] > 0
    assert saved["sigma_f"] != saved["sigma_g"]
    again, seen = build_method(of), []
    fit(again, of.train, 3, checkpoint=tmp_path / "c.pt", before_step=lambda step: seen.append(again.loss.sigma_f))
    assert seen == [saved["sigma_f"]] and again.loss.sigma_g == saved["sigma_g"]
