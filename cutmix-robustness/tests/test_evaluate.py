"""The suites against plain loops, the attacks, and what is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutmix_robustness import (
    CORRUPTIONS,
    Classifier,
    calibration_error,
    corrupt,
    evaluate,
    evaluation,
    fgsm,
    in_between,
    mean_corruption_error,
    occlude,
    ood_metrics,
    pgd,
)
from cutmix_robustness.attacks import input_gradient
from cutmix_robustness.data.benchmark import Benchmark, open_benchmark
from cutmix_robustness.data.corrupted import Generated
from cutmix_robustness.data.sources import ResidentImages, stratified
from cutmix_robustness.data.twowave import MEAN, STD
from cutmix_robustness.draws import generator_for
from cutmix_robustness.evaluation import Evaluator
from cutmix_robustness.experiments import build_classifier, measure_properties
from cutmix_robustness.networks import SmallNet
from cutmix_robustness.settings import PRESETS, Settings
from cutmix_robustness.train import fit, make_fabric

FABRIC = make_fabric("cpu")
SETTINGS = replace(PRESETS["twowave"], epochs=12, milestones=(9,))


@pytest.fixture(scope="module")
def benchmark():
    return open_benchmark(SETTINGS, 3, None)


@pytest.fixture(scope="module")
def model(benchmark):
    model = build_classifier(SETTINGS, benchmark, 3)
    fit(model, SETTINGS, benchmark.train, 3, FABRIC)
    return model.eval()


@pytest.fixture(scope="module")
def evaluator(model, benchmark):
    return Evaluator(model, benchmark, FABRIC, severities=(2, 5), probe_images=200, seed=3)


def images_of(benchmark, n=None):
    return benchmark.test.images[:n].float() / 255, benchmark.test.labels[:n]


def probes_of(evaluator):
    return evaluator.probes.images.float() / 255, evaluator.probes.labels


def error(model, images, labels):
    with torch.no_grad():
        return 100 - 100 * (model(images).argmax(1) == labels).double().mean().item()


def test_clean_and_occluded(model, benchmark, evaluator):
    images, labels = images_of(benchmark)
    clean = evaluator.clean().metrics
    assert clean["top1_error"] == pytest.approx(error(model, images, labels)) and clean["top1_error"] < 60
    assert clean["top5_error"] < clean["top1_error"]
    found, (images, labels) = evaluator.occlusion(), probes_of(evaluator)
    sizes = [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16]
    expected = [error(model, occlude(images, size, "center", model.mean.flatten()), labels) for size in sizes]
    assert found.details["center_occlusion"] == pytest.approx(expected, abs=0.01)
    assert found.metrics["center_occlusion_error"] == pytest.approx(expected[5], abs=0.01)
    assert found.details["boundary_occlusion"][10] == found.details["center_occlusion"][0]
    assert found.details["boundary_occlusion"][0] == found.details["center_occlusion"][10]
    area = sum((a + b) / 20 for a, b in zip(expected, expected[1:], strict=False))
    assert found.metrics["center_occlusion_area"] == pytest.approx(area, abs=0.01)


def test_attacked(model, benchmark, evaluator):
    images, labels = images_of(benchmark)
    fgsm_metrics, pgd_accuracy = evaluator.fgsm().metrics, evaluator.pgd().metrics["pgd_accuracy"]
    assert fgsm_metrics["fgsm_error"] == pytest.approx(error(model, fgsm(model, images, labels), labels), abs=0.11)
    assert fgsm_metrics["fgsm_accuracy"] == 100 - fgsm_metrics["fgsm_error"] and fgsm_metrics["zero_gradients"] == 0
    assert pgd_accuracy < fgsm_metrics["fgsm_accuracy"] < 100 - evaluator.clean().metrics["top1_error"]


def test_corrupted(model, benchmark, evaluator):
    found = evaluator.corruption()
    assert np.array(found.details["corruption_errors"]).shape == (15, 2)
    order, labels = CORRUPTIONS.index("contrast"), evaluator.probes.labels
    corrupted = corrupt(evaluator.probes.images, "contrast", 5, "cifar", generator=torch.Generator())
    expected = error(model, corrupted.float() / 255, labels)
    assert found.details["corruption_errors"][order][1] == pytest.approx(expected, abs=0.01)
    mean = np.mean(found.details["corruption_errors"])
    clean = error(model, *probes_of(evaluator))
    assert found.metrics["corruption_rise"] == pytest.approx(mean - clean, abs=0.01)
    assert found.metrics["corruption_error"] == pytest.approx(mean, abs=0.01) and "mce" not in found.metrics


def test_between_two(model, benchmark, evaluator):
    found = evaluator.in_between()
    order = torch.randperm(200, generator=generator_for(3, 5))
    images, labels = probes_of(evaluator)
    a, la = images[order], labels[order]
    b, lb = a.roll(1, 0), la.roll(1)
    for kind in ("mixup", "cutmix"):
        predicted = model(in_between(a, b, 0.5, kind)).argmax(1)
        neither = 100 * ((predicted != la) & (predicted != lb)).double().mean().item()
        assert found.metrics[f"neither_{kind}"] == pytest.approx(neither)
        assert found.details[f"in_between_{kind}"][0] == pytest.approx(error_either(model, a, la, lb), abs=0.01)
    assert found.metrics["neither_mixup_distinct"] >= found.metrics["neither_mixup"] * 0.9


def error_either(model, images, labels, others):
    predicted = model(images).argmax(1)
    return 100 * ((predicted != labels) & (predicted != others)).double().mean().item()


def test_unknown(evaluator):
    metrics = evaluator.ood().metrics
    sets = ("uniform", "gaussian", "unseen_classes", "background")
    assert metrics["ood_auroc"] == pytest.approx(np.mean([metrics[f"{name}_auroc"] for name in sets]))
    assert metrics["ood_detection_error"] == pytest.approx(100 - metrics["ood_detection_accuracy"])
    assert metrics["ood_auroc"] > 55


def test_unknown_by_further_scores(model, benchmark, evaluator):
    assert list(evaluator.odin().metrics) == ["ood_auroc_odin"] and evaluator.odin().metrics["ood_auroc_odin"] > 55
    assert evaluator.mahalanobis().metrics["ood_auroc_mahalanobis"] > 55
    images = benchmark.test.images[:40].float() / 255
    features = model.network.features((images - model.mean) / model.std).mean((2, 3))
    found, labels = evaluator._features(benchmark.test)
    np.testing.assert_allclose(found[:40], features.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert labels.tolist() == benchmark.test.labels.tolist()


def test_evaluate_gives_a_row_per_model(model, benchmark):
    untrained = Classifier(SmallNet(15), MEAN, STD)
    frame = evaluate({"trained": model, "untrained": untrained}, ("clean", "calibration", "fgsm"), benchmark)
    assert list(frame.index) == ["trained", "untrained"] and {"top1_error", "ece", "fgsm_accuracy"} <= set(frame)
    assert frame.loc["trained", "top1_error"] < frame.loc["untrained", "top1_error"] and not frame.isna().any().any()


def test_localization_finds_the_object():
    """A network whose feature map is the red channel: boxes around red squares."""

    class Red(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 2)
            self.fc.weight.data = torch.tensor([[-1.0], [1.0]])
            self.fc.bias.data = torch.tensor([0.01, 0.0])

        def features(self, x):
            return torch.nn.functional.max_pool2d(x[:, :1], 4)

        def forward(self, x):
            return self.fc(self.features(x).mean((2, 3)))

    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[0, 0, 8:24, 4:20] = 255
    images[1, 0, 16:32, 16:32] = 255
    data = ResidentImages(images, torch.tensor([1, 1, 0]), "squares")
    boxes = [np.array([[4, 8, 20, 24]]), np.array([[0, 0, 8, 8], [16, 16, 32, 32]]), np.array([[0, 0, 4, 4]])]
    model = Classifier(Red(), (0.0,) * 3, (1.0,) * 3)
    found = Evaluator(model, Benchmark(data, data, 2, MEAN, STD, boxes=boxes), FABRIC).localization().metrics
    assert found == {"localization_accuracy": pytest.approx(200 / 3), "gt_known_localization": pytest.approx(200 / 3)}
    with pytest.raises(ValueError, match="squares has no boxes"):
        Evaluator(model, Benchmark(data, data, 2, MEAN, STD), FABRIC).localization()


def test_probes_hold_every_class_and_depend_on_the_seed_alone():
    images = torch.zeros(1000, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(1000) % 251
    labels = torch.arange(1000) // 100  # sorted by class, as an image folder is
    data = ResidentImages(images, labels, "sorted")
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)), MEAN, STD)
    probes = [
        Evaluator(model, Benchmark(data, data, 10, MEAN, STD), FABRIC, (1,), 50, seed).probes for seed in (1, 1, 2)
    ]
    assert all(each.record()["class_counts"] == [5] * 10 for each in probes)
    assert torch.equal(probes[0].index, probes[1].index) and not torch.equal(probes[0].index, probes[2].index)
    assert torch.equal(probes[0].images, images[probes[0].index])
    assert Evaluator(model, Benchmark(data, data, 10, MEAN, STD), FABRIC, (1,), 2000).probes is data


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=8), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_stratified_part_keeps_every_share(counts, share, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    n = max(1, round(share * len(labels)))
    index = stratified(labels, n, seed)
    assert len(index.unique()) == n and torch.equal(index, index.sort().values)
    found = labels[index].bincount(minlength=len(counts)).double()
    assert (found - n * torch.tensor(counts) / len(labels)).abs().max() < 1 + 1e-9


def test_a_corrupted_image_is_the_same_in_any_part_of_its_set():
    data = ResidentImages(torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(12) // 4, "x")
    whole, part = (
        next(iter(Generated(each, "gaussian_noise", 3, "cifar", 0).batches()))[1]
        for each in (data, data.select(torch.tensor([2, 7, 11])))
    )
    assert torch.equal(part, whole[[2, 7, 11]]) and not torch.equal(
        whole[0] - data.images[0], whole[1] - data.images[1]
    )


def test_attacks_take_what_resizing_leaves_and_no_model_in_training(model, benchmark):
    images, labels = images_of(benchmark, 4)
    white = torch.nn.functional.interpolate(torch.ones(4, 3, 37, 37), (16, 16), mode="bicubic", antialias=True) + 2e-7
    assert white.max() > 1
    for attack in (fgsm, pgd):
        assert attack(model, white, labels).max() <= 1
        twin = copy.deepcopy(model).train()
        with pytest.raises(ValueError, match="in training mode: .* call model.eval()"):
            attack(twin, images, labels)


def test_the_fast_precision_predicts_the_same_classes(model, benchmark, evaluator):
    fast = Evaluator(model, benchmark, FABRIC, severities=(2, 5), probe_images=200, seed=3, fast=True)
    for suite in ("occlusion", "corruption", "in_between"):
        slow, quick = (getattr(each, suite)().metrics for each in (evaluator, fast))
        assert quick == pytest.approx(slow, abs=1.5), suite  # 3 of 200 images
    assert torch.equal(fast.logits, evaluator.logits)


def test_fgsm_takes_one_gradient(model, benchmark, monkeypatch):
    passes = []
    real = evaluation.input_gradient
    monkeypatch.setattr(evaluation, "input_gradient", lambda *words: passes.append(1) or real(*words))
    Evaluator(model, benchmark, FABRIC).fgsm()
    assert len(passes) == len(list(benchmark.test.batches()))


def test_gradients_do_not_depend_on_the_batch(model, benchmark):
    images, labels = images_of(benchmark, 6)
    whole = input_gradient(model, images, labels)
    single = torch.cat([input_gradient(model, images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-6)
    attacked = pgd(model, images, labels, generator=torch.Generator().manual_seed(0))
    assert (attacked - images).abs().max() <= 8 / 255 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(attacked, pgd(model, images, labels, generator=torch.Generator().manual_seed(0)))


def test_properties_of_table_2():
    cutmix = measure_properties(Settings(task="properties", mix="cutmix", mode="sample"), 1).metrics
    assert cutmix["informative_pixels"] == 100 and 20 < cutmix["dropped_pixels"] < 40
    assert 0 <= cutmix["partner_label"] - cutmix["dropped_pixels"] < 5  # an image may be its own partner
    cutout = measure_properties(Settings(task="properties", cutout=16), 1).metrics
    assert cutout["informative_pixels"] < 90 and cutout["partner_label"] == 0
    mixup = measure_properties(Settings(task="properties", mix="mixup"), 1).metrics
    assert mixup["informative_pixels"] == 100 and mixup["dropped_pixels"] == 0 and mixup["partner_label"] > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fgsm(lambda x: x, torch.full((1, 3, 2, 2), 1.1), torch.zeros(1)), r"images must lie in \[0, 1\]"),
        (lambda: pgd(lambda x: x, torch.full((1, 3, 2, 2), -0.1), torch.zeros(1)), r"images must lie in \[0, 1\]"),
        (lambda: fgsm(lambda x: x, torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1)), "images must lie in"),
        (lambda: occlude(torch.rand(1, 3, 4, 4), 5), "size must lie in 0 .. 4, got 5"),
        (lambda: occlude(torch.rand(3, 4, 4), 2), "images must be 4-D"),
        (lambda: occlude(torch.rand(1, 3, 4, 4), 2, "corner"), "where must be center or boundary"),
        (lambda: in_between(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5), 0.5, "mixup"), "images_b must have shape"),
        (lambda: in_between(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), 1.5, "mixup"), "ratio must lie in"),
        (lambda: in_between(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), 0.5, "x"), "kind must be mixup or cutmix"),
        (lambda: ood_metrics([], [0.1]), "score_in must hold at least one score"),
        (lambda: ood_metrics([0.1], [float("nan")]), "score_out must hold .* no NaN"),
        (lambda: calibration_error([1.2], [1]), r"conf must lie in \[0, 1\]"),
        (lambda: calibration_error([], []), r"conf and correct must be \(N,\), N > 0"),
        (lambda: calibration_error([0.5], [1], norm="l3"), "norm must be l1, l2 or max"),
        (lambda: mean_corruption_error(np.zeros((19, 5))), r"errors must be \(15, 5\)"),
        (lambda: mean_corruption_error(np.zeros((15, 5)), "alexnet", "cifar"), "exists only for ImageNet-C"),
        (lambda: mean_corruption_error(np.zeros((15, 5)), "resnet"), "normalize must be None or 'alexnet'"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_attacks_refuse_half_precision():
    with pytest.raises(TypeError, match="float32 or float64, got torch.bfloat16"):
        fgsm(lambda x: x.flatten(1).bfloat16(), torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64))
