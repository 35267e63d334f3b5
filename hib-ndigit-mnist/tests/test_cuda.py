"""Training with and without a CUDA graph, resuming, evaluation and a table's row on a CUDA device."""

from dataclasses import replace

import pytest
import torch

from hib_ndigit_mnist import experiments
from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.evaluate import Evaluation, TestSet, fit_match
from hib_ndigit_mnist.experiments import run_tables, tables
from hib_ndigit_mnist.finetune import embed_images, score, train_on
from hib_ndigit_mnist.settings import BackboneTraining, Training
from hib_ndigit_mnist.train import _Run, train

DEVICE = "cuda"
TABLES = {table.id: table for table in tables()}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Training(
    architecture="mlp", hidden=(16,), steps=100, batch=16, pairs=24, lr=3e-3, beta=1e-3, occlusion_p=0.5, samples=4
)
LENET = replace(SMALL, architecture="lenet")
KINDS = [
    SMALL,
    LENET,
    replace(LENET, components=2, objective="mean_log"),
    replace(LENET, batch_norm=True),
    replace(LENET, dim=5),
    replace(LENET, method="point"),
    replace(LENET, method="contrastive"),
]


@pytest.fixture(scope="module")
def sets():
    return ndigit_sets("digits", 1, "instance", ".", total_train=1080, total_test=450, min_per_number=10)


def weights(model):
    parts = [*model.encoder.state_dict().values(), *model.match.state_dict().values()]
    return torch.cat([part.flatten().float() for part in parts])


def name(training):
    return f"{training.architecture} {training.method} C={training.components} D={training.dim}"


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("training", KINDS, ids=name)
def test_losses_are_the_cpu_s(sets, training, graph):
    """Of two stacked models over six steps with the same random numbers."""
    cpu = _Run(sets["train"], [training] * 2, [1, 2], "cpu", False)
    gpu = _Run(sets["train"], [training] * 2, [1, 2], DEVICE, graph)
    for _ in range(6):
        drawn = cpu._draw(1)
        for run in (cpu, gpu):
            run._draw = lambda steps, run=run, drawn=drawn: tuple(part.to(run.fabric.device) for part in drawn)
            run.chunk(1)
        del cpu._draw
    ours, theirs = (torch.stack([values[:4].cpu() for _, values in run.history]) for run in (gpu, cpu))
    torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("training", KINDS, ids=name)
def test_a_graph_trains_like_eager_steps(sets, training):
    (start, _), _ = train(
        sets["train"], [replace(training, steps=1, lr=1e-12, lr_final=0.0)] * 2, [1, 2], device=DEVICE
    )
    graph, eager = (
        train(sets["train"], [training] * 2, [1, 2], device=DEVICE, graph=graph)[0][0] for graph in (True, False)
    )
    assert graph.history["loss"] == pytest.approx(eager.history["loss"], rel=0.02, abs=1e-3)
    assert (weights(graph) - weights(eager)).norm() < 0.05 * (weights(eager) - weights(start)).norm()


@pytest.mark.parametrize("training", [SMALL, replace(LENET, components=2)], ids=name)
def test_an_interrupted_run_ends_where_the_whole_one_does(sets, tmp_path, training):
    class Stop(Exception):
        pass

    def stop(step, models):
        raise Stop

    def run(visit, checkpoint=None):
        return train(
            sets["train"],
            [replace(training, steps=150)] * 2,
            [1, 2],
            device=DEVICE,
            checkpoint=checkpoint,
            checkpoint_every=50,
            visit_at=[100],
            visit=visit,
        )

    (whole, _), visits = run(lambda step, models: [weights(model).tolist() for model in models])
    with pytest.raises(Stop):
        run(stop, tmp_path / "c.pt")
    torch.manual_seed(99)
    (resumed, _), again = run(lambda step, models: [weights(model).tolist() for model in models], tmp_path / "c.pt")
    assert resumed.history["loss"] == pytest.approx(whole.history["loss"], rel=0.02, abs=1e-3)
    late = weights(whole) - torch.tensor(visits[0][0])
    assert (weights(resumed) - weights(whole)).norm() < 0.2 * late.norm()
    assert torch.tensor(again[0]).shape == torch.tensor(visits[0]).shape


@pytest.mark.parametrize("training", [LENET, replace(LENET, components=2), replace(LENET, dim=5)], ids=name)
def test_evaluation_is_the_cpu_s(sets, training):
    """Float32 up to TF32 in the convolutions, then float64."""
    (model,), _ = train(sets["train"], [training], [0], device=DEVICE)
    test = TestSet.of(sets["test"], images=200, pairs=600, queries=100)
    found = []
    for device in ("cpu", DEVICE):
        evaluation = Evaluation(model.encoder.to(device), model.match, test, "quadrature")
        assert evaluation.embeddings["clean"].mu.dtype == torch.float64
        scores = evaluation.verification() | evaluation.calibration() | evaluation.spread() | evaluation.divergence()
        scores |= {"auc": evaluation.uncertainty()["auc"]}
        found.append((scores, evaluation.identification() | evaluation.selective()))
    (theirs, their_ranks), (ours, our_ranks) = found
    assert ours == pytest.approx(theirs, rel=0.01, abs=0.01)
    assert our_ranks == pytest.approx(their_ranks, abs=0.03)


def test_points_are_fitted_and_sampled_on_the_device(sets):
    (model,), _ = train(sets["train"], [replace(LENET, method="contrastive")], [0], device=DEVICE)
    test = TestSet.of(sets["test"], images=200, pairs=600, queries=100)
    encoder = model.encoder.to(DEVICE)
    evaluation = Evaluation(encoder, fit_match(encoder, sets["train"], 0.5), test, "mc")
    assert 0.5 < evaluation.verification()["ap_clean"] <= 1 and 0 < evaluation.identification()["knn_clean"] <= 1


@pytest.mark.parametrize("method", ["mog", "point", "pfe", "mc-dropout", "mc-infonce"])
def test_a_backbone_is_trained_and_embeds(method):
    generator, labels = torch.Generator().manual_seed(0), [number % 4 for number in range(32)]
    pictures = [(torch.rand(3, 32, 32, generator=generator), label) for label in labels]
    settings = BackboneTraining(
        backbone="torchvision:resnet18", image_size=32, method=method, dim=4, steps=4, batch=8, lr=1e-3
    )
    model = train_on(pictures, labels, settings, pretrained=False, workers=1, device=DEVICE)
    here, there = (embed_images(model, pictures, device=device, precision="32-true") for device in ("cpu", DEVICE))
    assert there.mu.device.type == "cpu" and there.mu.dtype == torch.float32
    if method != "mc-dropout":  # its passes draw on the device
        torch.testing.assert_close(there.mu, here.mu, rtol=0.02, atol=0.02)
    assert 0 <= score(model, embed_images(model, pictures, device=DEVICE), torch.tensor(labels))["r1"] <= 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("table, row", [("table-1", "N=1 D=2 MoG-1"), ("table-2", "N=1 D=2 MoG-2")])
def test_a_row_of_a_table(project, table, row):
    (record,) = run_tables([TABLES[table]], "smoke", project, rows=[row]).records()
    assert record["precision"] == "32-true" and record["device"] == torch.cuda.get_device_name()
    metrics = record["metrics"]
    assert all(0 <= metrics[metric] <= 1 for metric in metrics if metric.startswith(("ap", "auc")))
