"""The metrics by hand and against plain loops: boxes, detection of the unknown, calibration, mean average precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cutmix_robustness import (
    adaptive_calibration_error,
    calibration_error,
    confidence,
    ood_metrics,
)
from cutmix_robustness.data.voc import mean_average_precision
from cutmix_robustness.localization import box_iou, cam_box, class_activation_map, localization_accuracy
from cutmix_robustness.uncertainty import calibration


def test_boxes():
    cam = np.zeros((8, 10), np.float32)
    assert cam_box(cam) == (0, 0, 0, 0)
    cam[1:3, 1:3], cam[5:8, 4:9] = 1.0, 0.2
    assert cam_box(cam) == (4, 5, 9, 8) and cam_box(cam, sigma=0.3) == (1, 1, 3, 3)
    assert box_iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7) and box_iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    assert localization_accuracy([cam], [True], [np.array([[4, 5, 9, 7]])]) == {
        "localization_accuracy": 100.0, "gt_known_localization": 100.0,
    }  # fmt: skip
    assert localization_accuracy([cam], [False], [np.array([[4, 5, 9, 8]])])["localization_accuracy"] == 0
    features, weight = torch.rand(2, 3, 4, 4), torch.randn(5, 3)
    maps = class_activation_map(features, weight, torch.tensor([4, 0]))
    expected = (features * weight[[4, 0]][:, :, None, None]).sum(1).clamp(min=0)
    torch.testing.assert_close(maps, expected)


scores = st.lists(st.integers(0, 12).map(lambda v: v / 12), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(known=scores, unknown=scores)
def test_ood_metrics_against_all_thresholds(known, unknown):
    ours = ood_metrics(known, unknown)
    a, b = np.array(known), np.array(unknown)
    thresholds = [*sorted({*known, *unknown}), np.inf]
    tpr, tnr = ([(a >= t).mean() for t in thresholds], [(b < t).mean() for t in thresholds])
    assert ours["detection_accuracy"] == pytest.approx(max((x + y) / 2 for x, y in zip(tpr, tnr, strict=True)))
    largest = max(i for i, rate in enumerate(tpr) if rate >= 0.95)
    assert ours["tnr95"] == pytest.approx(tnr[largest])
    beyond = {0.0: -np.inf, 1.0: np.inf}  # the order alone decides
    far = ood_metrics([beyond.get(v, v) for v in known], [beyond.get(v, v) for v in unknown])
    assert far == pytest.approx(ours)
    labels = [1] * len(known) + [0] * len(unknown)
    assert ours["auroc"] == pytest.approx(roc_auc_score(labels, known + unknown))
    assert ours["aupr_in"] == pytest.approx(average_precision_score(labels, known + unknown))
    turned = average_precision_score([1 - each for each in labels], [-each for each in known + unknown])
    assert ours["aupr_out"] == pytest.approx(turned)


@settings(max_examples=60, deadline=None)
@given(conf=scores, bins=st.sampled_from([1, 4, 12, 15]), seed=st.integers(0, 99))
def test_calibration_error_bin_by_bin(conf, bins, seed):
    conf, correct = np.array(conf), np.random.default_rng(seed).random(len(conf)) < 0.5
    total, worst = 0.0, 0.0
    for k in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[k : k + 2]
        inside = (conf > low) & (conf <= high) | ((conf == 0) & (k == 0))
        if inside.any():
            gap = abs(conf[inside].mean() - correct[inside].mean())
            total, worst = total + inside.mean() * gap, max(worst, gap)
    assert calibration_error(conf, correct, bins) == pytest.approx(total, abs=1e-12)
    assert calibration_error(conf, correct, bins, "max") == pytest.approx(worst, abs=1e-12)
    assert 0 <= adaptive_calibration_error(conf, correct, bins) <= 1


def test_the_two_calibration_errors_have_15_and_20_bins():
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    drawn = torch.multinomial(torch.softmax(logits, 1), 1, generator=torch.Generator().manual_seed(1))
    labels = drawn[:, 0]  # calibrated: the gaps of the bins have both signs
    found, (conf, predicted) = calibration(logits, labels), confidence(logits)
    correct = predicted == labels.numpy()
    for name, bins in (("ece", 15), ("ece20", 20)):
        assert found[name] == pytest.approx(100 * calibration_error(conf, correct, bins))
    assert abs(found["ece"] - found["ece20"]) > 0.01


def test_confidence_of_exactly_one_is_in_the_last_bin():
    assert calibration_error(np.array([1 + 2e-7]), np.array([1])) == 0  # the sum of a float32 softmax
    assert calibration_error([1.0, 1.0], [1, 0], 10) == 0.5 and calibration_error([1.0], [1], 10) == 0
    logits = torch.tensor([[200.0, 0, 0], [200.0, 0, 0]])
    assert calibration(logits, torch.tensor([0, 1]))["ece"] == 50


def test_mean_average_precision_by_hand():
    box = np.array([[0, 0, 10, 10.0]])
    far = np.array([[20, 20, 30, 30.0]])
    one, easy, hard = np.array([1]), np.array([False]), np.array([True])
    true = [
        {"boxes": box, "labels": one, "difficult": easy},
        {"boxes": box, "labels": one, "difficult": easy},
        {"boxes": box, "labels": one, "difficult": hard},
    ]

    def found(*items):
        boxes, scores = zip(*items, strict=True)
        return {"boxes": np.concatenate(boxes), "labels": np.ones(len(items), int), "scores": np.array(scores)}

    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    perfect = [found((box, 0.9)), found((box, 0.8)), found((box, 0.95))]  # the difficult one does not count
    assert mean_average_precision(perfect, true) == pytest.approx(100)
    half = [found((box, 0.9)), nothing, nothing]
    assert mean_average_precision(half, true) == pytest.approx(100 * 6 / 11)  # recalls 0, .1, .., .5
    doubled = [found((box, 0.9), (box, 0.85)), found((box, 0.8)), nothing]  # the second hit is a false one
    assert mean_average_precision(doubled, true) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert mean_average_precision([found((far, 0.9)), nothing, nothing], true) == 0
    with pytest.raises(ValueError, match="found has 1 images, true has 3"):
        mean_average_precision([nothing], true)
    with pytest.raises(ValueError, match="no object that is not difficult"):
        mean_average_precision([nothing], true[2:])
