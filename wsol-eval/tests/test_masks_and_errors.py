"""Masks as OpenCV loads them, boxes in crops, kinds of errors, images as they are annotated."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import wsol_eval
from wsol_eval.boxes import crop_boxes
from wsol_eval.data import load_mask, read_annotated, to_input
from wsol_eval.errors import breakdown, kind_of


def test_masks_of_every_size_are_resized_as_opencv_does(tmp_path):
    rng = np.random.default_rng(0)
    sides = [1, 3, 223, 225, 300, 400, 576, 683, 1024, 1200, 1600, *rng.integers(2, 3000, 25)]
    for height, width in [*((side, 5) for side in sides), *((5, side) for side in sides)]:  # rows and columns apart
        mask = np.where(rng.random((height, width)) < 0.5, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "mask.png")
        loaded = cv2.imread(str(tmp_path / "mask.png"), cv2.IMREAD_GRAYSCALE).astype(np.float32)
        wanted = cv2.resize(loaded, (224, 224), interpolation=cv2.INTER_NEAREST) > 0.5
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), wanted, err_msg=f"{height} x {width}")


def test_channels_are_normalised_in_the_order_red_green_blue():
    """The planted fault: OpenCV's order of channels with torchvision's means."""
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    wanted = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(to_input(red), wanted[:, None, None].expand(3, 2, 2))


def test_boxes_of_the_centre_crop():
    """500 x 400 becomes 320 x 256; the middle 224 x 224 begins at 48, 16."""
    assert crop_boxes(np.array([[100, 50, 300, 200]]), (500, 400)).tolist() == [[16, 16, 144, 112]]
    assert crop_boxes(np.array([[0, 0, 499, 399], [0, 0, 20, 399]]), (500, 400)).tolist() == [[0, 0, 223, 223]]
    assert crop_boxes(np.array([[0, 0, 20, 20]]), (500, 400)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    "box,kind",
    [
        ([10, 10, 49, 49], "right"),
        ([12, 12, 20, 20], "part"),
        ([0, 0, 99, 60], "more"),
        ([0, 0, 210, 99], "multi_instance"),
        ([60, 60, 90, 90], "background"),
    ],
)
def test_kinds_of_errors(box, kind):
    truth = np.array([[10, 10, 49, 49], [150, 10, 199, 59]])
    assert kind_of(np.array(box), truth) == kind
    score_map = np.zeros((224, 224))
    score_map[box[1] : box[3] + 1, box[0] : box[2] + 1] = 1
    assert breakdown([(score_map, truth)], 0.5, "exact")[kind] == 100


def test_an_image_is_turned_unless_its_annotations_mean_the_stored_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:20] = 250
    Image.fromarray(stored).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    viewed = read_annotated(tmp_path / "turned.jpg", None)
    assert viewed.size == (40, 60) == read_annotated(tmp_path / "turned.jpg", (40, 60)).size
    meant = np.asarray(read_annotated(tmp_path / "turned.jpg", (60, 40)))
    assert np.abs(meant.astype(int) - stored).mean() < 5


def test_every_public_name_can_be_used():
    for name in wsol_eval.__all__:
        assert callable(getattr(wsol_eval, name)), name
