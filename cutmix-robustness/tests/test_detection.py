"""Training and measuring a detector: its steps by hand on one with a single weight, and the sizes of the real ones."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from cutmix_robustness import detection
from cutmix_robustness.data.sources import index_batches
from cutmix_robustness.networks import resnet_imagenet
from cutmix_robustness.settings import Settings
from cutmix_robustness.train import make_fabric

FABRIC = make_fabric("cpu")


class Pictures(Dataset):
    """Five grey pictures; picture i has the value i, and one object of class 1 + i % 2."""

    epoch = -1

    def __init__(self):
        self.epochs = []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.epochs.append(self.epoch)
        target = {
            "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0 + index]]),
            "labels": torch.tensor([1 + index % 2]),
            "difficult": torch.tensor([False]),
        }
        return torch.full((3, 8, 8), float(index)), target


class OneWeight(nn.Module):
    """Losses whose gradient is 3 + 1 in its weight; it notes which pictures and boxes it is given."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.tensor(1.0)), nn.BatchNorm2d(3)
        self.seen, self.drawn, self.stop_after = [], [], stop_after

    def forward(self, images, targets=None):
        if targets is None:
            return self.find(images)
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        assert self.training
        self.norm(torch.stack(images))
        values = [int(image[0, 0, 0]) for image in images]
        self.seen.append(values)
        self.drawn.append(torch.rand(()).item())  # as torchvision's detectors sample anchors
        assert [target["boxes"][0, 3].item() - 4 for target in targets] == values
        assert [target["labels"].item() for target in targets] == [1 + value % 2 for value in values]
        return {"box": 3 * self.weight, "class": self.weight}

    def find(self, images):
        """The right box for all, and the right class but for picture 1, which is taken for class 1."""
        assert not self.training and not torch.is_grad_enabled()
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0 + image[0, 0, 0]]]),
                "labels": torch.tensor([1 if image[0, 0, 0] == 1 else 1 + int(image[0, 0, 0]) % 2]),
                "scores": torch.tensor([0.5]),
            }
            for image in images
        ]


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    monkeypatch.setattr(detection, "_workers", lambda: 0)


def settings(**changes):
    chosen = {"steps": 5, "batch_size": 2, "lr": 0.1, "weight_decay": 0.5, "milestones": (2, 4)}
    return Settings(task="detection", **chosen | changes)


def fit(detector, path, data=None, every=1, seed=3, **changes):
    detection.fit_detector(detector, settings(**changes), data or Pictures(), seed, FABRIC, path, every)


def test_five_steps_by_hand(tmp_path):
    """Momentum 0.9 and weight decay; the rate falls to a tenth at step 2 and again at step 4."""
    detector, data = OneWeight(), Pictures()
    fit(detector, tmp_path / "c.pt", data)
    weight, velocity = 1.0, 0.0
    for rate in (0.1, 0.1, 0.01, 0.01, 0.001):
        velocity = 0.9 * velocity + 4 + 0.5 * weight
        weight -= rate * velocity
    assert detector.weight.item() == pytest.approx(weight, rel=1e-6)
    assert detector.norm.num_batches_tracked == 0  # batch norm keeps its statistics
    batches = [batch.tolist() for epoch in (0, 1, 2) for batch in index_batches(5, 2, 3, epoch)]
    assert detector.seen == batches[:5] and data.epochs == [0] * 4 + [1] * 4 + [2] * 2


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_training_goes_on_with_the_next_batch(tmp_path, stop):
    whole, first, second = OneWeight(), OneWeight(stop), OneWeight()
    fit(whole, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        fit(first, tmp_path / "c.pt")
    data = Pictures()
    fit(second, tmp_path / "c.pt", data)
    assert second.weight.item() == whole.weight.item() and first.seen + second.seen == whole.seen
    assert first.drawn + second.drawn == whole.drawn and len(set(whole.drawn)) == 5
    assert data.epochs[0] == stop // 2


def test_the_checkpoint_is_written_at_intervals_and_at_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(OneWeight(3), tmp_path / "c.pt", every=2)
    assert torch.load(tmp_path / "c.pt")["step"] == 2
    done = OneWeight()
    fit(done, tmp_path / "c.pt", every=2)
    assert torch.load(tmp_path / "c.pt")["step"] == 5 and len(done.seen) == 3
    again = OneWeight()
    fit(again, tmp_path / "c.pt", every=2)
    assert again.weight.item() == done.weight.item() and not again.seen


@pytest.mark.parametrize("changes", [{"seed": 4}, {"lr": 0.2}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes):
    fit(OneWeight(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: checkpoint of another run"):
        fit(OneWeight(), tmp_path / "c.pt", **changes)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    detector = OneWeight()
    detector.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="step 0: the loss is NaN or infinite"):
        fit(detector, tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()


def test_the_mean_over_classes_by_hand():
    """Class 1 (pictures 0, 2, 4): all found, one false alarm among them; class 2 (1, 3): half of it.

    All scores are equal: the detections count in the order of the pictures. Class 1: right, wrong, right, right gives
    the precisions 1, 1/2, 2/3 and 3/4 at recalls 1/3, 1/3, 2/3 and 1, so 4 of 11 recalls have 1 and 7 have 3/4.
    Class 2: picture 3 alone, recall 1/2: 6 of 11 recalls have 1.
    """
    expected = 100 * ((4 + 7 * 0.75) / 11 + 6 / 11) / 2
    assert detection.measure(OneWeight(), Pictures(), FABRIC) == pytest.approx(expected)


def test_ssd_sees_six_maps_of_300_pixels():
    detector = detection.build_detector("ssd", resnet_imagenet("resnet50")).eval()
    with torch.no_grad():
        maps = detector.backbone(torch.zeros(1, 3, 300, 300))
    assert [tuple(each.shape[1:]) for each in maps.values()] == [
        (512, 38, 38), (1024, 19, 19), (512, 10, 10), (256, 5, 5), (256, 3, 3), (256, 1, 1)
    ]  # fmt: skip
    anchors = detector.anchor_generator.num_anchors_per_location()
    assert sum(n * each.shape[-1] ** 2 for n, each in zip(anchors, maps.values(), strict=True)) == 8732  # SSD300's
    assert detector.head.classification_head.num_columns == 21
    generator = detector.anchor_generator
    assert generator.scales == [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    assert generator.steps == [8, 16, 32, 64, 100, 300] and detector.transform.min_size == (300,)


@pytest.mark.parametrize("side", [None, 64])
def test_faster_rcnn_has_a_pyramid_on_the_four_layers(side):
    resnet = resnet_imagenet("resnet50")
    detector = detection.build_detector(
        "faster-rcnn", resnet, *[] if side is None else [side], box_detections_per_img=7
    )
    with torch.no_grad():
        maps = detector.eval().backbone(torch.zeros(1, 3, 64, 96))
    sizes = [tuple(each.shape[1:]) for each in maps.values()]
    assert sizes == [(256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2)]
    assert detector.transform.min_size == (side or 600,) and detector.transform.max_size == 1000
    assert detector.roi_heads.detections_per_img == 7
    assert detector.roi_heads.box_predictor.cls_score.out_features == 21
    weight = detector.backbone.body.layer4[0].conv1.weight
    np.testing.assert_array_equal(weight.detach().numpy(), resnet.layer4[0].conv1.weight.detach().numpy())
