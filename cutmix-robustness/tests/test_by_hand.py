"""Figures that a pencil can check: corruption errors beside AlexNet's, calibration, and the mixing of few numbers."""

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cutmix_robustness import CORRUPTIONS, CutMix, DropBlock2d, Mixup, calibration_error, cutmix_box, evaluation, train
from cutmix_robustness.corruption_error import ALEXNET_CLEAN_ERROR, ALEXNET_ERROR
from cutmix_robustness.corruptions import GROUPS
from cutmix_robustness.cutmix import sample_lam
from cutmix_robustness.data.benchmark import benchmark_of, open_benchmark
from cutmix_robustness.dropout import StochasticDepth
from cutmix_robustness.evaluation import Evaluator
from cutmix_robustness.experiments import build_classifier
from cutmix_robustness.foreign import load_model
from cutmix_robustness.localization import localization_accuracy
from cutmix_robustness.mixup import ManifoldMix, MixupCutMix
from cutmix_robustness.networks import SmallNet
from cutmix_robustness.settings import PRESETS
from cutmix_robustness.train import build_optimizer, fit, make_fabric
from cutmix_robustness.uncertainty import calibration, temperature


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class FirstClass(torch.nn.Module):
    """Every picture is of class 0."""

    def forward(self, images):
        return torch.tensor([1.0, 0, 0, 0, 0]).expand(len(images), 5)


@pytest.fixture(scope="module")
def benchmark():
    return open_benchmark(PRESETS["twowave"], 3, None)


@pytest.mark.parametrize("probes", [0, 100])
def test_corruption_errors_beside_alexnets(benchmark, probes, monkeypatch):
    """Corruption number k has the error 10 + 5 k at severity 2 and 20 + 5 k at severity 5."""
    evaluator = Evaluator(
        FirstClass(), replace(benchmark, corruption_scale="imagenet"), make_fabric("cpu"), (2, 5), probes
    )
    errors = {name: 15.0 + 5 * k for k, name in enumerate(CORRUPTIONS[:15])}
    known = lambda name, severity: errors[name] + (5 if severity == 5 else -5)  # noqa: E731
    monkeypatch.setattr(evaluator, "_corrupted_error", known)
    metrics = evaluator.corruption().metrics
    labels = evaluator.probes.labels if probes else benchmark.test.labels
    clean = 100 * (labels != 0).double().mean().item()
    ratios = {name: error / ALEXNET_ERROR[name] for name, error in errors.items()}
    rises = [(errors[name] - clean) / (ALEXNET_ERROR[name] - ALEXNET_CLEAN_ERROR) for name in errors]
    assert metrics["corruption_error"] == pytest.approx(50) and metrics["corruption_rise"] == pytest.approx(50 - clean)
    assert metrics["mce"] == pytest.approx(np.mean(list(ratios.values())))
    assert metrics["relative_mce"] == pytest.approx(np.mean(rises))
    for group, names in GROUPS.items():
        assert metrics[f"{group}_error"] == pytest.approx(np.mean([errors[name] for name in names]))
        assert metrics[f"{group}_ce"] == pytest.approx(np.mean([ratios[name] for name in names]))


def test_autoattack_is_measured_on_the_probes(benchmark, monkeypatch):
    """An attack that turns the pictures of odd classes black, on a network that names class 1 then, else class 0."""

    class Darkness(torch.nn.Module):
        def forward(self, images):
            dark = images.amax((1, 2, 3)) == 0
            return torch.nn.functional.one_hot(dark.long(), 5).float()

    def attack(model, images, labels, num_classes, seed):
        assert isinstance(model, Darkness) and (num_classes, seed) == (benchmark.num_classes, 7)
        return images * (labels % 2 == 0)[:, None, None, None]

    monkeypatch.setattr(evaluation, "autoattack", attack)
    evaluator = Evaluator(Darkness(), benchmark, make_fabric("cpu"), probe_images=100, seed=7)
    labels = evaluator.probes.labels
    share = 100 * ((labels == 0) | (labels == 1)).double().mean().item()
    assert evaluator.autoattack().metrics == {"autoattack_accuracy": pytest.approx(share)}


def test_calibration_of_three_predictions():
    """Confidences .9 (right), .9 (wrong) and .65 (right): the last is in a bin of its own, of 15 and of 20."""
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65]], dtype=torch.float64))
    found = calibration(logits, torch.tensor([0, 1, 1]))
    expected = {
        "ece": 100 * (2 / 3 * 0.4 + 1 / 3 * 0.35),
        "ece20": 100 * (2 / 3 * 0.4 + 1 / 3 * 0.35),
        "max_calibration_error": 40,
        "adaptive_ece": 100 * (0.35 + abs(1 - 0.9) + 0.9) / 3,  # a bin each
        "nll": -(math.log(0.9) + math.log(0.1) + math.log(0.65)) / 3,
        "brier": (2 * 0.1**2 + 2 * 0.9**2 + 2 * 0.35**2) / 3,
        "mean_confidence": 100 * (0.9 + 0.9 + 0.65) / 3,
    }
    assert found == pytest.approx(expected)


def test_rounding_below_zero_counts_as_zero():
    assert calibration_error(np.array([-1e-9, 1 + 1e-9]), np.array([0, 1]), 1, "max") == 0
    assert calibration_error(np.array([-1e-7]), np.array([0]), 15, "l1") == 0


def test_a_fixed_box_has_its_own_area_as_the_drawn_lam():
    images, labels = torch.rand(6, 3, 16, 32), torch.arange(6)
    batch = CutMix(variant="fixed", fixed_size=8, correct_lam=False, mode="sample", generator=generator())(
        images, labels
    )
    assert batch.lam.tolist() == [1 - 64 / 512] * 6
    whole = CutMix(variant="fixed", fixed_size=99, correct_lam=False, generator=generator())(images, labels)
    assert whole.lam.tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixup_keeps_the_type_of_the_images(dtype):
    images = torch.arange(5, dtype=dtype)[:, None, None, None].expand(5, 3, 4, 4)
    batch = Mixup(mode="sample", generator=generator())(images, torch.arange(5))
    expected = batch.lam * torch.arange(5) + (1 - batch.lam) * batch.perm
    torch.testing.assert_close(batch.images[:, 1, 2, 3].float(), expected, rtol=1e-2, atol=1e-2)
    assert batch.images.dtype == dtype and batch.lam.dtype == torch.float32
    assert batch.boxes.shape == (5, 4) and batch.boxes.dtype == torch.int64 and not batch.boxes.any()


def test_the_point_of_mixing_comes_from_the_generator_of_the_mix():
    def points(seed, other):
        torch.manual_seed(other)
        network = SmallNet(5).eval()
        mix = ManifoldMix(network, network.points, Mixup(generator=generator(seed)))
        return [tuple(mix(torch.zeros(2, 3, 16, 16), torch.arange(2))[1].images.shape) for _ in range(12)]

    assert points(1, 0) == points(1, 9) != points(2, 0)


@pytest.mark.parametrize("probability", [0, 1])
def test_the_switch_is_mixup_at_0_and_cutmix_at_1(probability):
    mix = MixupCutMix(Mixup(generator=generator()), CutMix(prob=1.0, generator=generator(2)), probability)
    mix.mixup, mix.cutmix = (lambda *_: "mixup"), (lambda *_: "cutmix")
    assert {mix(None, None) for _ in range(20)} == {("mixup", "cutmix")[probability]}


def test_bounds_and_defaults_of_dropblock():
    assert (DropBlock2d().keep_prob, DropBlock2d().block_size) == (0.9, 4)
    assert DropBlock2d(1.0, 1).block_size == 1
    for keep, size in ((0.0, 4), (1.5, 4), (0.9, 0)):
        with pytest.raises(ValueError, match="keep_prob must lie in"):
            DropBlock2d(keep, size)


def test_a_dropped_branch_keeps_its_type():
    torch.manual_seed(0)
    layer = StochasticDepth(0.5).train()
    kept = {layer(torch.ones(2, 3, dtype=torch.bfloat16)).sum().item() for _ in range(20)}
    assert kept == {0.0, 6.0}
    assert layer(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert copy(layer).eval()(torch.ones(1)).item() == 0.5


def test_a_network_that_ignores_the_picture_has_no_gradient(benchmark):
    class Deaf(torch.nn.Module):
        def forward(self, images):
            return 0 * images.mean((1, 2, 3))[:, None] + torch.eye(benchmark.num_classes)[1]

    metrics = Evaluator(Deaf(), benchmark, make_fabric("cpu")).fgsm().metrics
    share = 100 * (benchmark.test.labels == 1).double().mean().item()
    assert metrics["zero_gradients"] == 100 and metrics["fgsm_accuracy"] == pytest.approx(share)


def test_the_boxes_of_a_batch_have_the_rounding_asked_for():
    mix = CutMix(rounding="exact", mode="sample", generator=generator(3))
    draws = mix.draw(50)
    sizes = torch.tensor([15, 31])
    expected = cutmix_box(15, 31, sample_lam(draws[:, 1], 1.0), draws[:, 2:] * sizes, "exact")
    assert torch.equal(mix.boxes(draws, 15, 31), expected)
    assert ((expected[:, 2:] - expected[:, :2]) % 2 == 1).any()  # the reference's sides are even


@pytest.mark.parametrize(
    "capability, precision", [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_precision_follows_the_gpu(monkeypatch, capability, precision):
    made = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(train, "Fabric", lambda **options: made.update(options) or type("F", (), {"launch": int})())
    make_fabric("cuda")
    assert made["precision"] == precision and made["accelerator"] == "cuda"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (1, 1, "auto")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (2, 4, "ddp")),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, (4, 2, "ddp")),
        ({"SLURM_NTASKS": "4"}, (4, 1, "ddp")),
    ],
)
def test_processes_and_nodes(monkeypatch, environment, expected):
    made = {}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "Fabric", lambda **options: made.update(options) or type("F", (), {"launch": int})())
    make_fabric("cpu")
    assert (made["devices"], made["num_nodes"], made["strategy"]) == expected and made["precision"] == "32-true"


def test_a_training_saves_every_so_many_steps_and_at_its_end(benchmark, monkeypatch, tmp_path):
    settings = replace(PRESETS["twowave"], epochs=1, milestones=(), batch_size=100)
    steps = len(benchmark.train) // 100
    saved, save = [], train._save
    monkeypatch.setattr(train, "_save", lambda path, *rest: (saved.append(path.name), save(path, *rest)))
    model = build_classifier(settings, benchmark, 3)
    fit(model, settings, benchmark.train, 3, make_fabric("cpu"), checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    assert len(saved) == steps // 2 + 1 and steps >= 4
    fit(build_classifier(settings, benchmark, 3), settings, benchmark.train, 3, make_fabric("cpu"), checkpoint_every=2)
    assert len(saved) == steps // 2 + 1


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_optimizer_decays_weights_and_has_the_head_s_own_rate(benchmark, name):
    settings = replace(PRESETS["twowave"], optimizer=name, lr=0.3, head_lr=0.7, weight_decay=0.02)
    body, head = build_optimizer(settings, build_classifier(settings, benchmark, 3)).param_groups
    assert (body["lr"], body["base_lr"], head["base_lr"]) == (0.3, 0.3, 0.7)
    assert body["weight_decay"] == head["weight_decay"] == 0.02
    assert name == "adam" or (body["momentum"], body["nesterov"]) == (0.9, True)


def test_what_cannot_be_judged_is_refused():
    """NaN would count as class 0, one class would stand for all images."""
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    nothing = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.constant_(nothing[1].weight, torch.nan)
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        Evaluator(nothing, benchmark_of(images, labels), make_fabric("cpu"))
    whole = Evaluator(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), benchmark_of(images, labels), make_fabric("cpu"))
    for wrong in (["clean", "foo"], ["run"], "clean"):
        with pytest.raises(ValueError, match="suites must be a list of clean, calibration"):
            whole.run(wrong)
    with pytest.raises(ValueError, match="labels must be 0 or more, got -1"):
        benchmark_of(images, labels - 1)
    with pytest.raises(ValueError, match="as many boxes as classes, got 3, 1 and 3"):
        localization_accuracy(np.ones((3, 4, 4)), np.array([True]), [np.array([[0, 0, 4, 4]])] * 3)
    for logits in (torch.zeros(0, 3), torch.full((2, 3), torch.nan)):
        with pytest.raises(ValueError, match="logits must be"):
            temperature(logits, torch.zeros(len(logits), dtype=torch.long))
    with pytest.raises(ValueError, match="timm has no model 'xx'"):
        load_model("timm:xx", 2, (0.0,) * 3, (1.0,) * 3)
