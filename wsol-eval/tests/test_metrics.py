"""Streaming, merging, transferred thresholds, intervals, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wsol_eval import BoxLocalization, PixelAP, best_iou_per_threshold, bootstrap, paired, resize_normalize
from wsol_eval.bench import make_maps

N = 24
ERRORS = json.loads((Path(__file__).parent / "golden" / "errors.json").read_text())["error_type"]


@pytest.fixture(scope="module")
def split():
    maps, boxes = make_maps(14, N)
    return maps, boxes, [f"image-{i}" for i in range(N)]


def added(split, part=slice(None), **options):
    maps, boxes, ids = split
    metric = BoxLocalization(cam_curve_interval=0.02, **options)
    metric.update(maps[part], boxes[part], image_ids=ids[part])
    return metric


def test_batches_ranks_and_state_give_the_same_result(split):
    whole = added(split, keep_images=True).compute()
    merged = added(split, slice(0, 7), keep_images=True).merge(
        added(split, slice(7, 20), keep_images=True), added(split, slice(20, N), keep_images=True)
    )
    restored = BoxLocalization(cam_curve_interval=0.02, keep_images=True)
    restored.load_state_dict(merged.state_dict())
    for other in (merged.compute(), restored.compute()):
        assert other.n == N and other.image_ids == whole.image_ids
        np.testing.assert_array_equal(other.curve, whole.curve)
        np.testing.assert_array_equal(other.images, whole.images)


def test_state_survives_weights_only_loading(split, tmp_path):
    metric = added(split, keep_images=True)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    restored = BoxLocalization(cam_curve_interval=0.02, keep_images=True)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(restored.compute().curve, metric.compute().curve)


@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.float32, torch.bfloat16, np.uint8])
def test_dtypes_are_quantised_in_float64(split, kind):
    maps, boxes, _ = split
    metric = BoxLocalization(cam_curve_interval=0.02)
    if kind is np.uint8:
        given, exact = (maps * 255).astype(np.uint8), (maps * 255).astype(np.uint8) / 255 + 1e-9
    else:
        given = torch.from_numpy(maps).to(kind) if isinstance(kind, torch.dtype) else maps.astype(kind)
        exact = torch.as_tensor(given).double().numpy()
    metric.update(given, boxes)
    for delta, row in zip((0.3, 0.5, 0.7), metric.compute().curve, strict=True):
        each = [best_iou_per_threshold(m.clip(0, 1), b, metric.taus) for m, b in zip(exact, boxes, strict=True)]
        np.testing.assert_allclose(row, 100 * (np.array(each) >= delta).mean(0))


def test_maximum_is_taken_over_thresholds_after_the_mean_over_images(split):
    maps, boxes, _ = split
    result = added(split).compute()
    each = np.array([best_iou_per_threshold(m, b, result.taus) for m, b in zip(maps, boxes, strict=True)])
    for delta, value in result.max_box_acc.items():
        assert value == pytest.approx(100 * (each >= delta).mean(0).max())
        assert value <= 100 * (each.max(1) >= delta).mean() + 1e-9  # the mistake: a threshold per image
    assert result.max_box_acc_v2 == pytest.approx(np.mean(list(result.max_box_acc.values())))


def test_fixed_and_transferred_thresholds(split):
    val, test = added(split, slice(0, 12)).compute(), added(split, slice(12, N)).compute()
    moved = test.at(val.tau_star)
    for row, delta in enumerate(test.iou_thresholds):
        place = np.abs(test.taus - val.tau_star[delta]).argmin()
        assert moved[delta] == test.curve[row, place] <= test.max_box_acc[delta]
        assert test.at(0.2)[delta] == test.curve[row, 10]
    with pytest.raises(ValueError, match=r"tau: expected a number in \[0, 1\)"):
        test.at(1.0)


def test_localization_with_the_right_class(split):
    maps, boxes, _ = split
    first, five = np.arange(N) % 2 == 0, np.arange(N) % 3 > 0
    metric = BoxLocalization(cam_curve_interval=0.02)
    metric.update(maps, boxes, first, torch.from_numpy(five))
    result = metric.compute()
    only = BoxLocalization(cam_curve_interval=0.02)
    only.update(maps[first], [b for b, keep in zip(boxes, first, strict=True) if keep])
    np.testing.assert_allclose(result.top1_curve * N, only.compute().curve * first.sum())
    assert all(result.top5_loc[d] <= result.max_box_acc[d] for d in result.iou_thresholds)


def test_native_maps_of_many_sizes():
    metric = BoxLocalization(resolution="native", cam_curve_interval=0.1)
    maps = [np.pad(np.ones((3, 3)), ((2, h), (2, w))) for h, w in ((5, 1), (2, 9))]
    sizes = [each.shape[::-1] for each in maps]
    metric.update(maps, [np.array([[2, 2, 5, 5]])] * 2, image_sizes=sizes)
    assert metric.compute().max_box_acc == {0.3: 100, 0.5: 100, 0.7: 100}


def test_a_low_resolution_map_is_no_native_map():
    metric = BoxLocalization(resolution="native", cam_curve_interval=0.1)
    with pytest.raises(ValueError, match="native map has its image's size, 500 x 375 pixels, got 14 x 14"):
        metric.update([np.zeros((14, 14))], BOX, image_sizes=[(500, 375)])
    with pytest.raises(ValueError, match="image_sizes: resolution='native' needs"):
        metric.update([np.zeros((14, 14))], BOX)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 2.5])
def test_a_constant_map_becomes_zero(value):
    assert resize_normalize(torch.full((2, 14, 14), value)).abs().max() == 0


def test_maps_are_taken_as_tools_give_them(split):
    maps, boxes, _ = split
    wanted = added(split).compute().curve
    tensors = torch.from_numpy(maps)
    for given in (tensors[:, None].requires_grad_(), [*maps], [each[None] for each in tensors], list(tensors)):
        metric = BoxLocalization(cam_curve_interval=0.02)
        metric.update(given, boxes)
        np.testing.assert_array_equal(metric.compute().curve, wanted)
    one = BoxLocalization(cam_curve_interval=0.02)
    one.update(maps[0], boxes[:1])
    assert one.compute().n == 1
    sizes = [np.random.default_rng(0).random(shape) for shape in ((7, 7), (1, 14, 9))]
    assert resize_normalize(sizes, 32).shape == (2, 32, 32)


def test_the_bootstrap_is_paired(split):
    """Two methods that err on the same images: their difference is known far better than either."""
    maps, boxes, ids = split
    ours, theirs = added(split, keep_images=True).compute(), BoxLocalization(cam_curve_interval=0.02, keep_images=True)
    shifted = maps.copy()
    shifted[0] = np.roll(shifted[0], 60, 1)
    theirs.update(shifted, boxes, image_ids=ids)
    difference, alone = paired(ours, theirs.compute(), draws=300)["0.3"], bootstrap(ours, draws=300)["0.3"]
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)


def test_intervals_of_pixels():
    rng = np.random.default_rng(0)
    masks = (rng.random((30, 8, 8)) < 0.3).astype(np.uint8)
    found = []
    for noise in (0.3, 0.6):
        metric = PixelAP(0.01, keep_images=True)
        metric.update(
            (masks * (1 - noise) + noise * rng.random(masks.shape)).clip(0, 1), masks, list(map(str, range(30)))
        )
        found.append(metric.compute())
    assert found[0].images.sum((0,)).sum() == 30 * 64
    alone, difference = bootstrap(found[1], 200)["pxap"], paired(*found, draws=200)["pxap"]
    assert alone.low < alone.value < alone.high and alone.value == found[1].pxap
    assert difference.value == pytest.approx(found[0].pxap - found[1].pxap) and difference.p < 0.05
    at = found[0].at(0.5)
    assert at == pytest.approx({"precision": 100, "recall": 100, "iou": 100})


def test_intervals_and_paired_difference(split):
    maps, boxes, ids = split
    ours = added(split, keep_images=True).compute()
    worse = BoxLocalization(cam_curve_interval=0.02, keep_images=True)
    worse.update(maps[::-1].copy(), boxes, image_ids=ids)
    found = bootstrap(ours, draws=200)
    assert all(i.low <= i.value + 5 and i.low <= i.high for i in found.values())
    assert found["v2"].value == ours.max_box_acc_v2
    difference = paired(ours, worse.compute(), draws=200)["v2"]
    assert difference.value == pytest.approx(ours.max_box_acc_v2 - worse.compute().max_box_acc_v2)
    same = paired(ours, ours, draws=200)["v2"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="the same ones in the same order"):
        paired(ours, added(split, slice(0, 5), keep_images=True).compute())
    with pytest.raises(ValueError, match="keep_images=True"):
        bootstrap(added(split).compute())


def test_pixels_are_pooled_not_averaged_per_image():
    maps, masks = np.random.default_rng(0).random((2, 6, 6)), np.zeros((2, 6, 6), np.uint8)
    masks[0, :3], masks[1, 0, 0], masks[1, 5] = 1, 1, 255
    both = PixelAP(0.1)
    both.update(maps, masks, ["a", "b"])
    parts = [PixelAP(0.1), PixelAP(0.1)]
    for part, i in zip(parts, (0, 1), strict=True):
        part.update(maps[i : i + 1], masks[i : i + 1], [str(i)])
    assert both.compute().pxap != pytest.approx(np.mean([p.compute().pxap for p in parts]))
    assert parts[0].merge(parts[1]).compute().pxap == both.compute().pxap
    assert both.compute().foreground == pytest.approx(100 * 19 / 66)
    constant = PixelAP(0.1)
    constant.update(np.full((2, 6, 6), 0.4), masks)
    assert constant.compute().pxap == pytest.approx(constant.compute().foreground)


GOOD = np.zeros((1, 224, 224))
BOX = [np.array([[0, 0, 5, 5]])]


@pytest.mark.parametrize(
    "maps,error",
    [
        (GOOD + np.nan, ValueError),
        (GOOD + 1.5, ValueError),
        (GOOD - 0.1, ValueError),
        (GOOD + np.inf, ValueError),
        (GOOD[None, None], ValueError),
        (GOOD.astype(np.int64), TypeError),
        ([[0.0]], TypeError),
        (np.zeros((1, 224, 223)), ValueError),
        (np.zeros((1, 100, 100)), ValueError),
        (GOOD.astype(complex), TypeError),
    ],
)
def test_bad_maps(maps, error):
    with pytest.raises(error, match="score_maps: "):
        BoxLocalization().update(maps, BOX)


def test_bad_maps_are_of_the_references_kind():
    kinds = {"ValueError": ValueError, "TypeError": TypeError}
    cases = {"nan": GOOD[0] + np.nan, "above_1": GOOD[0] + 1.1, "negative": GOOD[0] - 1, "3d": GOOD, "list": [[0.0]]}
    for name, value in cases.items():
        with pytest.raises(kinds[ERRORS[name]]):
            best_iou_per_threshold(value, BOX[0], np.array([0.5]))


@pytest.mark.parametrize(
    "box,message",
    [
        (np.array([[5, 0, 4, 5]]), r"x0 <= x1"),
        (np.array([[-1, 0, 4, 5]]), r"0 <= x0"),
        (np.zeros((0, 4), int), "k >= 1"),
        (np.array([0, 0, 4, 5]), "shape"),
        (np.array([[0, 0, 4.5, 5]]), "whole numbers"),
    ],
)
def test_bad_boxes_name_the_image(box, message):
    with pytest.raises(ValueError, match=rf"bird\.jpg: .*{message}"):
        BoxLocalization().update(GOOD, [box], image_ids=["bird.jpg"])


def test_ids_and_flags_must_be_consistent():
    metric = BoxLocalization(cam_curve_interval=0.1)
    metric.update(GOOD, BOX, [True], image_ids=["a"])
    with pytest.raises(ValueError, match="'a' was added before"):
        metric.update(GOOD, BOX, [True], image_ids=["a"])
    with pytest.raises(ValueError, match="class_correct: give it in every update or in none"):
        metric.update(GOOD, BOX, image_ids=["b"])
    with pytest.raises(ValueError, match="image_ids: give it"):
        metric.update(GOOD, BOX, [True])
    with pytest.raises(ValueError, match="expected 1 booleans"):
        metric.update(GOOD, BOX, [1], image_ids=["b"])
    with pytest.raises(ValueError, match="1 score maps, 2 entries of boxes"):
        metric.update(GOOD, BOX * 2, [True], image_ids=["b"])
    other = BoxLocalization(cam_curve_interval=0.1)
    other.update(GOOD, BOX, [False], image_ids=["a"])
    with pytest.raises(ValueError, match="'a' was added before"):
        metric.merge(other)
    with pytest.raises(ValueError, match="a state with options"):
        metric.merge(BoxLocalization(cam_curve_interval=0.2))
    assert metric.compute().n == 1


def test_empty_and_wrong_options():
    with pytest.raises(RuntimeError, match="no image"):
        BoxLocalization().compute()
    with pytest.raises(RuntimeError, match="no foreground"):
        PixelAP().compute()
    for options in ({"iou_thresholds": ()}, {"cam_curve_interval": 0}, {"contours": "some"},
                    {"box_convention": "mine"}, {"resolution": "any"}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            BoxLocalization(**options)


@pytest.mark.parametrize(
    "maps,masks,error,message",
    [
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 5), np.uint8), ValueError, "one shape"),
        (np.zeros((1, 4, 4)), np.full((1, 4, 4), 7, np.uint8), ValueError, "0, 1 and 255"),
        (np.zeros((1, 4, 4)) + np.nan, np.zeros((1, 4, 4), np.uint8), ValueError, "NaN"),
        (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8), TypeError, "floating"),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), TypeError, "uint8"),
    ],
)
def test_bad_pixels(maps, masks, error, message):
    with pytest.raises(error, match=message):
        PixelAP().update(maps, masks)
