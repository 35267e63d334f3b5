"""Against the fixtures of the released code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rebias import (
    BagNet18,
    LearnedMixinLoss,
    ResNet3D,
    ResNet18,
    RUBiLoss,
    SimpleConvNet,
    assign_bias,
    colourise,
    group_accuracy,
    hex_project,
    hsic,
    median_sigma,
    rbf_gram,
    unbiased_accuracy_clusters,
)
from rebias.data.imagenet9 import CLASS_OF_WNID, CLASSES
from rebias.models import receptive_field

GOLDEN = Path(__file__).parent / "golden"


def cases(name):
    data = np.load(GOLDEN / f"{name}.npz")
    found = sorted({key.split("_")[0] for key in data}, key=lambda case: int(case[1:]))
    return [
        {key.split("_", 1)[1]: torch.from_numpy(np.asarray(data[key])) for key in data if key.startswith(f"{case}_")}
        for case in found
    ]


def close(actual, expected):
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if expected.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("case", cases("hsic"))
def test_hsic_and_its_gradients(case, estimator):
    x, y = case["x"].requires_grad_(), case["y"].requires_grad_()
    value = hsic(x, y, *case["sigma"].tolist(), estimator)
    expected = case[estimator] if x.dtype == torch.float64 else case[estimator].float()
    close(value, expected)
    for gradient, name in zip(torch.autograd.grad(value, (x, y)), "xy", strict=True):
        close(gradient, case[f"grad_{name}_{estimator}"])
    if "K" in case:
        close(rbf_gram(x, case["sigma"][0].item()), case["K"])
        close(rbf_gram(y, case["sigma"][1].item()), case["L"])


@pytest.mark.parametrize("case", cases("median_sigma"))
def test_median_over_a_share_of_the_batches(case):
    share = math.floor(case["sampling_rate"].item() * len(case["f_feats"])) + 1
    for feats, expected in zip((case["f_feats"], case["g_feats"]), case["median"], strict=True):
        close(median_sigma(list(feats[:share])), expected)


@pytest.mark.parametrize("case", cases("baseline_losses"))
def test_rubi_and_its_gradients(case):
    g_feat, f_pred = case["g_feat"].requires_grad_(), case["f_pred"].requires_grad_()
    loss = RUBiLoss(g_feat.shape[1], f_pred.shape[1], case["rubi_question_loss_weight"].item()).double()
    loss.fc.load_state_dict({"weight": case["rubi_fc_weight"], "bias": case["rubi_fc_bias"]})
    total, _ = loss(f_pred, g_feat, case["labels"])
    total.backward()
    close(total, case["rubi_loss"])
    close(f_pred.grad, case["rubi_grad_f_pred"])
    close(loss.fc.weight.grad, case["rubi_grad_fc_weight"])
    close(loss.fc.bias.grad, case["rubi_grad_fc_bias"])
    assert g_feat.grad is None and not case["rubi_grad_g_feat"].any()


@pytest.mark.parametrize("case", cases("baseline_losses"))
def test_learned_mixin_and_its_gradients(case):
    f_feat, f_pred = case["f_feat"].requires_grad_(), case["f_pred"].requires_grad_()
    loss = LearnedMixinLoss(f_feat.shape[1], case["lm_w"].item()).double()
    loss.fc.load_state_dict({"weight": case["lm_fc_weight"], "bias": case["lm_fc_bias"]})
    total, _ = loss(f_pred, f_feat, case["g_pred"], case["labels"])
    total.backward()
    close(total, case["lm_loss"])
    close(f_feat.grad, case["lm_grad_f_feat"])
    close(f_pred.grad, case["lm_grad_f_pred"])
    close(loss.fc.weight.grad, case["lm_grad_fc_weight"])
    close(loss.fc.bias.grad, case["lm_grad_fc_bias"])


@pytest.mark.parametrize("case", cases("hex_projection"))
def test_hex_projection(case):
    close(hex_project(case["F_A"], case["F_G"]), case["F_L"])


COLOURS = list(
    zip(cases("colour_assignment"), json.loads((GOLDEN / "colour_assignment_index.json").read_text()), strict=True)
)


@pytest.mark.parametrize("case, index", COLOURS)
def test_colours_are_assigned_in_the_same_numbers(case, index):
    labels = case["labels"].long()
    bias = assign_bias(labels, index["rho"], index["n_confusing"], torch.Generator().manual_seed(3))
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels, bias), torch.ones_like(labels), accumulate=True)
    assert torch.equal(counts.diag(), case["counts"].diag())
    off = ~torch.eye(10, dtype=torch.bool)
    for ours, reference in zip(counts, case["counts"], strict=True):
        assert sorted(ours.tolist()) == sorted(reference.tolist())
    assert int((labels != bias).sum()) == index["n_conflict"]
    if index["n_confusing"] < 9:
        allowed = [[(label + 1 + k) % 10 for k in range(index["n_confusing"])] for label in range(10)]
        for label in range(10):
            used = (counts[label] * off[label]).nonzero()[:, 0].tolist()
            assert set(used) <= set(allowed[label])


@pytest.mark.parametrize("case, index", COLOURS)
def test_colours_of_pixels(case, index):
    assert torch.equal(colourise(case["gray_first4"], case["bias_labels"][:4].long()), case["rgb_first4"])


@pytest.mark.parametrize("kernel", [1, 7])
def test_convnet_outputs(kernel, closed_form):
    data = np.load(GOLDEN / "networks.npz")
    network = closed_form(SimpleConvNet(kernel_size=kernel))
    logits, features = network(torch.from_numpy(data[f"convnet_k{kernel}_x"]))
    close(logits, torch.from_numpy(data[f"convnet_k{kernel}_logits"]))
    close(features, torch.from_numpy(data[f"convnet_k{kernel}_feat"]))


@pytest.mark.parametrize("name, kind", [("bagnet18", BagNet18), ("resnet18", ResNet18)])
def test_imagenet_networks_outputs(name, kind, closed_form):
    """48 x 48 pixels: BagNet's shortcuts lose rows and columns at the far edges only."""
    data = np.load(GOLDEN / "imagenet_networks.npz")
    logits, features = closed_form(kind(9))(torch.from_numpy(data["x"]))
    close(logits, torch.from_numpy(data[f"{name}_logits"]))
    close(features, torch.from_numpy(data[f"{name}_feat"]))


def test_parameter_counts_and_shapes_of_weights():
    golden = json.loads((GOLDEN / "networks.json").read_text())
    for name, network in {
        "convnet_k1": SimpleConvNet(kernel_size=1),
        "convnet_k7": SimpleConvNet(),
        "resnet18": ResNet18(9),
        "bagnet18": BagNet18(9),
    }.items():
        assert sum(p.numel() for p in network.parameters()) == golden[name]["params"]
        shapes = sorted(list(value.shape) for value in network.state_dict().values())
        assert shapes == sorted(golden[name]["state"].values())
    for kernels, count in (("33333", 5_170_154), ("11111", 2_801_450)):
        assert sum(p.numel() for p in ResNet3D(10, kernels).parameters()) == count


def test_receptive_fields():
    assert receptive_field(SimpleConvNet()) == 25 and receptive_field(SimpleConvNet(kernel_size=1)) == 1
    assert receptive_field(ResNet18()) == 435
    assert receptive_field(ResNet3D(), axis=0) == 19 and receptive_field(ResNet3D(10, "11111"), axis=0) == 1


@pytest.mark.parametrize(
    "network, field", [(SimpleConvNet(kernel_size=5, widths=(4, 4), strides=(1, 2)), 9), (BagNet18(), 5)]
)
def test_receptive_field_is_what_gradients_reach(network, field):
    maps = network.layers if isinstance(network, SimpleConvNet) else torch.nn.Sequential(network.stem, network.blocks)
    for weight in maps.parameters():
        weight.data.abs_()  # with positive images no ReLU is shut, whatever was drawn
    images = torch.rand(1, 3, 45, 45, dtype=torch.float64, requires_grad=True)
    out = maps.double().eval()(images)
    out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum().backward()
    reached = images.grad.abs().sum((0, 1, 2)).nonzero()[:, 0]
    assert int(reached.max() - reached.min()) + 1 == field


@pytest.mark.parametrize("case", cases("group_accuracy"))
def test_group_matrix(case):
    accuracy, counts = group_accuracy(case["logits"].argmax(1), case["labels"], case["bias_labels"], 10, 10)
    assert torch.equal(counts.double(), case["n_total"])
    filled = counts > 0
    torch.testing.assert_close(accuracy[filled], case["acc_matrix"][filled], rtol=1e-12, atol=0)
    assert accuracy[~filled].isnan().all()


@pytest.mark.parametrize("case", cases("unbiased_accuracy"))
def test_accuracy_over_texture_clusters(case):
    predictions = case["logits"].argmax(1)
    value = unbiased_accuracy_clusters(predictions, case["labels"], case["clusters"])
    expected = case["unbiased_acc"].item()
    assert value == pytest.approx(expected / 100 if expected > 1 else expected, rel=1e-12)


def test_the_42_wordnet_ids():
    golden = json.loads((GOLDEN / "imagenet9_wnids.json").read_text())
    assert golden["wnid_to_class"] == CLASS_OF_WNID and tuple(golden["classes"]) == CLASSES
