"""Training: the schedule, every method, kill and resume, two processes."""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from resumable import plain_block

from wsol_eval import train
from wsol_eval.cutouts import make_split
from wsol_eval.evaluate import Evaluator, evaluate
from wsol_eval.methods.cutmix import mix
from wsol_eval.methods.has import hide_patches
from wsol_eval.models import METHODS, build_model, small
from wsol_eval.models.heads import FslHead, SpgHead
from wsol_eval.recipe import Recipe
from wsol_eval.sources import MemorySource
from wsol_eval.train import Diverged, fit, load_trained, make_fabric

HERE = Path(__file__).parent
RECIPE = Recipe(arch="small", feature_map=8, lr=0.02, epochs=2, lr_decay_frequency=2, batch_size=16)


@pytest.fixture(scope="module")
def fabric():
    torch.set_num_threads(1)
    return make_fabric("cpu")


@pytest.fixture(scope="module")
def digits():
    return {name: MemorySource(make_split(name, 48, 1), name) for name in ("train", "val", "test")}


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_learning_rate_falls_at_the_start_of_every_third_epoch():
    rates = [replace(RECIPE, lr_decay_frequency=3).learning_rate(epoch) for epoch in range(7)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("method", "size"), [("cam", 4), *((method, 8) for method in METHODS)])
def test_every_method_trains_and_draws_maps(digits, fabric, method, size):
    recipe = replace(RECIPE, method=method, feature_map=size, has_grid_size=8)
    network = fit(recipe, digits["train"], 0, fabric)
    torch.manual_seed(0)
    start = build_model("small", method, 10, size)
    assert not torch.equal(weights(network), weights(start)) and torch.isfinite(weights(network)).all()
    logits, maps = network.predict(digits["test"].images.images, digits["test"].images.labels)
    assert maps.shape == (48, size, size) and maps.std((1, 2)).min() > 0
    assert logits.shape == ((48, 1, size, size) if method == "fsl" else (48, 10))
    report = evaluate(network, digits["test"], fabric, 0.05)
    assert report.n == 48 and report.pixels.n == 48
    assert (report.top1_accuracy is None) == (method == "fsl")


def test_a_split_without_boxes_and_masks_is_refused_before_anything_is_computed(digits):
    bare = copy.copy(digits["test"])
    bare.has_boxes = bare.has_masks = False
    with pytest.raises(ValueError, match="neither boxes nor masks"):
        Evaluator(bare)


def test_map_of_a_linear_head_is_the_mean_of_weighted_features(digits):
    network = build_model("vgg16", "cam", 8, 14).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([3, 5])
    outputs = network(images)
    for i, label in enumerate(labels):
        slow = (network.head.fc.weight[label][:, None, None] * outputs["features"][i]).mean(0)
        torch.testing.assert_close(network.score_map(images, labels)[i], slow)


def test_maps_follow_the_given_class_not_the_predicted_one(digits):
    network = build_model("small", "cam", 10, 8).eval()
    images = digits["test"].images.images[:4]
    one, other = (network.score_map(images, torch.full((4,), label)) for label in (0, 1))
    assert not torch.equal(one, other)


def test_evaluation_takes_the_given_class_and_float32(digits, monkeypatch):
    network, seen = build_model("small", "cam", 10, 8).eval(), []
    half = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    monkeypatch.setattr(network.head, "score_map", lambda o, labels: seen.append(labels) or o["maps"][:, 0])
    evaluate(network, digits["test"], half, 0.1)
    assert torch.equal(torch.cat(seen), digits["test"].images.labels)
    monkeypatch.undo()
    whole = Fabric(accelerator="cpu", devices=1)
    assert (
        evaluate(network, digits["test"], half, 0.1).metrics()
        == evaluate(network, digits["test"], whole, 0.1).metrics()
    )


def test_heads_of_spg_are_fed_by_their_own_depth_and_drop_once():
    head = SpgHead((4, 4, 4), 3, ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1)), 4, 4, dropout=0.5).train()
    low, middle, top = (torch.rand(2, 4, 6, 6) for _ in range(3))
    torch.manual_seed(0)
    base = head((low, middle, top), None)
    torch.manual_seed(0)
    other = head((low + 1, middle, top), None)
    assert not torch.equal(base["logits_b1"], other["logits_b1"]) and torch.equal(base["logits_b2"], other["logits_b2"])
    torch.manual_seed(0)
    other = head((low, middle + 1, top), None)
    assert torch.equal(base["logits_b1"], other["logits_b1"]) and not torch.equal(base["logits_b2"], other["logits_b2"])
    torch.manual_seed(0)
    dropped = head.dropout(top)
    torch.testing.assert_close(base["maps"], head.classifier(dropped))
    torch.testing.assert_close(base["logits_c"], head.c(dropped))


def test_fsl_is_taught_the_share_of_each_cell():
    head = FslHead(1)
    logits = torch.tensor([[[[0.3, -1.0]]]])
    target = torch.zeros(1, 2, 4)
    target[0, :, :2] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # a quarter of the first cell
    target[0, 0, 2], target[0, 1, 2:] = 1.0, 255.0  # one of the two counted pixels of the second
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[0, 0, 0], torch.tensor([0.25, 0.5]), reduction="none"
    )
    wanted = (losses[0] * 1.0 + losses[1] * 0.5) / 1.5
    torch.testing.assert_close(head.loss({"logits": logits}, target), wanted)


def test_hidden_patches_are_squares_of_the_grid():
    torch.manual_seed(0)
    hidden = hide_patches(torch.ones(400, 3, 20, 24), 8, 0.3)
    blocks = hidden[:, :, :16].reshape(400, 3, 2, 8, 3, 8)
    assert ((blocks == 0).all((3, 5)) | (blocks == 1).all((3, 5))).all()
    assert (hidden[:, 0] == hidden[:, 1]).all() and abs((blocks == 0).float().mean() - 0.3) < 0.03


def test_mixed_images_and_their_share():
    rng, images = np.random.RandomState(0), torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    for _ in range(20):
        mixed, others, share = mix(images, torch.arange(8), 1.0, 1.0, rng)
        pasted = (mixed == others.float().reshape(8, 1, 1, 1)) & (mixed != images)
        moved = others != torch.arange(8)
        assert torch.allclose(pasted[moved].float().mean((1, 2, 3)), torch.tensor(1 - share))
    assert mix(images, torch.arange(8), 1.0, 0.0, rng)[2] == 1.0


def test_the_loss_of_a_mix_has_the_shares_of_its_labels(monkeypatch):
    labels, others, logits = torch.tensor([0, 1]), torch.tensor([2, 2]), torch.randn(2, 3)
    monkeypatch.setattr(train, "mix", lambda images, *_: (images, others, 0.75))
    network = SimpleNamespace(loss=lambda outputs, labels: torch.nn.functional.cross_entropy(outputs, labels))
    found = train._loss(replace(RECIPE, method="cutmix"), lambda *_: logits, network, torch.zeros(2, 3, 4, 4), labels)
    torch.testing.assert_close(found, 0.75 * network.loss(logits, labels) + 0.25 * network.loss(logits, others))


def test_diverging_is_an_error_of_its_own(digits, fabric):
    with pytest.raises(Diverged, match="epoch 1: the loss is nan"):
        fit(replace(RECIPE, lr=1e30), digits["train"], 0, fabric)


def run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=HERE, env=environment
    )  # fmt: skip


def test_killed_training_ends_bit_equal(digits, fabric, tmp_path):
    recipe = replace(RECIPE, method="cutmix")
    straight = fit(recipe, digits["train"], 3, fabric)
    assert run("resumable.py", "fit", tmp_path, 3).returncode == -signal.SIGKILL  # after a save within epoch 2
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * recipe.lr)  # it fell with epoch 2
    resumed = fit(recipe, digits["train"], 3, fabric, tmp_path / "model.pt", checkpoint_every=2)
    assert torch.equal(weights(resumed), weights(straight))
    loaded, found = load_trained(tmp_path / "model.pt", 10)
    assert torch.equal(weights(loaded), weights(straight)) and found == recipe


def test_checkpoints_that_do_not_fit_are_refused(digits, fabric, tmp_path):
    path = tmp_path / "model.pt"
    fit(replace(RECIPE, epochs=1), digits["train"], 0, fabric, path)
    with pytest.raises(ValueError, match=r"model\.pt: checkpoint of another run \(other epochs\)"):
        fit(RECIPE, digits["train"], 0, fabric, path)
    with pytest.raises(ValueError, match="expected a checkpoint of 9 classes"):
        load_trained(path, 9)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"model\.pt: not a readable checkpoint"):
        load_trained(path, 10)
    with pytest.raises(FileNotFoundError):
        load_trained(tmp_path / "none.pt", 8)


def test_two_processes_train_and_measure_as_one(digits, fabric, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "block", plain_block)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)  # a free port
    done = run(*words, "two_ranks.py", tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert found["equal"] and found["n"] == 31
    alone = fit(RECIPE, digits["train"], 3, fabric)
    # two halves add up in another order, and the steps of a training magnify that
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), weights(alone), atol=2e-4, rtol=1e-3)
    report = evaluate(alone, MemorySource(make_split("test", 31, 1)), fabric, 0.05)
    assert report.metrics()["max_box_acc_v2"] == pytest.approx(found["metrics"]["max_box_acc_v2"], abs=4)


@pytest.mark.parametrize("arch", ["vgg16", "resnet50", "inception_v3"])
@pytest.mark.parametrize("method", ["cam", "spg"])
def test_pretrained_weights_of_torchvision_fit(arch, method, tmp_path):
    import torchvision

    with torch.device("meta"):
        options = {"init_weights": False} if arch == "inception_v3" else {}
        theirs = getattr(torchvision.models, arch)(weights=None, **options).state_dict()
    state = {name: torch.tensor(0.5).to(value.dtype).expand(value.shape) for name, value in theirs.items()}
    torch.save(state, tmp_path / "weights.pth")
    network = build_model(arch, method, 5, 28, pretrained=tmp_path / "weights.pth")
    filled = sum((p == 0.5).all().item() for p in network.parameters())
    wanted = {"vgg16": 26, "resnet50": 159, "inception_v3": 210}[arch]
    assert filled == wanted
    if method == "spg":
        return
    with pytest.raises(ValueError, match=f"not weights of {arch}"):
        torch.save({"a": torch.ones(1)}, tmp_path / "weights.pth")
        build_model(arch, method, 5, 28, pretrained=tmp_path / "weights.pth")


def test_unknown_names_are_refused():
    for options in (("vgg19", "cam"), ("vgg16", "gradcam")):
        with pytest.raises(ValueError, match="expected"):
            build_model(*options, 10)
    with pytest.raises(ValueError, match="feature_map: expected one of 14, 28"):
        build_model("vgg16", "cam", 10, 7)
    with pytest.raises(ValueError, match="hyperparameter"):
        build_model("vgg16", "cam", 10, 14, erase=0.5)
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_model("vgg16", "cam", 10, 14, pretrained="none.pth")
