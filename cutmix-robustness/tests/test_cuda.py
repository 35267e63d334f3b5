"""Every recipe, resuming, the suites, corruptions, detectors and a table's row on a CUDA device, against the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from cutmix_robustness import detection, experiments
from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from cutmix_robustness.data.benchmark import benchmark_of, open_benchmark
from cutmix_robustness.data.ood import noise_sets
from cutmix_robustness.data.sources import ImageFiles, ResidentImages
from cutmix_robustness.evaluation import Evaluator, evaluate
from cutmix_robustness.experiments import build_classifier, run_tables, tables
from cutmix_robustness.networks import NETWORKS, Classifier, resnet_imagenet
from cutmix_robustness.settings import PRESETS, Settings
from cutmix_robustness.train import fit, make_fabric

DEVICE = "cuda"
TABLE = next(table for table in tables() if table.id == "table-5")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = replace(PRESETS["twowave"], epochs=1, batch_size=64, augment="crop-flip", eval_every=0, suites=("clean",))
RECIPES = {
    "baseline": {},
    "cutmix": {"mix": "cutmix"},
    "cutmix of samples": {"mix": "cutmix", "mode": "sample"},
    "mixup": {"mix": "mixup", "mode": "sample"},
    "both": {"mix": "mixup+cutmix", "alpha": 0.5},
    "manifold mixup": {"mix": "manifold-mixup", "mix_point": 2},
    "feature cutmix": {"mix": "feature-cutmix", "mix_point": 1},
    "cutout, smoothing": {"cutout": 8, "label_smoothing": 0.1},
    "adversarial": {"adversarial": "training", "optimizer": "adam", "lr": 1e-3},
    "logit pairing": {"adversarial": "logit-pairing", "optimizer": "adam", "lr": 1e-3},
    "noise": {"gaussian_noise": True},
    "outliers": {"outliers": "uniform"},
}
BRANCHES = ("stochdepth", "shakedrop", "dropblock")  # draw on the device


def trained(settings, fabric, **options):
    """The model after 500 images of two waves: seven steps an epoch."""
    benchmark = open_benchmark(settings, 1, None, fabric.device)
    model = build_classifier(settings, benchmark, 1)
    outliers = noise_sets(200, 16, 1, fabric.device)["uniform"] if settings.outliers == "uniform" else None
    curve = fit(model, settings, benchmark.train, 1, fabric, outliers=outliers, **options)
    return model, curve


def weights(model):
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_the_cpu_s(name):
    """Means over seven steps from the same weights, batches, boxes and partners: bf16 against float32."""
    settings = replace(SHORT, **RECIPES[name])
    _, (expected,) = trained(settings, make_fabric("cpu"))
    _, (found,) = trained(settings, make_fabric(DEVICE))
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.03)
    assert found["mixed_accuracy"] == pytest.approx(expected["mixed_accuracy"], abs=3)


@pytest.mark.parametrize("branch", BRANCHES)
def test_losses_with_draws_of_the_device_fall(branch):
    settings = replace(SHORT, branch=branch, branch_rate=0.1, mix="cutmix", prob=0.5, epochs=4)
    _, expected = trained(settings, make_fabric("cpu"))
    _, found = trained(settings, make_fabric(DEVICE))
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.15)
    assert found[3]["loss"] < found[0]["loss"]


@pytest.mark.parametrize(
    "network, side, branch",
    [("wrn16-2", 32, "none"), ("resnet110", 32, "shakedrop"), ("resnet50", 64, "none"), ("vgg-gap", 64, "none")],
)
def test_a_step_of_the_large_networks(network, side, branch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, side, side), generator=generator, dtype=torch.uint8)
    losses = {}
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        options = {} if branch == "none" else {"branch": branch}
        model = Classifier(NETWORKS[network](num_classes=10, **options), (0.5,) * 3, (0.25,) * 3)
        data = ResidentImages(images, torch.arange(8), "noise", device=device)
        settings = replace(SHORT, network=network, batch_size=8, mix="cutmix", augment="none", lr=0.01)
        ((point),) = fit(model, settings, data, 0, make_fabric(device))
        losses[device] = point["loss"]
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=0.05 if branch == "none" else 0.3)


@pytest.mark.parametrize("changes", [{"mix": "cutmix"}, {"branch": "shakedrop", "optimizer": "adam", "lr": 1e-3}])
def test_an_interrupted_run_ends_where_the_whole_one_does(tmp_path, changes):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 10:
            raise Stop

    settings, fabric = replace(SHORT, epochs=3, **changes), make_fabric(DEVICE)
    start = weights(build_classifier(settings, open_benchmark(settings, 1, None), 1))
    whole, curve = trained(settings, fabric)
    with pytest.raises(Stop):
        trained(settings, fabric, checkpoint=tmp_path / "c.pt", checkpoint_every=4, before_step=stop)
    torch.manual_seed(99)
    resumed, again = trained(settings, fabric, checkpoint=tmp_path / "c.pt")
    assert again[-1] == pytest.approx(curve[-1], rel=0.02, abs=1)
    assert (weights(resumed) - weights(whole)).norm() < 0.05 * (weights(whole) - start).norm()


def test_evaluation_is_the_cpu_s():
    """Float32 up to TF32 in the convolutions; and bf16 where the predicted class alone counts."""
    model, _ = trained(replace(SHORT, epochs=5, mix="cutmix"), make_fabric("cpu"))
    suites = ("clean", "calibration", "temperature", "occlusion", "fgsm", "pgd", "corruption", "ood", "odin")
    suites += ("mahalanobis", "in_between")
    found = []
    for device, fast in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        fabric = make_fabric(device)
        benchmark = open_benchmark(SHORT, 1, None, fabric.device)
        evaluator = Evaluator(model.to(fabric.device), benchmark, fabric, (3,), 100, fast=fast)
        assert evaluator.logits.dtype == torch.float32 and evaluator.logits.device.type == "cpu"
        found.append((evaluator.logits, evaluator.run(suites).metrics))
    (logits, expected), (ours, exact), (_, fast) = found
    torch.testing.assert_close(ours, logits, rtol=0.01, atol=0.02)
    assert exact == pytest.approx(expected, rel=0.02, abs=3)
    assert fast == pytest.approx(expected, rel=0.05, abs=6)


def test_tensors_on_the_cpu_are_judged_on_the_device():
    benchmark = open_benchmark(SHORT, 1, None)
    own = benchmark_of(benchmark.test.images[:100], benchmark.test.labels[:100])
    fabric = make_fabric(DEVICE)
    model = build_classifier(SHORT, benchmark, 1).to(fabric.device)
    table = evaluate({"fresh": model}, ("clean", "fgsm", "corruption"), own, fabric, severities=(1,))
    assert 0 <= table.loc["fresh", "top1_error"] <= 100


def test_worker_processes_read_files_beside_cuda(tmp_path, save_picture):
    """They are forked after CUDA has started."""
    torch.ones(1, device=DEVICE)
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        save_picture(path, number)
    data = ImageFiles(paths, torch.arange(8), "files", "imagenet", DEVICE, num_workers=2)
    settings = replace(SHORT, network="small-wide", batch_size=4, lr=0.01)
    model = Classifier(NETWORKS["small-wide"](num_classes=8), (0.5,) * 3, (0.25,) * 3)
    (point,) = fit(model, settings, data, 0, make_fabric(DEVICE))
    assert 1 < point["loss"] < 6


def photo(n, height, width):
    small = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear") * 300).clamp(0, 255).byte()


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA_CORRUPTIONS)
def test_a_corruption_is_the_cpu_s(name, scale):
    images, seeds = photo(5, 64, 64), torch.arange(5)
    expected = corrupt(images, name, 3, scale, seeds=seeds)
    got = corrupt(images.to(DEVICE), name, 3, scale, seeds=seeds)
    assert got.device.type == DEVICE
    difference = (got.cpu().int() - expected.int()).abs()
    assert (difference > 1).double().mean() < 1e-3  # thresholds may fall the other way


class Boxes(Dataset):
    """Four pictures with one object each, as `VocImages` gives them."""

    epoch = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(index))
        return picture, {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1 + index])}


@pytest.mark.parametrize("kind", ["faster-rcnn", "ssd"])
def test_a_detector_takes_steps(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(detection, "_workers", lambda: 1)
    torch.manual_seed(0)
    detector = detection.build_detector(kind, resnet_imagenet("resnet50"), 96)
    settings = Settings(task="detection", detector=kind, steps=2, batch_size=2, lr=1e-4, network="resnet50")
    fabric = make_fabric(DEVICE, "32-true")  # as `execute` has it
    before = weights(detector)
    detection.fit_detector(detector, settings, Boxes(), 0, fabric, tmp_path / "c.pt", every=1)
    after = weights(detector)
    assert after.isfinite().all() and not torch.equal(before, after)
    (output,) = detector.eval()([Boxes()[0][0].to(fabric.device)])
    assert output["boxes"].dtype == torch.float32


@pytest.mark.parametrize("row", ["CutMix", "Cutout"])
def test_a_row_of_a_table(tmp_path, monkeypatch, row):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (record,) = run_tables([TABLE], "smoke", tmp_path, rows=[row]).records()
    assert record["precision"] == "bf16-mixed" and record["device"] == torch.cuda.get_device_name()
    assert 0 <= record["metrics"]["top1_error"] <= 100
