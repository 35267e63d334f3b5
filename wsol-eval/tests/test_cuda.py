"""Every method's training, resuming, maps, metrics and the protocol on files on a CUDA device, against the CPU."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from wsol_eval import BoxLocalization, PixelAP, experiments, protocol, resize_normalize, train
from wsol_eval.bench import make_maps
from wsol_eval.cutouts import make_split
from wsol_eval.evaluate import evaluate, evaluate_center
from wsol_eval.experiments import execute, run_tables, tables
from wsol_eval.models import METHODS, build_model
from wsol_eval.recipe import OnData, OnDevice, Recipe
from wsol_eval.sources import MemorySource
from wsol_eval.tiny import write
from wsol_eval.train import fit, make_fabric

DEVICE = "cuda"
TABLES = {table.id: table for table in tables()}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPE = Recipe(
    arch="small",
    feature_map=8,
    lr=0.02,
    epochs=2,
    lr_decay_frequency=2,
    batch_size=16,
    has_grid_size=8,
    adl_drop_rate=1.0,
)
ON_THE_DEVICE = ("has", "cutmix")  # what these draw there


@pytest.fixture(scope="module")
def digits():
    return {name: MemorySource(make_split(name, 48, 1), name) for name in ("train", "val", "test")}


def weights(network):
    return torch.cat([p.detach().cpu().flatten() for p in network.parameters()])


def losses(monkeypatch, recipe, source, fabric):
    """Of every step of a training."""
    found, plain = [], train._loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "_loss", lambda *given: found.append(plain(*given)) or found[-1])
        network = fit(recipe, source, 0, fabric)
    return network, torch.stack(found).detach().float().cpu()


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_cpu_s(digits, monkeypatch, method):
    """Over six steps from the same weights and images: bf16 against float32."""
    recipe = replace(RECIPE, method=method)
    _, expected = losses(monkeypatch, recipe, digits["train"], make_fabric("cpu"))
    network, found = losses(monkeypatch, recipe, digits["train"], make_fabric(DEVICE))
    assert len(found) == 6 and weights(network).isfinite().all()
    tolerance = 0.3 if method in ON_THE_DEVICE else 0.06
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "arch, method",
    [(arch, method) for arch in ("vgg16", "resnet50") for method in ("cam", "acol", "adl", "spg")]
    + [("inception_v3", "spg")],
)
def test_a_step_of_the_paper_s_networks(arch, method):
    fabric = make_fabric(DEVICE)
    torch.manual_seed(0)
    network = build_model(arch, method, 5, 14)
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), 1e-3, fused=True))
    images = torch.randn(2, 3, 224, 224, device=fabric.device)
    labels = torch.tensor([1, 4], device=fabric.device)
    loss = train._loss(replace(RECIPE, method=method), model, network, images, labels)
    fabric.backward(loss)
    optimizer.step()
    assert loss.isfinite() and weights(network).isfinite().all()


@pytest.mark.parametrize("method", ["cam", "cutmix", "spg"])
def test_an_interrupted_run_ends_where_the_whole_one_does(digits, tmp_path, monkeypatch, method):
    class Stop(Exception):
        pass

    recipe, fabric = replace(RECIPE, method=method, epochs=3), make_fabric(DEVICE)
    start = weights(fit(replace(recipe, lr=0.0, weight_decay=0.0, epochs=1), digits["train"], 0, make_fabric("cpu")))
    whole = weights(fit(recipe, digits["train"], 0, fabric))
    steps, plain = [], train._loss

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 6:
            raise Stop
        return plain(*given)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "_loss", interrupted)
        fit(recipe, digits["train"], 0, fabric, tmp_path / "c.pt", checkpoint_every=2)
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = weights(fit(recipe, digits["train"], 0, fabric, tmp_path / "c.pt"))
    assert (resumed - whole).norm() < 0.05 * (whole - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_the_cpu_s(digits, method):
    """Float32 on both, without TF32."""
    network = fit(replace(RECIPE, method=method), digits["train"], 0, make_fabric("cpu"))
    there, fabric = copy.deepcopy(network), make_fabric(DEVICE)
    expected = evaluate(network, digits["test"], make_fabric("cpu"), 0.05).metrics()
    assert evaluate(there, digits["test"], fabric, 0.05).metrics() == pytest.approx(expected, abs=3)
    images, labels = (x[:8] for x in (digits["test"].images.images, digits["test"].images.labels))
    ours, theirs = there.score_map(images.to(DEVICE), labels.to(DEVICE)), network.score_map(images, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0.02, atol=0.02)


def test_the_centre_is_the_cpu_s(digits):
    ours, theirs = (evaluate_center(digits["test"], make_fabric(device), 0.05).metrics() for device in (DEVICE, "cpu"))
    assert ours == theirs


def test_maps_on_the_device_give_the_same():
    maps, boxes = make_maps(14, 24)
    curves = []
    for given in (maps, torch.from_numpy(maps).to(DEVICE)):
        metric = BoxLocalization(cam_curve_interval=0.02, workers=2)
        metric.update(given, boxes)
        curves.append(metric.compute().curve)
    np.testing.assert_array_equal(*curves)
    masks = (np.random.default_rng(0).random(maps.shape) < 0.3).astype(np.uint8)
    areas = []
    for given in (torch.from_numpy(maps), torch.from_numpy(maps).to(DEVICE)):
        metric = PixelAP(0.02)
        metric.update(given, masks)
        areas.append(metric.compute().pxap)
    assert areas[0] == areas[1]
    raw = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_normalize(raw.to(DEVICE), 64).cpu(), resize_normalize(raw, 64))


def test_the_protocol_searches_on_the_device(digits, tmp_path):
    recipe = replace(RECIPE, method="cam", epochs=1)
    options = ("photographs", 2, 0, digits, make_fabric(DEVICE), tmp_path, "auto", 0.1)
    found, entry, _ = protocol.run_in_folder(recipe, *options)
    assert len(found.values) == 2 and 0 <= entry["metrics"]["max_box_acc_v2"] <= 100


@pytest.mark.parametrize("method", ["cam", "cutmix", "fsl"])
@pytest.mark.parametrize("dataset", ["CUB", "OpenImages"])
def test_a_run_on_files(tmp_path, monkeypatch, dataset, method):
    """With worker processes beside CUDA, and the device chosen by itself."""
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    write(tmp_path / "data")
    settings = {"dataset": dataset, "method": method, "arch": "small", "space": "paper", "trials": 1, "epochs": 1}
    settings |= {"batch_size": 4, "interval": 0.1, "fsl_epochs": 1, "fsl_batch_size": 2}
    outcome = execute(settings, OnData(dataset, tmp_path / "data", workers=2), OnDevice())
    assert outcome.precision == "bf16-mixed"
    assert all(0 <= value <= 100 for value in outcome.metrics.values())


def test_a_row_of_a_table(tmp_path, monkeypatch):
    """Built-in images are trained on the CPU, whatever there is."""
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    table = TABLES["table-8"]
    row = table.rows_at("smoke")[0].name
    record, *_ = run_tables([table], "smoke", OnData(data_root=tmp_path), OnDevice(), rows=[row]).records()
    assert record["precision"] == "32-true" and record["device"] == torch.cuda.get_device_name()
