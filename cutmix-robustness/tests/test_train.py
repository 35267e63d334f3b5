"""Training: every recipe, kill and resume, two processes, checkpoints."""

import copy
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cutmix_robustness import train
from cutmix_robustness.attacks import fgsm
from cutmix_robustness.data.benchmark import open_benchmark
from cutmix_robustness.data.ood import noise_sets
from cutmix_robustness.data.sources import ResidentImages, crop_and_flip, index_batches
from cutmix_robustness.data.twowave import MEAN, STD, twowave
from cutmix_robustness.draws import generator_for
from cutmix_robustness.experiments import build_classifier, evaluate_checkpoint, train_and_evaluate
from cutmix_robustness.networks import Classifier, SmallNet
from cutmix_robustness.recipe import Recipe
from cutmix_robustness.settings import PRESETS, Settings
from cutmix_robustness.train import fit, load_checkpoint, make_fabric

FABRIC = make_fabric("cpu")
SHORT = replace(PRESETS["twowave"], epochs=2, eval_every=1, suites=("clean",))


def trained(settings, seed=1, **options):
    benchmark = open_benchmark(settings, seed, None)
    model = build_classifier(settings, benchmark, seed)
    curve = fit(model, settings, benchmark.train, seed, FABRIC, **options)
    return model, curve


RECIPES = {
    "baseline": {},
    "cutmix": {"mix": "cutmix", "mode": "sample"},
    "mixup": {"mix": "mixup"},
    "both": {"mix": "mixup+cutmix"},
    "manifold mixup": {"mix": "manifold-mixup"},
    "feature cutmix": {"mix": "feature-cutmix", "mix_point": 2},
    "cutout, mixup, smoothing": {"cutout": 8, "mix": "mixup", "label_smoothing": 0.1},
    "stochdepth": {"branch": "stochdepth"},
    "shakedrop, cutmix": {"branch": "shakedrop", "mix": "cutmix", "branch_rate": 0.5},
    "dropblock": {"branch": "dropblock", "branch_rate": 0.1},
    "adversarial": {"adversarial": "training", "optimizer": "adam", "lr": 1e-3, "label_smoothing": 0.1},
    "logit pairing": {"adversarial": "logit-pairing", "optimizer": "adam", "lr": 1e-3},
    "noise": {"gaussian_noise": True},
    "scheduled": {"mix": "cutmix", "variant": "scheduled"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_and_repeats(name):
    settings = replace(SHORT, **RECIPES[name])
    model, curve = trained(settings)
    again, same = trained(settings)
    assert curve == same and len(curve) == 2 and curve[1]["loss"] < curve[0]["loss"]
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_outliers_flatten_the_prediction():
    settings = replace(SHORT, outliers="uniform", epochs=15, milestones=())
    noise = noise_sets(200, 16, 1, "cpu")["uniform"]
    model, _ = trained(settings, outliers=noise)
    plain, _ = trained(replace(settings, outliers="none"))
    fresh = noise_sets(200, 16, 9, "cpu")["uniform"].images.float() / 255
    confidence = [torch.softmax(each.eval()(fresh), 1).amax(1).mean().item() for each in (model, plain)]
    assert confidence[0] < confidence[1] - 0.1, confidence


def recipe(model, **changes):
    return Recipe(replace(SHORT, **changes), model, model)


@pytest.mark.parametrize("name", RECIPES)
def test_only_a_step_without_draws_is_replayed_on_cuda(name):
    model = Classifier(SmallNet(15), MEAN, STD)
    settings = replace(SHORT, **RECIPES[name])
    drawn = settings.branch != "none" or "manifold" in settings.mix or "feature" in settings.mix
    more = settings.adversarial != "none" or settings.outliers != "none"
    assert Recipe(settings, model, model).graphed == (not drawn and not more)


def test_losses_by_hand():
    torch.manual_seed(0)
    model = Classifier(SmallNet(15), MEAN, STD)
    data = twowave(20, 3)
    images, labels = data.images.float() / 255, data.labels
    model.train()
    plain, statistics = recipe(model).loss(data.images, labels, (0, 0, 0))
    assert plain.item() == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)
    predicted = model(images).argmax(1)
    assert statistics["mixed_accuracy"].item() == pytest.approx(100 * (predicted == labels).float().mean().item())
    for adversarial, weight in (("training", 0.0), ("logit-pairing", 0.5)):
        twin = copy.deepcopy(model)  # running statistics change with every pass, and the attack reads them
        attacked = fgsm(twin.eval(), images, labels)
        logits, beside = twin.train()(torch.cat([images, attacked])).split(20)
        expected = (F.cross_entropy(logits, labels) + F.cross_entropy(beside, labels)) / 2
        expected = expected + weight * (logits - beside).square().mean()
        loss, _ = recipe(copy.deepcopy(model), adversarial=adversarial).loss(data.images, labels, (0, 0, 0))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert model.training


def test_the_learning_rate_falls_with_the_first_step_of_a_milestone(monkeypatch):
    optimizers, rates = [], []
    real = train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", lambda *words: optimizers.append(real(*words)) or optimizers[0])
    settings = replace(SHORT, epochs=4, batch_size=250, milestones=(1, 3), lr=0.2)
    trained(settings, before_step=lambda step: rates.append(optimizers[0].param_groups[0]["lr"]))
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.02, 0.02, 0.002, 0.002])


def test_scheduled_cutmix_rises_from_0_in_the_first_epoch_to_1_in_the_last(monkeypatch):
    shares, real = [], Recipe.loss

    def loss(self, images, labels, draw, progress, share):
        shares.append(progress)
        return real(self, images, labels, draw, progress, share)

    monkeypatch.setattr(Recipe, "loss", loss)
    trained(replace(SHORT, epochs=3, batch_size=250))
    assert shares == [0, 0, 0.5, 0.5, 1, 1]


def test_sgd_has_nesterov_s_momentum():
    network = torch.nn.Module()
    network.fc = torch.nn.Linear(1, 1, bias=False)
    model = Classifier(network, (0.5,), (0.5,))
    optimizer = train.build_optimizer(replace(SHORT, lr=0.1, weight_decay=0.0), model)
    steps = [network.fc.weight.item()]
    for _ in range(2):
        network.fc.weight.grad = torch.ones(1, 1)
        optimizer.step()
        steps.append(network.fc.weight.item())
    moved = [(a - b) / 0.1 for a, b in zip(steps, steps[1:], strict=False)]
    assert moved == pytest.approx([1 + 0.9, 1 + 0.9 * 1.9], abs=1e-5)  # plain momentum: 1, 1.9


def test_noise_has_the_benchmark_s_strengths():
    model = Classifier(SmallNet(15), MEAN, STD)
    grey = torch.full((4000, 3, 4, 4), 0.5)
    noisy = recipe(model, gaussian_noise=True)._add_noise(grey)
    sigma = (noisy - 0.5).flatten(1).std(1)
    assert 0.03 < sigma.quantile(0.1) < 0.05 and 0.08 < sigma.quantile(0.9) < 0.11


TRAINING = """
import sys, time
from dataclasses import replace
from pathlib import Path
import torch
from cutmix_robustness.data.benchmark import open_benchmark
from cutmix_robustness.experiments import build_classifier
from cutmix_robustness.settings import PRESETS
from cutmix_robustness.train import fit, make_fabric
torch.set_num_threads(1)
settings = replace(PRESETS["twowave"], epochs=8, mix="cutmix", mode="sample", branch="shakedrop", prob=0.7)
benchmark = open_benchmark(settings, 1, None)
model = build_classifier(settings, benchmark, 1)
slow = lambda step: time.sleep(0.05) if sys.argv[2] == "slow" else None
curve = fit(model, settings, benchmark.train, 1, make_fabric("cpu"), checkpoint=Path(sys.argv[1]), checkpoint_every=5,
            before_step=slow)
torch.save({"weights": model.state_dict(), "curve": curve}, sys.argv[1] + ".done")
"""


def run_here(script, monkeypatch, *words):
    """A script in this process: another one would first spend seconds on its imports."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    runpy.run_path(str(script))


def test_sigkill_and_continue_is_bit_equal(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    run_here(script, monkeypatch, tmp_path / "whole", "fast")
    child = subprocess.Popen([sys.executable, script, tmp_path / "killed", "slow"])
    while not (tmp_path / "killed").exists():
        time.sleep(0.02)
        assert child.poll() is None
    time.sleep(1.0)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = load_checkpoint(tmp_path / "killed")["state"]["total"]
    assert 0 < reached < 8 * 7
    run_here(script, monkeypatch, tmp_path / "killed", "fast")
    whole, killed = (torch.load(tmp_path / f"{name}.done", weights_only=True) for name in ("whole", "killed"))
    assert whole["curve"] == killed["curve"]
    assert all(torch.equal(whole["weights"][name], killed["weights"][name]) for name in whole["weights"])


DISTRIBUTED = """
import sys
from dataclasses import replace
import torch
from cutmix_robustness.data.benchmark import open_benchmark
from cutmix_robustness.data.twowave import MEAN, STD, twowave
from cutmix_robustness.evaluation import Evaluator
from cutmix_robustness.networks import Classifier
from cutmix_robustness.settings import PRESETS
from cutmix_robustness.train import fit, make_fabric
torch.set_num_threads(1)
fabric = make_fabric("cpu")
settings = replace(PRESETS["twowave"], epochs=3, mix="cutmix", mode="sample", cutout=4)
benchmark = open_benchmark(settings, 1, None)
torch.manual_seed(0)
class Linear(torch.nn.Module):  # no batch norm, whose statistics are per process
    points = ()
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(768, 15)
    def forward(self, x):
        return self.fc(x.flatten(1))
model = Classifier(Linear(), MEAN, STD)
curve = fit(model, settings, benchmark.train, 1, fabric)
evaluator = Evaluator(model, benchmark, fabric, (3,), 600)
found = evaluator.run(("clean", "occlusion", "fgsm", "ood", "in_between"))
if fabric.global_rank == 0:
    weight = model.network.fc.weight.detach()
    torch.save({"weight": weight, "metrics": found.metrics, "loss": curve[-1]["loss"]}, sys.argv[1])
"""


def test_two_ranks_train_and_evaluate_like_one(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    run_here(script, monkeypatch, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, tmp_path / "two"], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two["weight"], one["weight"], rtol=1e-4, atol=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=0.35), name


def test_batches_depend_on_seed_and_epoch_alone():
    first, again = index_batches(100, 8, 3, 1), index_batches(100, 8, 3, 1)
    assert len(first) == 12 and all(map(torch.equal, first, again)) and len(torch.cat(first).unique()) == 96
    assert not torch.equal(first[0], index_batches(100, 8, 3, 2)[0])
    with pytest.raises(ValueError, match="7 training images do not fill a batch of 8"):
        index_batches(7, 8, 0, 0)
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        fabric = type("Fabric", (), {"global_rank": 0, "world_size": 3})()
        fit(Classifier(SmallNet(), MEAN, STD), replace(SHORT, batch_size=64), twowave(64, 0), 0, fabric)


def test_a_resumed_epoch_has_the_same_augmentation():
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    data = ResidentImages(images, torch.arange(40), "x", "crop-flip")
    whole = list(data.train_batches(8, 1, 2, 0, 0, 1))
    resumed = list(data.train_batches(8, 1, 2, 3, 0, 1))
    assert [number for number, *_ in resumed] == [3, 4]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole[3:], resumed, strict=True))


def test_crops_and_flips_are_those_of_the_padded_image():
    images = torch.randint(1, 256, (300, 3, 8, 10), dtype=torch.uint8)
    out = crop_and_flip(images, generator_for(0))
    padded = F.pad(images, [4] * 4)
    flips, places = 0, set()
    for image, each in zip(padded, out, strict=True):
        crops = image.unfold(1, 8, 1).unfold(2, 10, 1)  # (3, 9, 9, 8, 10)
        plain = (crops == each[:, None, None]).all(-1).all(-1).all(0)
        mirrored = (crops.flip(-1) == each[:, None, None]).all(-1).all(-1).all(0)
        assert (plain | mirrored).any()
        flips += bool(mirrored.any())
        places.add(tuple((plain | mirrored).nonzero()[0].tolist()))
    assert 110 < flips < 190 and len(places) > 60


def test_a_checkpoint_of_another_run_or_damaged_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    trained(SHORT, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different mix, seed, data\)"):
        trained(replace(SHORT, mix="cutmix"), seed=2, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="checkpoint not found"):
        load_checkpoint(tmp_path / "none.pt")


def test_eval_repeats_what_train_measured(tmp_path):
    settings = replace(SHORT, suites=("clean", "fgsm", "calibration"))
    benchmark = open_benchmark(settings, 1, None)
    _, outcome = train_and_evaluate(settings, 1, benchmark, None, FABRIC, tmp_path / "c.pt")
    again = evaluate_checkpoint(tmp_path / "c.pt", None, "cpu", ())
    assert again == {name: outcome.metrics[name] for name in again} and len(again) > 10
    assert outcome.metrics["best_top1_error"] <= outcome.metrics["top1_error"]
    assert list(evaluate_checkpoint(tmp_path / "c.pt", None, "cpu", ("ood",)))[0] == "uniform_auroc"


def test_held_out_images_choose_an_epoch(tmp_path):
    settings = replace(SHORT, epochs=4, validation_images=75, lr=0.3)
    benchmark, whole = (open_benchmark(each, 1, None) for each in (settings, SHORT))
    held_out = benchmark.validation
    assert len(benchmark.train) == 425 and held_out.labels.bincount().min() >= 3
    together = torch.cat([benchmark.train.index, held_out.index])
    assert together.sort().values.tolist() == list(range(500))
    assert torch.equal(held_out.images, whole.train.images[held_out.index])
    _, outcome = train_and_evaluate(settings, 1, benchmark, None, FABRIC, tmp_path / "c.pt")
    curve = load_checkpoint(tmp_path / "c.pt")["state"]["curve"]
    chosen = min(curve, key=lambda point: point["validation_error"])
    assert outcome.metrics["validated_top1_error"] == chosen["test_error"] >= outcome.metrics["best_top1_error"]
    assert outcome.details["validated_epoch"] == chosen["epoch"]
    kept = evaluate_checkpoint(tmp_path / "c-best.pt", None, "cpu", ())
    assert kept["top1_error"] == pytest.approx(chosen["test_error"])


def test_nan_stops_a_run_with_its_epoch():
    settings = replace(SHORT, lr=1e30)
    with pytest.raises(RuntimeError, match="epoch 1: the loss is NaN or infinite"):
        trained(settings)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mix": "cutmixup"}, "mix must be one of none, cutmix"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"severities": (6,)}, "severities must be among 1 .. 5"),
        ({"suites": ("clean", "fog")}, "suites must be among clean, .* got 'fog'"),
        ({"mix": "manifold-mixup", "adversarial": "training"}, "cannot be combined"),
        ({"dataset": "cub", "suites": ("ood",)}, "suite ood needs out-of-distribution inputs, cub has none"),
        ({"suites": ("localization",)}, "suite localization needs boxes, which cifar100 lacks"),
        ({"epochs": 0}, "epochs and batch_size must be at least 1"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_a_network_without_branches_refuses_shakedrop():
    benchmark = open_benchmark(SHORT, 0, None)
    with pytest.raises(ValueError, match="vgg-gap has no residual branches for shakedrop"):
        build_classifier(replace(SHORT, network="vgg-gap", branch="shakedrop"), benchmark, 0)
    with pytest.raises(ValueError, match="network must be one of small"):
        build_classifier(replace(SHORT, network="vgg"), benchmark, 0)


def test_twowave_is_what_the_readme_says():
    data, other = twowave(600, 5), twowave(600, 6)
    assert data.images.shape == (600, 3, 16, 16) and sorted(data.labels.unique().tolist()) == list(range(15))
    assert data.record() == twowave(600, 5).record() != other.record()
    unseen, nothing = twowave(600, 5, "unseen"), twowave(600, 5, "none")
    assert set(unseen.labels.tolist()) == {0}
    power = [np.abs(np.fft.fft2(each.images.float().numpy() - 127)).max((2, 3)).mean() for each in (unseen, nothing)]
    assert power[0] > power[1]
    with pytest.raises(ValueError, match="waves must be known, unseen or none"):
        twowave(3, 0, "other")
