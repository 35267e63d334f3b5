"""The reference's own answers: counts and IoU exact, the rest to the stated tolerance."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsol_eval import (
    BoxLocalization,
    PixelAP,
    best_iou_per_threshold,
    box_iou_inclusive,
    boxes_at_threshold,
    center_gaussian,
    merge_masks,
    read_metadata,
    resize_boxes,
    resize_normalize,
)
from wsol_eval.center import center_on_boxes
from wsol_eval.conformance import FIXTURES
from wsol_eval.data import load_mask
from wsol_eval.methods import acol, adl, attention, cutmix, spg
from wsol_eval.models import build_model
from wsol_eval.pixels import bin_edges, score_histogram

GOLDEN = Path(__file__).parent / "golden"
MODES = {"all": "multi", "largest": "largest"}
SHAPES = json.loads((GOLDEN / "model_shapes.json").read_text())


@pytest.fixture(scope="module")
def boxes():
    return dict(np.load(FIXTURES / "box_metrics.npz"))


@pytest.fixture(scope="module")
def operations():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "method_ops.npz").items()}


def score_map(stored, i):
    return stored[f"map_{i:02d}"].astype(np.float64) / 65535


@pytest.mark.parametrize("backend", ["numba", "opencv"])
@pytest.mark.parametrize("contours", MODES)
def test_best_iou_of_every_map_and_threshold(boxes, contours, backend):
    for i, name in enumerate(boxes["names"]):
        truth, taus = boxes[f"gt_{i:02d}"], boxes["thresholds_001"]
        found = best_iou_per_threshold(score_map(boxes, i), truth, taus, contours, backend=backend)
        np.testing.assert_array_equal(found, boxes[f"best_iou_{MODES[contours]}_001_{i:02d}"], err_msg=name)


def test_boxes_of_every_map(boxes):
    for i, name in enumerate(boxes["names"]):
        for place in range(0, 1000, 37):
            tau = boxes["thresholds_001"][place]
            assert len(boxes_at_threshold(score_map(boxes, i), tau)) == boxes[f"nbox_multi_001_{i:02d}"][place], name
            largest = boxes_at_threshold(score_map(boxes, i), tau, "largest")
            assert largest.tolist() == [boxes[f"box_largest_001_{i:02d}"][place].tolist()], (name, tau)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("interval", [0.001, 0.01])
@pytest.mark.parametrize("contours", MODES)
def test_accuracy_curves(boxes, contours, interval, workers):
    metric = BoxLocalization(contours=contours, cam_curve_interval=interval, resolution="native", workers=workers)
    for i, name in enumerate(boxes["names"]):
        each = score_map(boxes, i)
        metric.update([each], [boxes[f"gt_{i:02d}"]], image_ids=[name], image_sizes=[each.shape[::-1]])
    result = metric.compute()
    key = f"{MODES[contours]}_{str(interval)[2:]}"
    np.testing.assert_allclose(result.curve, boxes[f"box_acc_curve_{key}"], atol=1e-12)
    np.testing.assert_allclose(list(result.max_box_acc.values()), boxes[f"max_box_acc_{key}"], atol=1e-12)


def test_iou_and_resized_boxes():
    with np.load(FIXTURES / "iou_and_resize.npz") as stored:
        np.testing.assert_array_equal(box_iou_inclusive(stored["box_a"], stored["box_b"]), stored["iou"])
        moved = [resize_boxes(box[None], wh)[0] for box, wh in zip(stored["orig_box"], stored["image_wh"], strict=True)]
        np.testing.assert_array_equal(moved, stored["resized_224"])


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("interval,key", [(0.001, "001"), (0.01, "01"), (0.1, "1")])
def test_pixel_histograms_and_average_precision(interval, key, backend):
    with np.load(FIXTURES / "pxap.npz") as stored:
        np.testing.assert_array_equal(bin_edges(interval), stored[f"edges_{key}"])
        metric, counts = PixelAP(interval), 0
        for i in range(10):
            mask = merge_masks(list(stored[f"inst_{i:02d}"]), stored[f"ignore_{i:02d}"])
            np.testing.assert_array_equal(mask, stored[f"gt_{i:02d}"])
            scores = torch.from_numpy(stored[f"map_{i:02d}"])
            counts = counts + score_histogram(scores, torch.from_numpy(mask), interval, backend)
            metric.update(scores[None], mask[None])
        np.testing.assert_array_equal(counts, [stored[f"hist_false_{key}"], stored[f"hist_true_{key}"]])
        assert abs(metric.compute().pxap - stored[f"pxap_{key}"]) < 1e-9


def test_masks_from_png(tmp_path):
    with np.load(GOLDEN / "mask_loading.npz") as stored:
        for k in range(4):
            parts = []
            for name in ("inst_a", "inst_b", "ignore"):
                Image.fromarray(stored[f"{name}_{k}"]).save(tmp_path / f"{name}.png")
                parts.append(load_mask(tmp_path / f"{name}.png"))
            np.testing.assert_array_equal(merge_masks(parts[:2], parts[2]), stored[f"gt_224_{k}"])


def test_resize_then_normalize():
    with np.load(GOLDEN / "resize_normalize.npz") as stored:
        for k in range(5):
            found = resize_normalize(torch.from_numpy(stored[f"cam_{k}"])[None], int(stored[f"size_{k}"]))
            np.testing.assert_allclose(found[0], stored[f"norm_{k}"], atol=2e-6)


def test_acol_and_adl(operations):
    o = operations
    torch.testing.assert_close(attention.normalize(o["feat"]), o["normalize_tensor"])
    torch.testing.assert_close(attention.attention(o["feat"], o["label"]), o["attention"])
    torch.testing.assert_close(acol.erase(o["acol_feature"], o["feat"], o["label"], 0.7), o["acol_erased_thr0.7"])
    loss = acol.acol_loss(o["acol_logits_a"], o["acol_logits_b"], o["label"])
    torch.testing.assert_close(loss, o["acol_loss"], atol=1e-5, rtol=0)
    x = o["adl_input"]
    torch.testing.assert_close(adl.drop_mask(x, 0.8), o["adl_drop_mask_thr0.8"])
    torch.testing.assert_close(adl.importance(x), o["adl_importance"])
    for rate, name in ((1.0, "adl_out_if_drop"), (0.0, "adl_out_if_importance")):
        layer = adl.ADL(rate, 0.8)
        torch.testing.assert_close(layer(x), o[name])
        assert layer.eval()(x) is x


def test_spg(operations):
    o = operations
    thresholds = [tuple(pair) for pair in o["spg_thresholds"].tolist()]
    sides = (o["spg_b1"], o["spg_b2"], o["spg_c"])
    loss = spg.spg_loss(o["spg_feat_map"], sides, o["spg_label"], thresholds)
    torch.testing.assert_close(loss, o["spg_total_loss"], atol=1e-5, rtol=0)
    seeds = attention.attention(spg.upsample(o["spg_feat_map"], (224, 224)), o["spg_label"])
    torch.testing.assert_close(seeds.mean((1, 2, 3)), o["spg_attention_mean"], atol=1e-5, rtol=0)
    few = torch.full((2, 1, 224, 224), 0.2)
    few[0, 0, 0, :20] = 0.6
    for maps, (high, low), name in (
        (seeds, thresholds[0], "spg_mask_counts_fg_bg_ignored"),
        (few, (0.7, 0.05), "spg_mask_rescue_counts"),
    ):
        mask = spg.seed_mask(maps, high, low)
        counts = [[int((each == kind).sum()) for kind in (1, 0, 255)] for each in mask]
        assert counts == o[name].tolist()


def test_cutmix_boxes(operations):
    rng = np.random.RandomState(int(operations["seed"]))
    shares = [rng.beta(1, 1) for _ in range(50)]
    found = [cutmix.cut_box((224, 224), share, (rng.randint(224), rng.randint(224))) for share in shares]
    assert found == list(map(tuple, operations["cutmix_boxes_given_np_seed"].tolist()))


@pytest.mark.parametrize("name", SHAPES)
def test_networks(name):
    arch, method, size, classes = name.split("/")
    wanted = SHAPES[name]
    with torch.device("meta"):
        network = build_model(arch, method, int(classes), int(size[:2])).eval()
        logits, maps = network.predict(torch.zeros(1, 3, 224, 224), torch.zeros(1, dtype=torch.long))
    assert sum(p.numel() for p in network.parameters()) == wanted["params"]
    assert sum(b.numel() for b in network.buffers()) == wanted["buffers"]
    assert len(list(network.parameters())) == wanted["param_tensors"]
    new = [p for group in network.parameter_groups(1.0) if group["lr"] == 10 for p in group["params"]]
    assert sum(p.numel() for p in new) == wanted["params_lr_x10"]
    assert list(logits.shape) == wanted["outputs"]["logits"] and list(maps.shape) == wanted["cam_shape"]


def test_centre_on_cubv2():
    metadata = read_metadata(FIXTURES / "CUBV2")
    both = center_on_boxes(metadata)
    assert list(both["all"].max_box_acc.values()) == pytest.approx([87.7, 45.2, 9.4], abs=1e-9)
    assert both["all"].max_box_acc_v2 == pytest.approx(47.43333333, abs=1e-6)
    assert both["largest"].max_box_acc[0.5] == pytest.approx(45.2, abs=1e-9)
    few = replace(metadata, image_ids=metadata.image_ids[:150])
    narrow, wide = (center_on_boxes(few, sigma)["all"] for sigma in (0.5, 1.0))
    assert narrow.max_box_acc == wide.max_box_acc


def test_centre_gaussian_is_symmetric_and_full_range():
    gaussian = center_gaussian((30, 41))
    assert gaussian.min() == 0 and gaussian.max() == 1
    np.testing.assert_allclose(gaussian, gaussian[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize("name", ["ImageNetV2", "OpenImages"])
def test_metadata_samples(name):
    metadata = read_metadata(GOLDEN / "metadata_sample" / name)
    assert len(metadata.image_ids) == 200
    if name == "ImageNetV2":
        assert sum(map(len, metadata.boxes.values())) == 347
        assert metadata.boxes["val2/0/0.jpeg"].tolist() == [[156, 163, 318, 230]]
    else:
        assert sum(len(paths) for paths, _ in metadata.masks.values()) == 309
        assert all(ignore for _, ignore in metadata.masks.values())
