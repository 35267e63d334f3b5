"""Metrics of few numbers with the answer that a pencil gives, and predictions of whole sets."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from rebias import hsic, median_sigma
from rebias.evaluate import (
    _in_order,
    dependence,
    group_accuracy,
    group_report,
    group_summary,
    predict,
    read_predictions,
    top1_accuracy,
)
from rebias.settings import PRESETS
from rebias.tasks import TASKS
from rebias.train import make_fabric

FABRIC = make_fabric("cpu")


def test_predictions_from_a_file(tmp_path):
    file = tmp_path / "p.csv"
    frame = pd.DataFrame({"label": [0, 1, 2], "prediction": [2, 1, 0], "note": "x", "bias": [1, 0, 1]})
    frame.to_csv(file, index=False)
    found = read_predictions(file)
    assert [column.tolist() for column in found] == [[2, 1, 0], [0, 1, 2], [1, 0, 1]]
    assert all(column.dtype == torch.int64 for column in found)
    for changed, message in (
        (frame.drop(columns="bias"), r"needs the columns prediction, label, bias, has label, prediction, note$"),
        (frame.assign(label=[0.5, 1, 2]), "label must hold 0, 1, 2 .., one value a line"),
        (frame.assign(bias=[0, -1, 0]), "bias must hold 0, 1, 2"),
        (frame[:0], "prediction must hold 0, 1, 2"),
    ):
        changed.to_csv(file, index=False)
        with pytest.raises(ValueError, match=message):
            read_predictions(file)
    with pytest.raises(FileNotFoundError, match="none.csv: file not found"):
        read_predictions(tmp_path / "none.csv")


def test_accuracies_by_hand():
    logits = torch.tensor([[1.0, 2, 2], [3, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert top1_accuracy(logits, torch.tensor([1, 0, 1, 2])) == 75  # the first of equal logits counts
    predictions, labels, bias = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    assert group_summary(predictions, labels, bias, 3) == {
        "group_mean_accuracy": 50, "worst_group_accuracy": 0, "aligned_accuracy": 100, "conflicting_accuracy": 0,
    }  # fmt: skip


def test_the_dependence_of_few_and_of_many_features():
    generator = torch.Generator().manual_seed(1)
    f, g = torch.randn(60, 3, generator=generator), torch.randn(60, 5, generator=generator)
    g[:, 0] = f[:, 0]

    def expected(rows):
        a, b = f[rows].double(), g[rows].double()
        sigmas = [median_sigma(each, include_diagonal=False) for each in (a, b)]
        return hsic(a, b, *sigmas).item()

    assert dependence(f, g) == pytest.approx(expected(slice(None)), rel=1e-9) and dependence(f, g) > 0
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert dependence(f, g, 20) == pytest.approx(expected(order[:20]), rel=1e-9)
    assert dependence(100 * f, g) == pytest.approx(dependence(f, g), rel=1e-6)


def test_features_may_be_numbers():
    x, y = torch.randn(12), torch.randn(12)
    assert hsic(x, y).item() == pytest.approx(hsic(x[:, None], y[:, None]).item())
    assert median_sigma(x).item() == median_sigma(x[:, None]).item()


def test_rows_of_three_ranks_are_put_in_order():
    """Rank r holds rows r, r + 3, ...: of seven rows rank 0 has three, the others two and one of padding."""
    rows = torch.arange(14.0).reshape(7, 2)
    seen = []

    def all_gather(padded):
        seen.append(padded)
        ranks = [torch.cat([rows[r::3], rows.new_full((1, 2), -1)])[:3] for r in range(3)]
        return torch.stack(ranks)

    fabric = SimpleNamespace(world_size=3, all_gather=all_gather)
    assert torch.equal(_in_order(rows[1::3], 7, fabric), rows)
    assert seen[0].tolist() == [[2, 3], [8, 9], [0, 0]]


def test_what_is_wrong_with_groups_is_named():
    four = torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"must all be \(n,\), got \(4,\), \(3,\), \(4,\)$"):
        group_accuracy(four, four[:3], four, 2, 2)
    for name, arguments in (("labels", (four, four + 1, four)), ("bias", (four, four, four - 1))):
        with pytest.raises(ValueError, match=f"{name} must lie in 0 .. 1, got"):
            group_accuracy(*arguments, 2, 2)
    with pytest.raises(ValueError, match="bias must be integers, got torch.float32"):
        group_accuracy(four, four, four.float(), 2, 2)
    with pytest.raises(ValueError, match="no sample to report on"):
        group_report(four[:0], four[:0], four[:0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_400_groups_fit_into_small_integers(dtype):
    cells = torch.arange(400)
    labels, bias = (cells // 20).to(dtype), (cells % 20).to(dtype)
    accuracy, counts = group_accuracy(labels, labels, bias, 20, 20)
    assert (counts == 1).all() and (accuracy == 1).all()


class Half(torch.nn.Module):
    """Gives half-precision logits of the mean brightness, and features of two axes."""

    def forward(self, images):
        assert not self.training
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1).bfloat16(), images.mean((1, 2))[:, :, None].bfloat16()


@pytest.mark.parametrize("training", [True, False])
def test_a_network_predicts_in_batches_in_float32_and_keeps_its_mode(training):
    data, network = TASKS["digits"](PRESETS["digits"], 3, Path("nowhere"), FABRIC).train, Half().train(training)
    logits, features = predict(network, data, FABRIC, batch_size=1000)
    assert network.training is training and logits.dtype == features.dtype == torch.float32
    assert logits.shape == (len(data), 2) and features.shape == (len(data), 8)
    (images, _), *_ = data.batches([torch.tensor([0, 1001])])
    torch.testing.assert_close(logits[[0, 1001]], network.eval()(images)[0].float())
