"""The fast sweep against slow definitions: every threshold searched anew, pixel by pixel, in plain numpy and scipy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wsol_eval import best_iou_per_threshold, box_iou_inclusive, boxes_at_threshold
from wsol_eval.bench import make_maps, reference_histogram, released_evaluator, released_iou
from wsol_eval.contours import contour_boxes
from wsol_eval.pixels import bin_edges, score_histogram
from wsol_eval.sweep import level_iou

EIGHT = np.ones((3, 3))


@st.composite
def grey_maps(draw):
    """Small maps with many ties, plateaus, holes and thin structures."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    levels = draw(st.sampled_from([2, 3, 6, 256]))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, levels, (height, width))
    if draw(st.booleans()):
        values = ndimage.uniform_filter(values, 3)
    return (values * (255 // (levels - 1))).astype(np.uint8)


@st.composite
def boxes_in(draw, shape):
    height, width = shape
    count = draw(st.integers(1, 3))
    x = np.sort([[draw(st.integers(0, width - 1)) for _ in range(2)] for _ in range(count)])
    y = np.sort([[draw(st.integers(0, height - 1)) for _ in range(2)] for _ in range(count)])
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


def slow_boxes(grey, level):
    """Extents of the 8-connected components, and of the holes grown by a pixel, at one threshold (exact ends)."""
    labels, _ = ndimage.label(grey > level, EIGHT)
    found = [(c.start, r.start, c.stop - 1, r.stop - 1) for r, c in ndimage.find_objects(labels)]
    holes, _ = ndimage.label(np.pad(grey <= level, 1, constant_values=True))
    for label, (r, c) in enumerate(ndimage.find_objects(holes), 1):
        if label != holes[0, 0]:
            found.append((c.start - 2, r.start - 2, c.stop - 1 + 1 - 1, r.stop - 1 + 1 - 1))
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equal_to_opencv(data):
    grey = data.draw(grey_maps())
    boxes = data.draw(boxes_in(grey.shape))
    for contours in ("all", "largest"):
        for convention in ("reference", "exact"):
            ours = level_iou(grey[None], [boxes], contours, convention, "numba")
            np.testing.assert_array_equal(ours, level_iou(grey[None], [boxes], contours, convention, "opencv"))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equal_to_components_and_holes_by_scipy(data):
    grey = data.draw(grey_maps())
    boxes = data.draw(boxes_in(grey.shape))
    found = level_iou(grey[None], [boxes], "all", "exact")[0]
    for level in range(int(grey.max())):
        slow = box_iou_inclusive(np.array(slow_boxes(grey, level)), boxes).max()
        assert found[level] == slow, level


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_several_contours_are_never_worse_than_the_largest(data):
    grey = data.draw(grey_maps())
    boxes = data.draw(boxes_in(grey.shape))
    assert (level_iou(grey[None], [boxes], "all") >= level_iou(grey[None], [boxes], "largest")).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exact_convention_does_not_see_a_flip(data):
    grey = data.draw(grey_maps())
    boxes = data.draw(boxes_in(grey.shape))
    width = grey.shape[1]
    mirrored = np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], 1)
    ours = level_iou(grey[None], [boxes], "all", "exact")
    theirs = level_iou(grey[None, :, ::-1], [mirrored], "all", "exact")
    top = grey.max()  # without foreground the box is 0, 0, 0, 0, which no flip moves
    np.testing.assert_array_equal(ours[:, :top], theirs[:, :top])


def test_reference_convention_ends_a_pixel_too_far():
    score_map = np.zeros((8, 8))
    score_map[2:5, 1:4] = 1
    assert boxes_at_threshold(score_map, 0.5).tolist() == [[1, 2, 4, 5]]
    assert boxes_at_threshold(score_map, 0.5, box_convention="exact").tolist() == [[1, 2, 3, 4]]
    assert boxes_at_threshold(np.ones((8, 8)), 0.5).tolist() == [[0, 0, 7, 7]]  # clipped


def search_at_every_threshold(score_map, boxes, taus, largest):
    grey, best = (score_map * 255).astype(np.uint8), []
    for tau in taus:
        found = contour_boxes(grey, int(tau * grey.max()), largest, True)
        best.append(box_iou_inclusive(found if len(found) else np.zeros((1, 4)), boxes).max())
    return np.array(best)


def test_the_released_code_is_taken_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a clone of clovaai/wsolevaluation"):
        released_evaluator(tmp_path)
    (tmp_path / "evaluation.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match=r"evaluation\.py: cannot be imported \(No module named 'no_such_module'\)"):
        released_evaluator(tmp_path)


def test_boxes_of_the_released_code_are_grouped_by_threshold():
    stub = SimpleNamespace(calculate_multiple_iou=box_iou_inclusive)
    stub.compute_bboxes_from_scoremaps = lambda *_: (
        [np.array([[0, 0, 1, 1], [2, 2, 5, 5]]), np.array([[0, 0, 3, 3]])],
        [2, 1],
    )
    found = released_iou(stub)(np.zeros((8, 8)), np.array([[2, 2, 5, 5]]), np.array([0, 0.5]), "all")
    assert found.tolist() == [1.0, pytest.approx(4 / 28)]


@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("contours", ["all", "largest"])
def test_equal_to_a_search_at_every_threshold_on_full_maps(side, contours):
    maps, boxes = make_maps(side, 3)
    taus = np.arange(0, 1, 0.01)
    for score_map, truth in zip(maps, boxes, strict=True):
        slow = search_at_every_threshold(score_map, truth, taus, contours == "largest")
        np.testing.assert_array_equal(best_iou_per_threshold(score_map, truth, taus, contours), slow)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.001, 0.01, 0.07, 0.1, 0.3, 1.0]),
    st.sampled_from(["float32", "float64"]),
)
def test_histogram_equals_numpy_on_and_beside_the_edges(seed, interval, kind):
    rng = np.random.default_rng(seed)
    edges = bin_edges(interval)
    inside = edges[edges <= 1]
    near = np.concatenate([inside, np.nextafter(inside, 0), np.nextafter(inside, 1), rng.random(40)])
    scores = np.clip(near.astype(kind), 0, 1)
    masks = rng.choice(np.array([0, 1, 255], np.uint8), scores.shape)
    slow = reference_histogram(scores.astype(np.float64), masks, edges)
    for backend in ("numba", "torch"):
        found = score_histogram(torch.from_numpy(scores), torch.from_numpy(masks), interval, backend)
        np.testing.assert_array_equal(found, slow)


def test_without_numba_the_fallbacks_answer(monkeypatch):
    from wsol_eval import BoxLocalization, PixelAP, pixels, sweep

    maps, boxes = make_maps(14, 2)
    masks = np.zeros(maps.shape, np.uint8)
    masks[:, 50:150, 50:150] = 1

    def answers():
        metric, average = BoxLocalization(cam_curve_interval=0.1), PixelAP(0.1)
        metric.update(maps, boxes)
        average.update(maps, masks)
        found = sorted(map(tuple, boxes_at_threshold(maps[0], 0.5).tolist()))
        return metric.compute().curve.tolist(), average.compute().pxap, found

    fast = answers()
    monkeypatch.setattr(sweep, "tree", None)
    monkeypatch.setattr(pixels, "njit", None)
    assert answers() == fast
