"""Few boxes, maps and numbers, each with the answer that a pencil gives."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsol_eval import BoxLocalization, bootstrap, paired, resize_normalize, train
from wsol_eval.boxes import box_iou_inclusive, check_boxes, crop_boxes
from wsol_eval.cutouts import make_split
from wsol_eval.evaluate import Evaluator, Report
from wsol_eval.pixels import PixelAP
from wsol_eval.recipe import Recipe
from wsol_eval.scoremaps import ScoreMaps, as_maps
from wsol_eval.sources import MemorySource
from wsol_eval.sweep import best_iou_per_threshold, boxes_at_level, boxes_at_threshold, level_iou
from wsol_eval.train import fit, make_fabric, read_checkpoint


def test_overlaps_of_two_boxes_and_of_none():
    found = box_iou_inclusive([[0, 0, 1, 1], [5, 5, 4, 4]], np.array([[1, 1, 2, 2], [5, 5, 4, 4]]))
    assert found.dtype == np.float64 and found.tolist() == [[1 / 7, 0], [0, 0]]  # nothing on nothing is 0 as well
    assert box_iou_inclusive([[0, 0, 1, 1]], [[0, 0, 1, 1]]).dtype == np.float64


def test_a_box_that_keeps_one_line_of_pixels_is_inside_the_crop():
    """256 x 256, of which 16 to 239 remain."""
    boxes = np.array([[0, 20, 16, 30], [20, 0, 30, 16], [0, 20, 15, 30], [239, 20, 250, 30], [20, 240, 30, 250]])
    assert crop_boxes(boxes, (256, 256)).tolist() == [[0, 4, 0, 14], [4, 0, 14, 0], [223, 4, 223, 14]]


@pytest.mark.parametrize(
    "call", [lambda m: best_iou_per_threshold(m, [[0, 0, 1, 1]], [0.5]), lambda m: boxes_at_threshold(m, 0.5)]
)
def test_a_map_out_of_range_is_named_as_the_argument(call):
    with pytest.raises(ValueError, match="^score_map: "):
        call(np.full((4, 4), 2.0))


def test_boxes_are_whole_pixels_in_any_type():
    found = check_boxes(np.array([[0.0, 1.0, 2.0, 3.0]]))
    assert found.dtype == np.int64 and found.tolist() == [[0, 1, 2, 3]]
    for wrong in ([[0.0, 1.5, 2, 3]], [[0.0, np.inf, 2, 3]], [[0.0, np.nan, 2, 3]]):
        with pytest.raises(ValueError, match="^boxes: "):
            check_boxes(np.array(wrong))


def test_the_largest_map_has_32767_pixels_on_a_side():
    line = np.zeros((1, 1, 32767), np.uint8)
    line[:, :, 5:] = 200
    whole = [np.array([[5, 0, 32766, 0]])]
    assert level_iou(line, whole, convention="exact")[0, 100] == 1
    with pytest.raises(ValueError, match="expected sides below 32,768 pixels"):
        level_iou(np.zeros((1, 1, 32768), np.uint8), whole)


def test_a_level_without_pixels_gives_one_whole_number_box():
    boxes = boxes_at_level(np.zeros((4, 4), np.uint8), 300)
    assert boxes.tolist() == [[0, 0, 0, 0]] and boxes.dtype == np.int64


@pytest.mark.parametrize("name", ["maps", "maps.lmdb"])
def test_each_map_written_has_a_name(tmp_path, name):
    with pytest.raises(ValueError, match="argument"):
        ScoreMaps(tmp_path / name).write(["a"], torch.rand(2, 4, 4))


def test_maps_of_other_tools_are_read(tmp_path):
    values = np.random.default_rng(0).random((1, 1, 3, 5)).astype("f")
    np.save(tmp_path / "a.npy", values)
    torch.save(torch.from_numpy(values), tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object))
    maps = ScoreMaps(tmp_path)
    for name in "ab":
        np.testing.assert_array_equal(maps.read(name), values[0, 0])
    with pytest.raises(ValueError, match=r"c.npy: the score map is truncated or no map .*pickle"):
        maps.read("c")


def measured(flags, ids="ab", keep=True):
    metric = BoxLocalization(cam_curve_interval=0.25, resolution=8, keep_images=keep)
    score = np.zeros((len(ids), 8, 8))
    score[:, 2:6, 2:6] = 1.0
    metric.update(score, [np.array([[2, 2, 5, 5]])] * len(ids), class_correct=flags, image_ids=list(ids))
    return metric


def test_states_add_if_both_have_classes_or_neither_has():
    for flags, expected in (([True, False], {0.3: 75.0, 0.5: 75.0, 0.7: 0.0}), (None, None)):
        whole = measured(flags)
        whole.load_state_dict(measured(flags and [True, True], "cd").state_dict(), add=True)
        assert whole.compute().n == 4 and whole.compute().top1_loc == expected
    with pytest.raises(ValueError, match="class_correct was given for one part"):
        measured([True, False]).load_state_dict(measured(None, "cd").state_dict(), add=True)


def test_a_stored_state_says_how_it_was_measured():
    assert measured(None).state_dict()["options"] == {
        "iou_thresholds": [0.3, 0.5, 0.7], "thresholds": 4, "contours": "all", "box_convention": "reference",
        "keep_images": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="a state with options"):
        measured(None).load_state_dict(measured(None, keep=False).state_dict())


def test_a_difference_in_every_draw_has_the_smallest_p():
    """One method finds all 20 objects, the other none: every draw differs by 100 points."""
    ids = [str(number) for number in range(20)]
    found = []
    for hit in (1.0, 0.0):
        score = np.zeros((20, 16, 16))
        score[:, 2:6, 2:6], score[:, 10:14, 10:14] = hit, 1 - hit
        metric = BoxLocalization(cam_curve_interval=0.25, resolution=16, keep_images=True)
        metric.update(score, [np.array([[2, 2, 5, 5]])] * 20, image_ids=ids)
        found.append(metric.compute())
    difference = paired(*found, draws=200)["0.5"]
    assert (difference.value, difference.low, difference.high, difference.p) == (100, 100, 100, 2 / 200)
    assert bootstrap(found[0], draws=50)["0.5"].low == 100
    unnamed = [measured(None), BoxLocalization(cam_curve_interval=0.25, resolution=8, keep_images=True)]
    unnamed[1].update(np.zeros((2, 8, 8)), [np.array([[2, 2, 5, 5]])] * 2)
    for pair in (unnamed, unnamed[::-1], [unnamed[1]] * 2):
        with pytest.raises(ValueError, match="both results need image_ids"):
            paired(*(metric.compute() for metric in pair))


def four_images(boxes=True, masks=True):
    """An object each, missed in image 1; classes: first, first, third and sixth of seven.

    The reference's boxes end one pixel later than the object: 4 x 4 pixels of 5 x 5, an IoU of 0.64.
    """
    source = SimpleNamespace(has_boxes=boxes, has_masks=masks, resolution=(8, 8))
    score = torch.zeros(4, 8, 8, dtype=torch.float64)
    score[[0, 2, 3], 2:6, 2:6] = 1.0
    score[1, :2, :2] = 1.0
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[:, 2:6, 2:6] = 1
    batch = SimpleNamespace(
        labels=torch.tensor([0, 0, 2, 5]), boxes=[np.array([[2, 2, 5, 5]])] * 4, masks=truth, image_ids=[*"abcd"]
    )
    evaluator = Evaluator(source, 0.25)
    evaluator.update(batch, score, torch.arange(7.0).flip(0).expand(4, 7))
    return evaluator


def test_the_figures_of_four_images():
    report = four_images().report()
    found = report.metrics()
    classes = {"top1_accuracy": 50, "top5_accuracy": 75, "top1_loc": 25, "top5_loc": 50}
    boxes = {
        "max_box_acc": 75,
        "max_box_acc_v2": 50,
        "localization": 50,
        "v2_iou30": 75,
        "v2_iou50": 75,
        "v2_iou70": 0,
    }
    pixels = {"pxap": report.pixels.pxap, "pxap_constant_map": 25}
    assert found == pytest.approx(classes | boxes | pixels) and report.n == report.details()["n"] == 4
    alone = four_images(boxes=False).report().metrics()
    assert alone["localization"] == alone["pxap"] == pytest.approx(report.pixels.pxap) and "top5_loc" not in alone
    nothing = Report(None, None, None, 10.0, None, 1).metrics()
    assert nothing.keys() == {"localization"} and math.isnan(nothing["localization"])


def test_ranks_sum_what_they_counted():
    evaluator, seen = four_images(), []

    def all_reduce(values, reduce_op):
        assert reduce_op == "sum" and values.tolist() == [4, 2, 3]
        return values + torch.tensor([6, 0, 1])

    fabric = SimpleNamespace(world_size=2, all_reduce=all_reduce)
    for metric in (*evaluator.boxes, evaluator.pixels):
        metric.reduce = seen.append
    report = evaluator.report(fabric)
    assert seen == [fabric] * 3 and (report.n, report.top1_accuracy, report.top5_accuracy) == (10, 20, 40)
    single = SimpleNamespace(world_size=1)  # nothing to reduce, and no way to do it
    assert four_images().report(single).n == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_become_float32_and_may_be_oblong(dtype):
    small = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])
    found = resize_normalize(small.to(dtype), (3, 5))
    assert found.shape == (1, 3, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found, resize_normalize(small, (3, 5)))
    assert resize_normalize(small.double(), 4).dtype == torch.float64


def test_maps_of_one_size_and_kind_become_one_tensor():
    same = as_maps([np.zeros((2, 3)), torch.ones(1, 2, 3, dtype=torch.float64)])
    assert isinstance(same, torch.Tensor) and same.shape == (2, 2, 3) and same.sum() == 6
    for other in (torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 3)):
        found = as_maps([np.zeros((2, 3)), other])
        assert isinstance(found, list) and [each.shape for each in found] == [(2, 3), other.shape]


def test_details_without_boxes_hold_the_number_of_images():
    assert Report(None, None, None, None, None, 7).details() == {"n": 7}


@pytest.fixture
def made(monkeypatch):
    """The options with which a Fabric was made."""
    options = {}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "Fabric", lambda **given: options.update(given) or type("F", (), {"launch": int})())
    return options


@pytest.mark.parametrize("capability, precision", [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), (None, "32-true")])
def test_device_and_precision_follow_the_machine(monkeypatch, made, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    make_fabric()
    assert (made["accelerator"], made["precision"]) == ("cuda" if capability else "cpu", precision)
    make_fabric("cpu", "bf16-mixed")
    assert (made["accelerator"], made["precision"]) == ("cpu", "bf16-mixed")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (1, 1, "auto")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (2, 4, "ddp")),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, (4, 2, "ddp")),
        ({"SLURM_NTASKS": "4"}, (4, 1, "ddp")),
    ],
)
def test_processes_and_nodes(monkeypatch, made, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_fabric("cpu")
    assert (made["devices"], made["num_nodes"], made["strategy"]) == expected


RECIPE = Recipe(arch="small", feature_map=8, lr=0.02, epochs=2, batch_size=16)


def test_a_training_saves_every_so_many_steps_and_goes_on_from_there(monkeypatch, tmp_path):
    """Two epochs of three batches: after step 4 and after each epoch; stopped after step 4."""
    source, path, saved, save = MemorySource(make_split("train", 48, 1), "train"), tmp_path / "c.pt", [], train._save

    class Stop(Exception):
        pass

    def spy(path, run, epoch, step, *rest):
        save(path, run, epoch, step, *rest)
        saved.append((path.name, epoch, step))
        if saved == [("c.pt", 1, 0), ("c.pt", 1, 1)]:
            raise Stop

    monkeypatch.setattr(train, "_save", spy)
    straight = fit(RECIPE, source, 3, make_fabric("cpu"), checkpoint_every=4)
    assert not saved
    with pytest.raises(Stop):
        fit(RECIPE, source, 3, make_fabric("cpu"), path, checkpoint_every=4)
    content = read_checkpoint(path)
    assert set(content) == {"run", "epoch", "step", "rng", "model", "optimizer"} and len(content["rng"]) == 1
    resumed = fit(RECIPE, source, 3, make_fabric("cpu"), path, checkpoint_every=4)
    assert saved[2:] == [("c.pt", 2, 0)]
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_compiled_training_trains_the_network_itself(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    source = MemorySource(make_split("train", 48, 1), "train")
    network, plain = (fit(RECIPE, source, 3, make_fabric("cpu"), compile_model=each) for each in (True, False))
    assert len(compiled) == 1 and compiled[0] is network
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_optimizer_has_the_recipe_s_rates(monkeypatch):
    """Here the biases are what is new; the small network as such has no pretrained parts."""
    seen, sgd, build = [], train.SGD, train.build_network

    def build_network(*each):
        network = build(*each)
        network.is_new = lambda name: name.endswith("bias")
        return network

    monkeypatch.setattr(train, "build_network", build_network)
    monkeypatch.setattr(train, "SGD", lambda *each, **options: seen.append(sgd(*each, **options)) or seen[0])
    recipe = replace(RECIPE, epochs=0, lr=0.3, lr_classifier_ratio=7.0, momentum=0.8, weight_decay=0.02)
    network = fit(recipe, MemorySource(make_split("train", 48, 1), "train"), 3, make_fabric("cpu"))
    groups = seen[0].param_groups
    new = {id(p) for name, p in network.named_parameters() if network.is_new(name)}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates == {id(p): pytest.approx(2.1 if id(p) in new else 0.3) for p in network.parameters()} and new
    assert all((each["momentum"], each["weight_decay"], each["nesterov"]) == (0.8, 0.02, True) for each in groups)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"run": Path("/"), "epoch": 0}, tmp_path / "c.pt")  # unpickling calls a constructor
    with pytest.raises(ValueError, match="c.pt: not a readable checkpoint .*eights only load failed"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"contours": "x"}, "contours: expected 'all' or 'largest', got 'x'"),
        ({"box_convention": "x"}, "box_convention: expected 'reference' or 'exact', got 'x'"),
        ({"tau": 2.0}, r"tau: expected values in \[0, 1\), got 2.0"),
        ({"tau": -1.0}, r"tau: expected values in \[0, 1\), got -1.0"),
        ({"score_map": np.zeros((1, 4, 4))}, r"score_map: expected shape \(H, W\)"),
    ],
)
def test_boxes_at_no_threshold_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        boxes_at_threshold(**{"score_map": np.eye(4), "tau": 0.5} | wrong)


@pytest.mark.parametrize("tau", [1.5, -0.5])
def test_an_iou_at_no_threshold_is_refused(tau):
    with pytest.raises(ValueError, match="tau: expected values in"):
        best_iou_per_threshold(np.eye(4), np.array([[0, 0, 2, 2]]), np.array([0.5, tau]))


@pytest.mark.parametrize("value", [2.0, -0.1, float("nan")])
def test_maps_outside_their_range_are_not_stored(tmp_path, value):
    with pytest.raises(ValueError, match=r"maps: expected values in \[0, 1\] and no NaN"):
        ScoreMaps(tmp_path, "uint8").write(["a"], torch.full((1, 2, 2), value))


def test_pixels_are_named_all_or_not_at_all():
    maps, masks = torch.rand(4, 3, 3), torch.ones(4, 3, 3, dtype=torch.uint8)
    metric = PixelAP()
    with pytest.raises(ValueError, match="image_ids: expected 4 names, got 2"):
        metric.update(maps, masks, ["a", "b"])
    metric.update(maps, masks, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="names in all updates or in none"):
        metric.update(maps, masks)
    kept = PixelAP(keep_images=True)
    kept.update(maps, masks)
    plain = PixelAP()
    plain.update(maps, masks)
    with pytest.raises(ValueError, match="two states with images"):
        kept.merge(plain)
