"""The VAE of the truncation experiment: it learns, it resumes exactly, and truncation does what the paper says."""

import os

import pytest
import torch

import prdc_metrics.train as train
from prdc_metrics import compute_prdc
from prdc_metrics.data import load_digits
from prdc_metrics.experiments import _vae
from prdc_metrics.train import fit_vae, sample
from shared_utils.seeding import seed_everything

SMALL = dict(latent=3, hidden=(16,), epochs=6, batch_size=32, seed=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def halves():
    """Twice 256 digits (256, 64) in [0, 1]."""
    images = load_digits().images.flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:256], images[256:512]


@pytest.fixture(scope="module")
def half_and_vae():
    """Figure 7's reals (899, 64) and VAE, which the smoke runs of that figure have trained already."""
    return _vae(20)


@pytest.fixture(scope="module")
def vae(half_and_vae):
    return half_and_vae[1]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---- what it learns ----


def test_samples_are_images_that_depend_on_seed_and_psi(vae):
    images = sample(vae, 1.0, 50, seed=0)
    assert images.shape == (50, 64) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, sample(vae, 1.0, 50, seed=0))
    assert not torch.equal(images, sample(vae, 1.0, 50, seed=1))
    assert not vae.training


def test_spread_of_samples_grows_with_psi(vae, half_and_vae):
    spread = [sample(vae, psi, 500, seed=0).std(0).mean() for psi in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert spread[0] == 0 and all(a < b for a, b in zip(spread, spread[1:], strict=False))
    assert spread[-1] > 0.6 * half_and_vae[0].std(0).mean()


def test_truncation_trades_coverage_for_density(vae, half_and_vae):
    """Claim 6, from psi = 0.3 to 1: density falls, coverage rises."""
    low, high = (compute_prdc(half_and_vae[0], sample(vae, psi, 898, seed=0), 5) for psi in (0.3, 1.0))
    assert low["density"] > high["density"] + 0.5
    assert low["coverage"] + 0.4 < high["coverage"]
    assert high["precision"] > 0.9


# ---- same arguments, same weights ----


def test_seed_decides_whatever_the_global_state_was(halves):
    seed_everything(5)
    one = weights(fit_vae(halves[0], **SMALL))
    seed_everything(6)
    assert torch.equal(weights(fit_vae(halves[0], **SMALL)), one)
    assert not torch.equal(weights(fit_vae(halves[0], **SMALL | {"seed": 2})), one)


@pytest.mark.parametrize("killed_at", ["before_rename", "after_rename"])
@pytest.mark.parametrize("save", [1, 2])
def test_killed_training_ends_bit_equal(halves, tmp_path, monkeypatch, killed_at, save):
    straight = weights(fit_vae(halves[0], **SMALL))
    rename, saves = os.replace, []

    def dying(source, target):
        saves.append(target)
        if killed_at == "after_rename" or len(saves) < save:
            rename(source, target)
        if len(saves) == save:
            raise KeyboardInterrupt  # nothing of the run survives but the files

    path = tmp_path / "runs" / "vae.pt"
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_vae(halves[0], checkpoint=path, **SMALL)
    monkeypatch.setattr(os, "replace", rename)
    seed_everything(123)
    epochs = []
    monkeypatch.setattr(train, "_save", lambda path, run, epoch, *_: epochs.append(epoch))
    assert torch.equal(weights(fit_vae(halves[0], checkpoint=path, **SMALL)), straight)
    survived = save if killed_at == "after_rename" else save - 1
    assert epochs == [2, 4, 6][survived:]  # it went on from the checkpoint, and not from the start


def test_finished_training_is_loaded(halves, tmp_path):
    path = tmp_path / "vae.pt"
    model = fit_vae(halves[0], checkpoint=path, **SMALL)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 6
    assert torch.equal(weights(fit_vae(halves[0], checkpoint=path, **SMALL)), weights(model))


# ---- refused ----


def test_checkpoint_of_another_run_is_refused(halves, tmp_path):
    path = tmp_path / "vae.pt"
    fit_vae(halves[0], checkpoint=path, **SMALL)
    for changed in ({"seed": 2}, {"epochs": 7}, {"hidden": (17,)}):
        with pytest.raises(ValueError, match=rf"vae\.pt: checkpoint of another run \(different {list(changed)[0]}\)"):
            fit_vae(halves[0], checkpoint=path, **SMALL | changed)
    with pytest.raises(ValueError, match="different images"):
        fit_vae(halves[1], checkpoint=path, **SMALL)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_checkpoint_is_named(halves, tmp_path, share):
    path = tmp_path / "vae.pt"
    fit_vae(halves[0], checkpoint=path, **SMALL)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"vae\.pt: cannot be read as a checkpoint"):
        fit_vae(halves[0], checkpoint=path, **SMALL)


@pytest.mark.parametrize(
    "images", [torch.rand(9, 8, 8), torch.rand(0, 8), torch.rand(9, 8) * 16, torch.ones(9, 8).long()]
)
def test_images_must_be_rows_in_the_unit_interval(images):
    with pytest.raises(ValueError, match="images: "):
        fit_vae(images, seed=0)
