"""Training, resuming, evaluation and a table's row on a CUDA device, held against the CPU in float32."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from rebias import experiments
from rebias.data.biased import BiasedDigits
from rebias.data.dataset import Reading
from rebias.data.tiny import write_files
from rebias.evaluate import predict
from rebias.experiments import METHODS, Execution, build_method, run_tables, tables
from rebias.models import BagNet18, ResNet3D, ResNet18
from rebias.settings import PRESETS
from rebias.tasks import TASKS
from rebias.train import fit, make_fabric

DEVICE = "cuda"
TABLE = next(table for table in tables() if table.id == "table-1")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_task(fabric, **changes):
    """512 of the digits: four steps an epoch."""
    settings = replace(PRESETS["digits"], **{"epochs": 1} | changes)
    task = TASKS["digits"](settings, 1, Path("."), fabric)
    parts = (part[:512] for part in (task.train.mask, task.train.labels, task.train.bias))
    task.train = BiasedDigits(*parts, "512 digits").to(fabric.device)
    return task


def trained(fabric, **changes):
    task = small_task(fabric, **changes)
    method = build_method(task)
    return method, fit(method, task.train, 1)


def weights(method):
    parts = [p.detach().cpu().flatten() for module in method.modules.values() for p in module.parameters()]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "vanilla"},
        {"method": "vanilla", "penalty": "feature-norm", "f_lambda": 0.1},
        {"method": "biased"},
        {"method": "rebias", "order": "g-first"},
        {"method": "rebias", "order": "f-first"},
        {"method": "rebias", "order": "f-first", "sigma_every": "epoch", "n_g_nets": 2},
        {"method": "rebias", "conditional": True, "estimator": "biased"},
        {"method": "rebias", "n_g_update": 0, "sigma": "fixed"},
        {"method": "rubi"},
        {"method": "rubi", "head": "frozen"},
        {"method": "learnedmixin", "pretrain_epochs": 1},
        {"method": "hex"},
        {"method": "lff"},
        {"method": "jtt", "pretrain_epochs": 1},
        {"method": "balanced"},
        {"method": "dfr"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_losses_are_the_cpu_s(changes):
    """Means over an epoch of four steps, from the same weights and batches: bf16 against float32."""
    _, expected = trained(make_fabric("cpu"), **changes)
    _, found = trained(make_fabric(DEVICE), **changes)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=0.06, abs=0.01)


@pytest.mark.parametrize("changes", [{"method": "biascon"}, {"method": "rebias", "penalty": "hsic-shuffled"}])
def test_losses_with_draws_of_the_device_fall(changes):
    _, expected = trained(make_fabric("cpu"), **changes)
    _, found = trained(make_fabric(DEVICE), epochs=2, **changes)
    assert found[0]["f_cross_entropy"] == pytest.approx(expected[0]["f_cross_entropy"], rel=0.1)
    assert found[1]["f_cross_entropy"] < found[0]["f_cross_entropy"]


@pytest.mark.parametrize(
    "preset, networks, shape",
    [
        ("imagenet9", (lambda: ResNet18(9), lambda: BagNet18(9)), (8, 3, 64, 64)),
        ("kinetics10", (lambda: ResNet3D(10), lambda: ResNet3D(10, "11111")), (4, 3, 8, 64, 64)),
    ],
)
def test_a_step_of_the_large_networks(preset, networks, shape):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(shape, generator=generator), torch.arange(shape[0]) % 9
    layout = TASKS[preset].memory_format
    found = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        f, g = (make().to(memory_format=layout) for make in networks)
        settings = replace(PRESETS[preset], sigma_every="batch", lr=1e-3)
        method = METHODS["rebias"](settings, make_fabric(device), f, [g], None)
        batch = images.to(device, memory_format=layout), targets.to(device), torch.arange(shape[0])
        found[device] = [{name: value.item() for name, value in method.step(*batch).items()} for _ in range(2)]
    assert found[DEVICE][0] == pytest.approx(found["cpu"][0], rel=0.06, abs=0.02)
    assert all(abs(value) < 100 for value in found[DEVICE][1].values())


@pytest.mark.parametrize("changes", [{"method": "rebias", "sigma_every": "epoch"}, {"method": "lff"}])
def test_an_interrupted_run_ends_where_the_whole_one_does(tmp_path, changes):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 7:
            raise Stop

    options = {"epochs": 3} | changes
    start = weights(build_method(small_task(make_fabric(DEVICE), **options)))
    whole, curve = trained(make_fabric(DEVICE), **options)
    for before_step in (stop, lambda step: None):
        task = small_task(make_fabric(DEVICE), **options)
        method = build_method(task)
        try:
            again = fit(method, task.train, 1, checkpoint=tmp_path / "c", checkpoint_every=2, before_step=before_step)
        except Stop:
            torch.manual_seed(99)
    assert again[-1] == pytest.approx(curve[-1], rel=0.02, abs=1e-3)
    assert (weights(method) - weights(whole)).norm() < 0.05 * (weights(whole) - start).norm()


def test_evaluation_is_the_cpu_s():
    """Float32 on both, up to TF32 in the convolutions; and float32 results under bf16."""
    method, _ = trained(make_fabric("cpu"), method="rebias")
    expected, _ = small_task(make_fabric("cpu"), method="rebias").evaluate(method)
    for precision, tolerance in (("32-true", 0.5), ("auto", 3)):
        fabric = make_fabric(DEVICE, precision)
        task = small_task(fabric, method="rebias")
        moved = build_method(task)
        for name, module in moved.modules.items():
            module.load_state_dict(method.modules[name].state_dict())
        metrics, details = task.evaluate(moved)
        assert metrics.pop("hsic") == pytest.approx(expected["hsic"], rel=0.1)
        assert metrics == pytest.approx({name: expected[name] for name in metrics}, abs=tolerance)
        assert len(details["group_matrix"]) == 10 and task.point(moved)["sigma_f"] > 0
        logits, features = predict(moved.modules["f"], task.unbiased, fabric)
        assert logits.dtype == features.dtype == torch.float32 and logits.device.type == "cpu"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    return tmp_path


def test_the_toy_problem_draws_its_decisions(project):
    outcome = Execution(project)(vars(replace(PRESETS["toy"], epochs=2)), 0)
    assert outcome.precision == "bf16-mixed" and len(outcome.details["decisions"]) == 61


def test_worker_processes_read_files_beside_cuda(project):
    """They are forked after CUDA has started."""
    torch.ones(1, device=DEVICE)
    names = [f"{number}.png" for number in range(16)]
    write_files(project, names)
    columns = {
        "image": names,
        "label": [0, 1] * 8,
        "bias": [0, 0, 1, 1] * 4,
        "split": (["train"] * 4 + ["test"] * 4) * 2,
    }
    pd.DataFrame(columns).to_csv(project / "images.csv", index=False)
    settings = replace(PRESETS["csv"], networks="small", epochs=2, batch_size=4)
    outcome = Execution(project, Reading(workers=2))(vars(settings), 0)
    assert outcome.precision == "bf16-mixed" and 0 <= outcome.metrics["worst_group_accuracy"] <= 100


def test_a_row_of_a_table(project):
    log = run_tables([TABLE], "smoke", Execution(project), rows=["ReBias, rho 0.9"])
    (record,) = log.records()
    assert record["precision"] == "bf16-mixed" and record["device"] == torch.cuda.get_device_name()
    assert record["metrics"]["unbiased_accuracy"] > 10 and record["peak_cuda_memory_mb"] > 0
