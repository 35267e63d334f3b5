"""Losses, batches, processes and scores, each against what it must be by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from satrn import train
from satrn.charset import END, IGNORED
from satrn.data.streams import RenderedWords, normalise, seed_of
from satrn.decoding import beam_search, greedy
from satrn.evaluate import correct, evaluate_rotation, group_by_ratio, mcnemar, read_all
from satrn.models import SATRN
from satrn.positional import fixed_encoding
from satrn.rotation import draw_angles, rotate_words
from satrn.train import build_model, ctc_loss, fit, make_fabric, text_loss

FABRIC = make_fabric("cpu")


def test_ctc_of_a_batch_is_the_mean_of_its_words():
    torch.manual_seed(0)
    columns = torch.randn(3, 6, 5)
    words = torch.tensor([[2, 3, 0], [1, 0, IGNORED], [4, 4, 1]])  # 1, an unknown character, is a symbol as well
    alone = [ctc_loss(columns[i : i + 1], words[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(ctc_loss(columns, words), sum(alone) / 3)
    p = columns[1:2, :2].softmax(-1)[0]
    paths = p[0, 1] * p[1, 1] + p[0, 1] * p[1, 0] + p[0, 0] * p[1, 1]
    torch.testing.assert_close(ctc_loss(columns[1:2, :2], words[1:2]), -paths.log())


def test_the_auxiliary_loss_is_added_with_its_weight(small_settings):
    s = replace(small_settings, ctc_weight=0.3)
    model, data = build_model(s, 0, FABRIC).eval(), RenderedWords(s, 8, 0, FABRIC.device)
    images = normalise(data.images, s)
    encoded = model.encode(images)
    wanted = text_loss(model.decode(encoded, data.targets), data.targets)
    wanted = wanted + 0.3 * ctc_loss(model.ctc_logits(encoded), data.targets)
    torch.testing.assert_close(train._Losses(model, 0.3)(images, data.targets), wanted)


def test_only_real_words_are_rotated_and_each_rank_by_its_own_angles(small_settings):
    s = replace(small_settings, batch_size=4)
    images = RenderedWords(s, 4, 0, FABRIC.device).images
    real = replace(s, dataset="lmdb", rotation="normal")
    angles = draw_angles("normal", 4, torch.Generator().manual_seed(seed_of(3, 7)))
    ranks = SimpleNamespace(device=FABRIC.device, global_rank=1, world_size=2)
    turned = train._prepare(images[1::2], real, 3, 7, ranks)
    assert torch.equal(turned, normalise(rotate_words(images[1::2], angles[1::2]), s))
    assert not torch.equal(turned, train._prepare(images[1::2], real, 4, 7, ranks))
    for unchanged in (s, replace(real, rotation="none")):
        assert torch.equal(train._prepare(images, unchanged, 3, 7, FABRIC), normalise(images, s))


def test_each_seed_drops_other_units(small_settings):
    """The first loss depends on seed and step alone: the network and the words are the same."""
    model = build_model(replace(small_settings, dropout=0.5), 0, FABRIC)
    words = RenderedWords(small_settings, 8, 0, FABRIC.device)

    class Same:
        def identity(self):
            return {}

        def steps(self, s, seed, step, ranks):
            return iter([(words.images, words.targets)])

    losses = []
    for seed in (1, 2, 1):
        s = replace(small_settings, dropout=0.5, steps=1, batch_size=8)
        losses.append(fit(copy.deepcopy(model), Same(), s, seed, FABRIC)[-1]["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_points_of_the_curve_are_means_since_the_last_one(small_settings, monkeypatch):
    values = iter(range(1, 100))
    monkeypatch.setattr(train, "text_loss", lambda logits, targets: 0 * logits.sum() + next(values) / 3)
    s = replace(small_settings, steps=20)
    data = RenderedWords(s, 64, 0, FABRIC.device)
    curve = fit(build_model(s, 0, FABRIC), data, s, 0, FABRIC)
    means = [(2 * i + 1.5) / 3 for i in range(10)]
    assert curve == [{"step": 2 * i + 2, "loss": pytest.approx(means[i], abs=1e-5)} for i in range(10)]


def test_a_run_that_stops_between_two_points_continues_its_means(small_settings, tmp_path):
    s = replace(small_settings, steps=40, dropout=0.2)
    data = RenderedWords(s, 64, 0, FABRIC.device)
    whole = build_model(s, 0, FABRIC)
    curve = fit(whole, data, s, 0, FABRIC)

    def stop(step):
        if step == 11:
            raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "satrn.pt", "checkpoint_every": 5}
    with pytest.raises(KeyboardInterrupt):
        fit(build_model(s, 0, FABRIC), data, s, 0, FABRIC, before_step=stop, **options)
    again = build_model(s, 0, FABRIC)
    steps, points = [], []
    assert fit(again, data, s, 0, FABRIC, before_step=steps.append, on_point=points.append, **options) == curve
    assert steps[0] == 10 and points == curve[2:]  # step 10 is between the points of steps 8 and 12
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, (1, 1, "auto")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (4, 2, "ddp")),
        ({"WORLD_SIZE": "4"}, (4, 1, "ddp")),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3"}, (3, 2, "ddp")),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS": "9"}, (2, 1, "ddp")),
    ],
)
def test_processes_are_those_that_torchrun_or_slurm_started(monkeypatch, environment, wanted):
    asked = {}
    monkeypatch.setattr(train, "Fabric", lambda **words: asked.update(words) or SimpleNamespace(launch=lambda: None))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_fabric("cpu")
    assert (asked["devices"], asked["num_nodes"], asked["strategy"]) == wanted
    assert asked["accelerator"] == "cpu" and asked["precision"] == "32-true"


@pytest.mark.parametrize(
    "cuda, capability, wanted",
    [(False, (0, 0), ("cpu", "32-true")), (True, (8, 0), ("cuda", "bf16-mixed")), (True, (7, 5), ("cuda", "16-mixed"))],
)
def test_device_and_precision_by_themselves(monkeypatch, cuda, capability, wanted):
    asked = {}
    monkeypatch.setattr(train, "Fabric", lambda **words: asked.update(words) or SimpleNamespace(launch=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    make_fabric()
    assert (asked["accelerator"], asked["precision"]) == wanted
    make_fabric("cpu", "bf16-true")
    assert (asked["accelerator"], asked["precision"]) == ("cpu", "bf16-true")


class LeftOrRight(torch.nn.Module):
    """Reads on which side of the picture it is dark."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.weight = cfg, torch.nn.Parameter(torch.zeros(()))

    def generate(self, images):
        half = images.shape[3] // 2
        left = images[..., :half].mean(dim=(1, 2, 3)) < images[..., half:].mean(dim=(1, 2, 3))
        return SimpleNamespace(texts=["l" if dark else "r" for dark in left.tolist()])


class Halves:
    """Three pictures that are dark on the left, with one wrong label."""

    def batches(self, size):
        images = torch.full((3, 1, 16, 24), 200, dtype=torch.uint8)
        images[..., :12] = 20
        yield images, ["l", "L", "r"]


def test_words_are_rotated_before_they_are_read(tiny):
    model = LeftOrRight(tiny()).train()
    assert read_all(model, Halves()) == (["l"] * 3, ["l", "L", "r"]) and model.training
    assert correct(model, Halves()).tolist() == [True, True, False]
    assert correct(model, Halves(), degrees=180.0).tolist() == [False, False, True]
    assert evaluate_rotation(model, Halves(), (0, 180))["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_without_an_angle_the_pixels_reach_the_network_as_they_are(tiny, monkeypatch):
    model = SATRN(tiny())
    seen = []
    monkeypatch.setattr(
        model, "generate", lambda images: seen.append(images) or SimpleNamespace(texts=["l"] * len(images))
    )
    read_all(model, Halves())
    (pixels, _), *_ = Halves().batches(500)
    torch.testing.assert_close(torch.cat(seen), normalise(pixels, model.cfg), rtol=0, atol=0)


def test_mcnemar_is_the_exact_binomial_test():
    first, second = np.zeros(12, bool), np.zeros(12, bool)
    first[:9], second[9:10] = True, True
    # 9 against 1: twice the chance of at most one head in ten throws
    assert mcnemar(first, second) == {"only_first": 9, "only_second": 1, "p": pytest.approx(2 * 11 / 1024, rel=5e-3)}
    assert mcnemar(first, first) == {"only_first": 0, "only_second": 0, "p": 1.0}


def test_ratio_groups_have_the_figure_s_names():
    assert group_by_ratio([0.5, 0.6, 0.8, 0.9]) == {"r < 0.6": 1, "0.6 .. 0.8": 2, "r > 0.8": 1}


def test_without_an_encoding_nothing_is_added():
    assert torch.equal(fixed_encoding("none", 8, 3, 5, "halves", torch.device("cpu")), torch.zeros(8, 3, 5))
    assert fixed_encoding("1d", 8, 3, 5, "halves", torch.device("meta")).device.type == "meta"


def test_reading_caches_unless_told_otherwise(tiny, monkeypatch):
    model = SATRN(tiny()).eval()
    encoded = model.encode(torch.rand(2, 1, 16, 24) - 0.5)
    monkeypatch.setattr(model.decoder, "forward", lambda *_: pytest.fail("ran on all earlier characters again"))
    assert len(greedy(model.decoder, encoded, 5)[0]) == 2


def test_beams_hold_class_numbers_of_likely_words(tiny):
    torch.manual_seed(0)
    model = SATRN(tiny()).eval()
    encoded = model.encode(torch.rand(2, 1, 16, 24) - 0.5)
    ids, probabilities = beam_search(model.decoder, encoded, 5, 3)
    assert ids.dtype == torch.long and ((ids >= END) & (ids < model.cfg.classes)).all()
    assert ((probabilities > 0) & (probabilities <= 1)).all()
