"""The networks: shapes, sizes, residual branches, normalisation and loading of weights."""

import pytest
import torch

from cutmix_robustness.data.twowave import MEAN, STD
from cutmix_robustness.networks import NETWORKS, Classifier, SmallNet
from cutmix_robustness.networks.blocks import branch_regularizers
from cutmix_robustness.train import load_network


@pytest.mark.parametrize("kind", ["stochdepth", "shakedrop"])
def test_survival_decays_linearly_from_the_first_branch_to_the_last(kind):
    survival = [branch.survival for branch in branch_regularizers(kind, 4, 0.4)]
    assert survival == pytest.approx([0.9, 0.8, 0.7, 0.6])


def test_a_classifier_normalises_by_mean_and_std():
    model = Classifier(torch.nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    pixels = model(torch.full((1, 3, 1, 1), 0.6)).flatten().tolist()
    assert pixels == pytest.approx([1.0, 1.6, 1.5])


def test_weights_of_another_network_are_named():
    model, other = Classifier(SmallNet(15), MEAN, STD), SmallNet(10)
    with pytest.raises(ValueError, match=r"w.pt: fc.weight has shape \(10, 32\), expected \(15, 32\)"):
        load_network(model, other.state_dict(), "w.pt")
    load_network(
        model, {f"module.{name}": value for name, value in other.state_dict().items()}, "w.pt", keep_head=False
    )
    assert torch.equal(model.network.conv1[0].weight, other.conv1[0].weight) and model.network.fc.out_features == 15
    with pytest.raises(ValueError, match="weights of another network: .* is missing"):
        load_network(model, {}, "w.pt")


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("resnet101", "resnext101")])
def test_networks_by_name(name):
    side = 64 if "resnet50" in name or "vgg" in name else 32
    options = {} if name == "vgg-gap" else {"branch": "shakedrop"}
    with torch.device("meta"):
        network = NETWORKS[name](num_classes=7, **options)
        x = torch.rand(2, 3, side, side)
        assert network(x).shape == (2, 7)
        features = network.features(x)
        assert network.fc(features.mean((2, 3))).shape == (2, 7)
    dense = {"small-wide": 4, "resnet14": 1, "resnet50": 2, "resnet50-dense": 4, "vgg-gap": 4}
    assert features.shape[-1] == dense.get(name, side // 4)


def test_deeper_networks_have_the_printed_sizes():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in NETWORKS[name]().parameters()) / 1e6 for name in ("resnet101", "resnext101")
        }
        wide = sum(p.numel() for p in NETWORKS["wrn28-10"](num_classes=100).parameters())
        basic = sum(p.numel() for p in NETWORKS["resnet20"](num_classes=10).parameters())
    assert round(sizes["resnet101"], 1) == 44.5 and round(sizes["resnext101"], 1) == 44.2
    assert wide == 36_536_884 and 270_000 < basic < 276_000
