"""Training steps against what the released code of each method does: parameters after every step of a short run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from rebias import SimpleConvNet
from rebias.baselines import HEX, JTT, LearnedMixin, LfF, RUBi
from rebias.methods import ReBias
from rebias.objectives import balanced_cross_entropy, bias_contrastive, lff_weights
from rebias.settings import Settings
from rebias.supervised import Balanced, last_layer, rarity
from rebias.train import make_fabric

GOLDEN = Path(__file__).parent / "golden"
FABRIC = make_fabric("cpu")


def load(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-3, atol=1e-5)


TRAINER = load("trainer_trajectory")


@pytest.mark.parametrize(
    "name, kind, changes",
    [
        ("rebias", ReBias, {"order": "g-first"}),
        ("rubi-trained", RUBi, {"method": "rubi"}),
        ("rubi-frozen", RUBi, {"method": "rubi", "head": "frozen"}),
        ("learnedmixin-trained", LearnedMixin, {"method": "learnedmixin", "pretrain_epochs": 1}),
        ("learnedmixin-frozen", LearnedMixin, {"method": "learnedmixin", "pretrain_epochs": 1, "head": "frozen"}),
    ],
)
def test_the_released_trainer_s_steps(name, kind, changes, closed_form):
    """clovaai/rebias, 16 images of 8 x 8 a step; LearnedMixin's first two steps train g alone."""
    f, g = (closed_form(SimpleConvNet(kernel_size=kernel)).float().train() for kernel in (3, 1))
    method = kind(replace(Settings(), **changes), FABRIC, f, [g], range(64))
    if name != "rebias":
        head = method.modules["f.head"].fc
        head.weight.data = torch.sin(torch.arange(head.weight.numel()) * 0.37).view_as(head.weight) / 10
        head.bias.data = torch.cos(torch.arange(head.bias.numel()) * 0.11) / 10
    for number, index in enumerate(TRAINER["order"]):
        step = method.pretrain_step if kind is LearnedMixin and number < 2 else method.step
        step(TRAINER["images"][index], TRAINER["labels"][index], index)
        ours = {"f_fc": f.fc, "f_conv": f.layers[0], "g_fc": g.fc, "g_conv": g.layers[0]}
        ours |= {} if name == "rebias" else {"head": head}
        for part, module in ours.items():
            close(module.weight, TRAINER[f"{name}_{part}"][number])


def test_the_released_steps_of_lff():
    """alinlab/LfF: two passes over 24 images; sample weights and all parameters."""
    case = load("lff_trajectory")
    networks = [SimpleConvNet(3, 3, (4,)) for _ in "fg"]
    for name, network in zip("fg", networks, strict=True):
        network.load_state_dict({key: case[f"{name}_init_{key}"] for key in network.state_dict()})
    settings = Settings(method="lff", lr=1e-2, weight_decay=1e-3)
    method = LfF(settings, FABRIC, networks[0], networks[1:], case["images"])
    for index, parameters, weights in zip(case["order"], case["parameters"], case["weights"], strict=True):
        method.step(case["images"][index], case["labels"][index], index)
        close(lff_weights(method.f_losses.relative(index), method.g_losses.relative(index)), weights)
        close(torch.cat([p.flatten() for network in networks for p in network.parameters()]), parameters)


def test_the_released_balanced_loss():
    """grayhong/bias-contrastive-learning: prior from the counts of the training set, loss and gradient."""
    case, f = load("balanced_loss"), SimpleConvNet(4, 1, (4,))
    data = SimpleNamespace(labels=case["train_labels"], bias=case["train_bias"])
    method = Balanced(Settings(method="balanced"), FABRIC, f, [], data)
    close(method.prior, case["prior"])
    logits = case["logits"].requires_grad_()
    loss = balanced_cross_entropy(logits, case["labels"], method.prior[case["bias"]])
    loss.backward()
    close(loss, case["loss"])
    close(logits.grad, case["gradient"])


def test_the_released_contrastive_loss():
    """grayhong/bias-contrastive-learning: chances of its second batch, loss and gradient of two views."""
    case = load("bias_contrastive")
    close(
        rarity(case["train_labels"], case["train_bias"]) / case["chances"].min(),
        case["chances"] / case["chances"].min(),
    )
    features = case["features"].requires_grad_()
    loss = bias_contrastive(features, case["labels"].repeat(2), case["bias"].repeat(2))
    loss.backward()
    close(loss, case["loss"])
    close(features.grad, case["gradient"])


def test_dfr_minimises_the_l1_penalised_logistic_loss_of_balanced_groups():
    """Against L-BFGS-B on the same objective, weights split into positive and negative parts."""
    generator = torch.Generator().manual_seed(0)
    labels, bias = torch.arange(90) % 3, (torch.arange(90) // 3) % 2
    features = (
        torch.randn(90, 4, generator=generator) * torch.tensor([1.0, 5, 0.1, 1]) + labels[:, None] + bias[:, None]
    )
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    x = torch.cat([x, torch.ones(90, 1)], 1).numpy()
    expected = []
    for label in range(3):
        sign = np.where(labels == label, 1, -1)

        def objective(parts, sign=sign):
            w = parts[:5] - parts[5:]
            gradient = -(x.T @ (sign / (1 + np.exp(sign * (x @ w)))))
            return np.logaddexp(0, -sign * (x @ w)).sum() + parts.sum(), np.concatenate([1 + gradient, 1 - gradient])

        best = minimize(objective, np.zeros(10), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 10).x
        expected.append(x @ (best[:5] - best[5:]))
    weight, offset = last_layer(features, labels, bias)
    logits = features @ weight.T + offset
    torch.testing.assert_close(logits.double(), torch.tensor(np.stack(expected, 1)), rtol=0, atol=0.02)


def test_dfr_draws_as_many_of_every_group_as_the_smallest_has(monkeypatch):
    seen = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, x, y: (seen.append(x), fit(self, x, y))[1])
    labels, bias = torch.tensor([0] * 20 + [1] * 12), torch.tensor([0] * 17 + [1] * 3 + [0] * 2 + [1] * 10)
    last_layer(torch.arange(32.0)[:, None], labels, bias, fits=4)
    rows = [sorted(np.round(x[:, 0] * np.arange(32).std() + 15.5).astype(int)) for x in seen]
    assert len({tuple(each) for each in rows}) > 1
    for each in rows:
        groups = [(int(labels[row]), int(bias[row])) for row in each]
        assert len(set(each)) == 8 and all(groups.count(group) == 2 for group in groups)


def test_jtt_weighs_errors_as_the_released_code_repeats_them():
    """anniesch/jtt: the training set with `up_weight` further copies of what the first network gets wrong."""
    f, g = (SimpleConvNet(3, 1, (4,)).eval() for _ in "fg")
    images, targets = torch.randn(12, 3, 4, 4), torch.arange(12) % 3
    wrong = g(images)[0].argmax(1) != targets
    repeated = torch.cat([torch.arange(12), wrong.nonzero()[:, 0].repeat(7)])
    expected = torch.nn.functional.cross_entropy(f(images)[0][repeated], targets[repeated])
    method = JTT(Settings(method="jtt", upweight=7), FABRIC, f, [g], range(12))
    assert 0 < wrong.sum() < 12
    close(method.step(images, targets, torch.arange(12))["f_weighted_cross_entropy"], expected.detach())


def test_the_released_steps_of_hex():
    """HaohanWang/HEX, its graph written out in PyTorch: grey levels, co-occurrence, norms, projection."""
    case = load("hex_trajectory")
    f = SimpleConvNet(3, 3, (4,))
    f.load_state_dict({key: case[f"f_init_{key}"] for key in f.state_dict()})
    method = HEX(Settings(method="hex", lr=1e-2, weight_decay=0.0), FABRIC, f, [], range(36))
    network = method.modules["f"].module
    glcm, head = network.superficial, network.head
    start = {glcm.lambda_: "lamda", glcm.theta: "theta", glcm.fc.weight: "W1", glcm.fc.bias: "b1"}
    for parameter, name in (start | {head.weight: "W2", head.bias: "b2"}).items():
        parameter.data = case[f"init_{name}"].T.clone() if name.startswith("W") else case[f"init_{name}"].clone()
    for number, index in enumerate(case["order"]):
        parts = method.step(case["images"][index], case["labels"][index], index)
        close(parts["f_cross_entropy"], case["losses"][number])
        for parameter, name in ((glcm.lambda_, "lamda"), (head.weight.T, "W2"), (head.bias, "b2")):
            close(parameter, case[f"step_{name}"][number])
        close(f.layers[0].weight, case["step_conv"][number])
