"""Rows with hundreds of ties, the choice of k, and the VAE's loss, each against what it must be by hand."""

import math

import numpy as np
import pytest
import torch

from prdc_metrics import compute_family, compute_prdc, expected_coverage, expected_density, smallest_k
from prdc_metrics.balls import ball_membership
from prdc_metrics.neighbours import nearest_squared
from prdc_metrics.schedule import Schedule
from prdc_metrics.train import PIXEL_SD, VAE, fit_vae


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_radii_of_rows_that_are_tied_with_hundreds(precision):
    """Twelve bits: 1,500 rows of 4,096 codes on few distances; code 0 is there 900 times, code 1 three times."""
    rng = np.random.default_rng(0)
    bits = (rng.random((1500, 12)) < 0.5).astype(np.float64)
    bits[:900] = 0
    bits[900:903] = 0
    bits[900:903, 0] = 1
    x = torch.from_numpy(bits)
    ks = (1, 2, 3)
    found, _ = nearest_squared(x, ks, Schedule(None), precision)
    distances = torch.cdist(x, x).square().round()
    distances.fill_diagonal_(math.inf)
    wanted = distances.sort(dim=1)[0][:, [k - 1 for k in ks]]
    assert torch.equal(found, wanted)
    assert (found[:900] == 0).all()  # copies: their radius is 0
    assert found[900].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_every_pair_on_a_sphere_is_verified_and_counted(precision):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 4, (40, 2), generator=generator).double() for _ in range(2))
    distances = torch.cdist(real, fake).square().round()  # (N, M)
    squared = torch.full((40, 1), 2.0, dtype=torch.float64)
    for closed, inside in ((False, distances < 2), (True, distances <= 2)):
        members, held, verified = ball_membership(real, fake, squared, squared, Schedule(), precision, closed)
        assert torch.equal(members.counts[:, 0], inside.sum(0)) and torch.equal(held.counts[:, 0], inside.sum(1))
        assert verified >= 2 * int((distances == 2).sum())  # from both sides


@pytest.mark.parametrize("n_real, n_fake", [(2, 1), (10, 10), (50, 20), (1000, 1000), (30, 300)])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.95])
def test_the_smallest_k_is_the_first_above_the_target(n_real, n_fake, target):
    above = [k for k in range(1, n_real) if expected_coverage(n_real, n_fake, k) > target]
    if above:
        assert smallest_k(n_real, n_fake, target) == above[0]
    else:
        with pytest.raises(ValueError, match=f"no k below {n_real} reaches an expected coverage above {target}"):
            smallest_k(n_real, n_fake, target)


def test_a_target_that_is_reached_exactly_is_not_exceeded():
    assert expected_coverage(2, 1, 1) == 0.5
    with pytest.raises(ValueError, match="no k below 2 reaches"):
        smallest_k(2, 1, 0.5)
    assert smallest_k(2, 1, 0.49) == 1
    for target in (-0.01, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"target must lie in \[0, 1\)"):
            smallest_k(10, 10, target)
    for sizes in ((1, 10), (10, 0)):
        with pytest.raises(ValueError, match="at least 2 real and 1 fake"):
            smallest_k(*sizes)


def test_the_vae_s_loss_is_the_negative_evidence_lower_bound(monkeypatch):
    torch.manual_seed(0)
    model = VAE(6, 2, (5, 4))
    assert [layer.out_features for layer in model.encoder[::2]] == [5, 4, 4]
    assert [layer.out_features for layer in model.decoder[::2]] == [4, 5, 6]
    assert isinstance(model.encoder[1], torch.nn.ReLU) and len(model.encoder) == len(model.decoder) == 5
    images, noise = torch.rand(3, 6), torch.randn(3, 2)
    monkeypatch.setattr(torch, "randn_like", lambda mean: noise)
    mean, log_var = model.encoder(images).split(2, dim=1)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    likelihood = torch.distributions.Normal(model.decode(mean + noise * posterior.scale), PIXEL_SD)
    constant = -math.log(PIXEL_SD * math.sqrt(2 * math.pi))
    wanted = kl - (likelihood.log_prob(images) - constant).sum(dim=1)
    torch.testing.assert_close(model(images), wanted.mean())


@pytest.mark.parametrize("changed", [{"latent": 2}, {"lr": 2e-3}, {"batch_size": 4}, {"hidden": (3,)}], ids=str)
def test_a_checkpoint_belongs_to_every_setting_of_its_run(tmp_path, changed):
    settings = dict(latent=1, hidden=(2,), epochs=1, batch_size=8, lr=1e-3, seed=0, checkpoint=tmp_path / "vae.pt")
    images = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = fit_vae(images, **settings)  # float64 images are trained on in float32
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    with pytest.raises(ValueError, match=rf"checkpoint of another run \(different {next(iter(changed))}\)"):
        fit_vae(images, **settings | changed)


def test_the_family_says_which_set_is_wrong():
    good, bad = np.random.default_rng(0).random((20, 3)), np.full((20, 3), np.nan)
    for words, name in (((bad, good), "real"), ((good, bad), "fake")):
        with pytest.raises(ValueError, match=f"^{name} has NaN"):
            compute_family(*words, 3)
    with pytest.raises(ValueError, match="^real has 3 dimensions and fake 2"):
        compute_family(good, good[:, :2], 3)


def test_the_family_names_the_set_with_copies():
    plain = np.random.default_rng(0).random((20, 3))
    copies = np.repeat(plain[:5], 4, 0)
    for words, name in (((copies, plain), "real"), ((plain, copies), "fake")):
        with pytest.warns(UserWarning, match=f"20 of 20 {name} balls have radius 0"):
            compute_family(*words, 3)


def test_expected_density_is_one():
    assert expected_density(5, 3, 2) == 1.0
    with pytest.raises(ValueError, match="k must lie in"):
        expected_density(5, 3, 5)


@pytest.mark.filterwarnings("ignore")  # of ties and of so few rows
def test_ties_count_as_outside_of_an_open_ball():
    real = np.array([[0.0], [1.0], [3.0]])
    fake = np.array([[1.0], [2.0]])  # balls of k = 1: |x| < 1, |x - 1| < 1, |x - 3| < 2
    found = compute_prdc(real, fake, 1)
    # 1.0 is only in its own ball, 2.0 only in the third
    assert found["precision"] == 1 and found["density"] == 1 and found["coverage"] == pytest.approx(2 / 3)
