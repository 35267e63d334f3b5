"""Training with both heads, resuming, reading, cost and a table's row on a CUDA device, held against the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from str_benchmark import experiments
from str_benchmark.evaluation import latency_ms, read
from str_benchmark.experiments import Machine, Source, _training_data, run_tables, tables, train_and_evaluate
from str_benchmark.models import build_model
from str_benchmark.models.inference import for_inference
from str_benchmark.settings import TINY
from str_benchmark.train import fit, loss_of, make_fabric

DEVICE = "cuda"
TABLES = {table.id: table for table in tables()}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = (
    "None-VGG-None-CTC",
    "None-VGG-None-Attn",
    "None-VGG-BiLSTM-CTC",
    "TPS-RCNN-BiLSTM-CTC",
    "TPS-ResNet-BiLSTM-Attn",
)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Rendered words and run logs go to a folder of the test."""
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    return tmp_path


def trained(fabric, s, *, workers=0, **options):
    source = Source(Path("."), workers)
    torch.manual_seed(0)
    model = build_model(s.config).to(fabric.device).to(memory_format=torch.channels_last)
    data = _training_data(s, s.train, s.ratios, 1, source, fabric, model)
    return model, fit(model, data, s, fabric, run={"settings": {}}, **options)


def weights(model):
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer, schedule, lr", [("adadelta", "constant", 1.0), ("adamw", "onecycle", 2e-3)])
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_the_cpu_s(model, optimizer, schedule, lr):
    """Mean over three steps from the same weights and words: bf16 against float32."""
    s = replace(TINY, model=model, optimizer=optimizer, schedule=schedule, lr=lr, steps=3)
    _, ((expected),) = trained(make_fabric("cpu"), s)
    _, ((found),) = trained(make_fabric(DEVICE), s)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_the_cpu_s(model):
    """Of the first step, in float32 up to TF32."""
    images, words = torch.rand(4, 1, 32, 100, generator=torch.Generator().manual_seed(0)), ["abc", "z", "word", "12"]
    losses, gradients = [], []
    for fabric in (make_fabric("cpu"), make_fabric(DEVICE, "32-true")):
        torch.manual_seed(0)
        network = build_model(model, output_channel=32, hidden_size=32).to(fabric.device)
        ids, lengths = network.tokenizer.encode(words, 25)
        batch = images.to(fabric.device), ids.to(fabric.device), lengths
        loss = loss_of(network, network.config.pred, *batch, fabric)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in network.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("resident", [True, False])
def test_an_interrupted_run_ends_where_the_whole_one_does(project, resident):
    """Also with a worker process beside CUDA."""

    class Stop(Exception):
        pass

    def stop(step):
        if step == 9:
            raise Stop

    s = replace(TINY, model="TPS-VGG-BiLSTM-Attn", steps=14, resident=resident, lr=1e-3)
    fabric, workers = make_fabric(DEVICE), 0 if resident else 1
    torch.manual_seed(0)
    start = weights(build_model(s.config))
    whole, curve = trained(fabric, s, workers=workers)
    options = {"workers": workers, "checkpoint": project / "c.pt", "checkpoint_every": 4}
    with pytest.raises(Stop):
        trained(fabric, s, **options, before_step=stop)
    torch.manual_seed(99)
    resumed, again = trained(fabric, s, **options)
    assert again[-1]["loss"] == pytest.approx(curve[-1]["loss"], rel=0.02)
    assert (weights(resumed) - weights(whole)).norm() < 0.1 * (weights(whole) - start).norm()


@pytest.mark.parametrize("model", ["None-VGG-BiLSTM-CTC", "TPS-ResNet-BiLSTM-Attn"])
def test_validation_keeps_the_best_weights(project, model):
    s = replace(TINY, model=model, steps=4, validation=("test-tiny-curve",), val_every=2)
    _, outcome = train_and_evaluate(s, 0, Source(project), make_fabric(DEVICE), project / "c.pt")
    assert outcome.precision and len(outcome.details["curve"]) == 2
    assert outcome.metrics["time_ms"] > 0 and 0 <= outcome.metrics["total_accuracy"] <= 100


@pytest.mark.parametrize("model", MODELS)
def test_reading_is_the_cpu_s(model):
    """Float32 on both, up to TF32; batch norm folded in one of them."""
    s = replace(TINY, model=model, steps=3)
    network, _ = trained(make_fabric("cpu"), s)
    images = torch.rand(4, 1, *s.config.img_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network.eval()
    with torch.inference_mode():
        expected = network(images)
        network.to(DEVICE)
        assert network(images.to(DEVICE)).dtype == torch.float32
        steps = 1 if s.config.pred == "Attn" else None  # later ones follow the characters read
        for each in (network, for_inference(network)):
            found = each(images.to(DEVICE)).cpu()
            torch.testing.assert_close(found[:, :steps], expected[:, :steps], rtol=0.02, atol=0.02)
    sets = Source(Path(".")).for_evaluation(("test-tiny",), s)
    reading = read(network, sets["test-tiny"])
    assert len(reading.texts) == 32 and all(0 <= p <= 1 for p in reading.confidences)
    assert latency_ms(for_inference(network), repeats=2, warmup=1) > 0


@pytest.mark.parametrize(
    "table, row", [("modules", "None-VGG-None-CTC"), ("modules", "TPS-RCNN-BiLSTM-Attn"), ("cost", None)]
)
def test_a_row_of_a_table(project, table, row):
    rows = [row] if row else [TABLES[table].rows_at("smoke")[0].name]
    record, *_ = run_tables([TABLES[table]], "smoke", Machine(project), rows=rows, seeds=[0]).records()
    assert record["device"] == torch.cuda.get_device_name() and record["metrics"]["time_ms"] > 0
    assert table == "cost" or record["precision"] == "bf16-mixed"
