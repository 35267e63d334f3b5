"""What each method trains, when and at which rate, and that lambda 0 is vanilla."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rebias import hex_project, median_sigma, supervised
from rebias.evaluate import predict
from rebias.experiments import build_method, train_and_evaluate
from rebias.methods import frozen_statistics
from rebias.models import MLP, HexNet, SimpleConvNet
from rebias.objectives import bias_contrastive
from rebias.settings import PRESETS, Settings
from rebias.tasks import TASKS
from rebias.train import fit, index_batches, learning_rate, make_fabric

FABRIC = make_fabric("cpu")
SHORT = replace(PRESETS["digits"], epochs=1)


def method(**changes):
    settings = replace(SHORT, **changes)
    return build_method(TASKS[settings.dataset](settings, 3, Path("nowhere"), FABRIC))


@pytest.mark.parametrize(
    "changes, graphed",
    [
        ({"method": "vanilla"}, True),
        ({"method": "rebias"}, True),
        ({"method": "rebias", "sigma": "fixed"}, True),
        ({"method": "rebias", "sigma_every": "epoch"}, False),  # another bandwidth in every epoch
        ({"method": "rebias", "sigma": "dimension"}, False),
        ({"method": "rebias", "conditional": True}, False),  # looks how many samples a class has
        ({"method": "rebias", "penalty": "hsic-shuffled"}, False),  # draws an order
        ({"method": "lff"}, False),
    ],
)
def test_only_a_step_that_is_the_same_every_time_is_replayed_on_cuda(changes, graphed):
    assert method(**changes).graphed == graphed


def batch(size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator), torch.arange(size)


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.mark.parametrize("order", ["g-first", "f-first"])
def test_lambda_zero_is_vanilla_bit_for_bit(order):
    runs = []
    for changes in ({"method": "vanilla"}, {"method": "rebias", "f_lambda": 0.0, "order": order}):
        settings = replace(SHORT, **changes)
        trained, outcome = train_and_evaluate(TASKS["digits"](settings, 3, Path("nowhere"), FABRIC), None)
        runs.append((trained.modules["f"].state_dict(), outcome.metrics["unbiased_accuracy"]))
    (vanilla, a), (rebias, b) = runs
    assert a == b and vanilla.keys() == rebias.keys()
    assert all(torch.equal(vanilla[k], rebias[k]) for k in vanilla if not k.endswith("num_batches_tracked"))


def test_the_monitored_g_does_not_touch_f():
    runs = []
    for monitor in (False, True):
        settings = replace(SHORT, method="vanilla", monitor_g=monitor)
        trained, _ = train_and_evaluate(TASKS["digits"](settings, 3, Path("nowhere"), FABRIC), None)
        runs.append(weights(trained.modules["f"]))
    assert torch.equal(*runs)


def test_bias_labels_cannot_reach_the_weights():
    """Permuting the bias labels that evaluation uses, colours kept, must not change a trained weight."""
    trained = []
    for permute in (False, True):
        task = TASKS["digits"](replace(SHORT, method="rebias"), 3, Path("nowhere"), FABRIC)
        m = build_method(task)
        (images, targets), *_ = task.train.batches([torch.arange(64)])
        if permute:
            task.train.bias = task.train.bias.roll(1)
        m.step(images, targets, torch.arange(64))
        trained.append(weights(m.modules["f"]))
    assert torch.equal(*trained)


@pytest.mark.parametrize("order", ["g-first", "f-first"])
def test_g_chases_the_f_of_its_order(order, monkeypatch):
    """With f first, g is compared with the features of the f that has just been updated (Algorithm 1)."""
    m, seen = method(method="rebias", order=order, f_lambda=0.0), []
    g_loss = m.loss.g_loss

    def spy(g_logits, g_feat, f_feat, targets):
        seen.append(f_feat.detach().clone())
        return g_loss(g_logits, g_feat, f_feat, targets)

    monkeypatch.setattr(m.loss, "g_loss", spy)

    def features():
        with torch.no_grad(), frozen_statistics(m.f):
            return m.f.train()(batch()[0])[1]

    before = features()
    m.step(*batch())
    expected, other = (features(), before) if order == "f-first" else (before, features())
    torch.testing.assert_close(seen[0], expected)
    assert not torch.allclose(seen[0], other, atol=1e-4)


@pytest.mark.parametrize("name", ["vanilla", "rebias", "rubi", "learnedmixin", "hex", "lff", "biascon"])
def test_every_optimizer_has_the_run_s_rate_and_weight_decay(name):
    m = method(method=name, lr=2e-3, weight_decay=3e-4)
    groups = [group for optimizer in m.optimizers.values() for group in optimizer.param_groups]
    assert len(groups) == (1 if name in ("vanilla", "hex", "biascon") else 2)
    assert all(group["lr"] == 2e-3 and group["weight_decay"] == 3e-4 for group in groups)


@pytest.mark.parametrize("order", ["g-first", "f-first"])
def test_batch_norm_counts_every_image_once(order):
    m, images = method(method="rebias", order=order), batch()[0]
    f = m.modules["f"]
    before = f.layers[1].running_mean.clone()
    m.step(*batch())
    reference = method(method="vanilla").modules["f"]  # same seed, same initial weights
    expected = 0.9 * before + 0.1 * reference.layers[0](images).mean((0, 2, 3))
    torch.testing.assert_close(f.layers[1].running_mean, expected)


def test_frozen_statistics():
    network = SimpleConvNet(kernel_size=3, widths=(4,), strides=(1,)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad(), frozen_statistics(network):
        network(batch()[0])
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "running" in k)
    network(batch()[0])
    assert not torch.equal(before["layers.1.running_mean"], network.state_dict()["layers.1.running_mean"])


@pytest.mark.parametrize("name", ["rubi", "learnedmixin"])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_heads_are_trained_unless_frozen(name, head):
    m = method(method=name, head=head, pretrain_epochs=1 if name == "learnedmixin" else 0)
    before, f_before = weights(m.modules["f.head"]), weights(m.modules["f"])
    m.step(*batch())
    assert torch.equal(before, weights(m.modules["f.head"])) == (head == "frozen")
    assert not torch.equal(f_before, weights(m.modules["f"]))


def test_learned_mixin_pretrains_g_and_then_freezes_it():
    m = method(method="learnedmixin", pretrain_epochs=1)
    g, f = weights(m.modules["g0"]), weights(m.modules["f"])
    m.pretrain_step(*batch())
    assert torch.equal(f, weights(m.modules["f"])) and not torch.equal(g, weights(m.modules["g0"]))
    g, statistics = weights(m.modules["g0"]), m.modules["g0"].layers[1].running_mean.clone()
    m.step(*batch())
    assert torch.equal(g, weights(m.modules["g0"]))
    assert torch.equal(statistics, m.modules["g0"].layers[1].running_mean)


def test_pretraining_where_there_is_none():
    with pytest.raises(ValueError, match="nothing to pre-train"):
        method(method="rubi").pretrain_step(*batch())


@pytest.mark.parametrize("name", ["hex", "lff", "biased", "jtt", "balanced"])
def test_the_other_methods_learn(name):
    m = method(method=name)
    first = list(m.step(*batch(64)).values())[0]
    for _ in range(30):
        last = list(m.step(*batch(64)).values())[0]
    assert last < first


def test_biascon_contrasts_two_views_of_a_second_batch(monkeypatch):
    m, seen = method(method="biascon"), []
    monkeypatch.setattr(supervised, "bias_contrastive", lambda *each: (seen.append(each), bias_contrastive(*each))[1])
    before = weights(m.f)
    parts = m.step(*batch())
    ((features, labels, bias),) = seen
    assert len(features) == 32 and torch.equal(labels[:16], labels[16:]) and torch.equal(bias[:16], bias[16:])
    assert not torch.allclose(features[:16], features[16:]) and parts["f_contrast"] > 0
    assert not torch.equal(before, weights(m.f))


def test_dfr_is_vanilla_with_another_last_layer_and_doing_it_twice_changes_nothing(monkeypatch):
    monkeypatch.setattr(supervised, "last_layer", partial(supervised.last_layer, fits=1))
    task = TASKS["digits"](replace(SHORT, method="dfr", batch_size=2400), 3, Path("nowhere"), FABRIC)
    m, vanilla = build_method(task), method(method="vanilla")
    fit(m, task.train, 3)
    for images, targets in task.train.batches(index_batches(len(task.train), 2400, 3, 0, 0, 1)):
        vanilla.step(images, targets)
    assert torch.equal(weights(vanilla.f.layers), weights(m.f.layers))
    assert not torch.equal(weights(vanilla.f.fc), weights(m.f.fc))
    before = weights(m.f)
    m.finish()
    assert torch.equal(before, weights(m.f))


@pytest.mark.parametrize("order", ["g-first", "f-first"])
def test_without_updates_g_keeps_its_random_weights(order):
    m = method(method="rebias", n_g_update=0, order=order)
    g, f, mean = weights(m.gs[0]), weights(m.f), m.gs[0].layers[1].running_mean.clone()
    m.step(*batch())
    assert torch.equal(g, weights(m.gs[0])) and not torch.equal(f, weights(m.f))
    assert not torch.equal(mean, m.gs[0].layers[1].running_mean)  # evaluation sees it as training does


def test_hex_predicts_without_the_superficial_branch():
    network = HexNet(SimpleConvNet(kernel_size=3, widths=(8,), strides=(1,)), 8, 10).eval()
    images = batch()[0]
    logits, features = network(images)
    torch.testing.assert_close(logits, features @ network.head.weight[:, :8].T + network.head.bias)
    f_a, f_g = network.both(images)
    assert f_a.shape == f_g.shape == logits.shape
    residual = hex_project(f_a.double(), f_g.double())
    assert (f_g.double().T @ residual).abs().max() < 1e-10


@pytest.mark.parametrize(
    "changes, sigma", [({"sigma": "dimension"}, 8.0), ({"sigma": "fixed", "sigma_value": 2.0}, 2.0)]
)
def test_bandwidth_policies_that_need_no_batch(changes, sigma):
    m = method(method="rebias", sigma_every="epoch", **changes)
    m.start_epoch(iter([batch()[:2]]))
    assert m.loss.sigma_f == sigma


def test_median_bandwidth_before_an_epoch_is_not_swapped():
    m = method(method="rebias", sigma="median", sigma_every="epoch")
    batches = [batch()[:2], batch()[:2]]
    mean = m.f.layers[1].running_mean.clone()
    m.start_epoch(iter(batches))
    assert torch.equal(mean, m.f.layers[1].running_mean)
    for network, sigma in ((m.f, m.loss.sigma_f), (m.gs[0], m.loss.sigma_g)):
        with torch.no_grad(), frozen_statistics(network):  # as the loss sees the features: in train mode
            torch.testing.assert_close(sigma, median_sigma([network.train()(images)[1] for images, _ in batches]))
    assert m.loss.sigma_f != m.loss.sigma_g


def test_several_biased_networks_differ_and_count():
    m = method(method="rebias", n_g_nets=2, n_g_update=2)
    assert not torch.equal(weights(m.gs[0]), weights(m.gs[1]))
    before = [weights(g) for g in m.gs]
    m.step(*batch())
    assert all(not torch.equal(old, weights(g)) for old, g in zip(before, m.gs, strict=True))


def test_learning_rates():
    step = Settings()
    assert [learning_rate(step, e) for e in (-1, 0, 19, 20, 79)] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-6])
    cosine = replace(step, schedule="cosine", epochs=100)
    assert learning_rate(cosine, 50) == pytest.approx(5e-4) and learning_rate(cosine, 0) == 1e-3


def test_the_schedule_starts_after_pretraining(monkeypatch):
    changes = {"pretrain_epochs": 1, "epochs": 2, "schedule": "step", "step_epochs": 1, "batch_size": 2400}
    settings = replace(SHORT, method="learnedmixin", **changes)
    task, rates = TASKS["digits"](settings, 3, Path("nowhere"), FABRIC), []
    m = build_method(task)
    for name in ("pretrain_step", "step"):
        monkeypatch.setattr(m, name, lambda *each: {})
    fit(m, task.train, 3, before_step=lambda step: rates.append(m.optimizers["f"].param_groups[0]["lr"]))
    assert rates == pytest.approx(2 * [3e-3] + 2 * [3e-3] + 2 * [3e-4])


def test_predictions_do_not_depend_on_the_batch_and_leave_the_network_as_it_was():
    network, data = SimpleConvNet(kernel_size=3, widths=(4,)).train(), TwelveImages()
    before = network.layers[1].running_mean.clone()
    whole, parts = (predict(network, data, FABRIC, batch_size=size)[0] for size in (12, 5))
    torch.testing.assert_close(whole, parts)
    assert network.training and torch.equal(before, network.layers[1].running_mean)


class TwelveImages:
    def __len__(self):
        return 12

    def batches(self, index_batches, epoch=0):
        images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        for index in index_batches:
            yield images[index], index % 10


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "erm"}, "method must be one of vanilla"),
        ({"rho": 1.5}, r"rho must lie in \[0, 1\], got 1.5"),
        ({"batch_size": 3}, "batches of 4 or more, batch_size is 3"),
        ({"epochs": 0}, "at least 1"),
        ({"method": "hex", "dataset": "imagenet9"}, "hex works only on coloured digits .* not on imagenet9"),
        ({"method": "dfr", "dataset": "csv"}, "dfr works only on coloured digits .* not on csv"),
        ({"method": "balanced", "dataset": "kinetics10"}, "balanced needs a bias label .* kinetics10 has none"),
        ({"n_g_update": -1}, "n_g_update at least 0"),
        ({"penalty": "feature-norm"}, "penalty feature-norm has no effect with method rebias"),
        ({"method": "vanilla", "penalty": "hsic-shuffled"}, "penalty hsic-shuffled has no effect with method vanilla"),
        ({"method": "rubi", "penalty": "hsic-shuffled"}, "no effect with method rubi, only with rebias or vanilla"),
        ({"head": "frozen"}, "head frozen has no effect with method rebias, only with rubi or learnedmixin"),
        ({"method": "lff", "pretrain_epochs": 3}, "pretrain_epochs 3 has no effect with method lff"),
        ({"side": 14}, "side 14 has no effect with dataset digits, only with mnist; leave it at 28"),
        ({"sigma_value": 2.0}, "no effect on the median of each batch"),
    ],
)
def test_settings_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["digits"], **changes)


def test_every_network_gives_logits_and_features():
    for network, shape in ((MLP(), (4, 2)), (SimpleConvNet(), (4, 3, 28, 28))):
        logits, features = network(torch.randn(shape))
        assert logits.shape == (4, network.fc.out_features) and features.shape == (4, network.fc.in_features)
