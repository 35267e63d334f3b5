"""Match probabilities in any dimension: never NaN, exact to the tolerance, or refused with the one that can be met."""

import pytest
import torch

from hib_ndigit_mnist import GaussianMixtureEmbedding, MatchProbability, expected_sigmoid
from hib_ndigit_mnist.expansion import expansion_of_sigmoid
from hib_ndigit_mnist.series import series_of_sigmoid

DIMS = (1, 2, 3, 8, 32, 128, 512)


def images(dim):
    """Four images on a sphere, samples of one about 0.7 apart, variances that differ between dimensions."""
    generator = torch.Generator().manual_seed(dim)
    draws = torch.randn(2, 4, 1, dim, generator=generator, dtype=torch.float64)
    logvar = 0.5 * draws[1] - 1.4 - torch.tensor(float(dim)).log()
    return GaussianMixtureEmbedding(torch.nn.functional.normalize(draws[0], dim=-1), logvar)


def within_error(exact, draws):
    """Mean of draws (n, ...) within four standard errors of the exact value."""
    error = draws.std(0) / len(draws) ** 0.5
    return ((draws.mean(0) - exact).abs() <= 4 * error + 1e-6).all()


@pytest.mark.parametrize(("dim", "b"), [*((dim, 1.0) for dim in DIMS), (2, 12.0), (8, 12.0), (128, 12.0)])
def test_quadrature_agrees_with_monte_carlo(dim, b):
    e, match, generator = images(dim), MatchProbability(b, b), torch.Generator().manual_seed(0)
    eta = match.self_mismatch(e, method="quadrature")
    every = match.pairwise(e, e, method="quadrature")
    assert eta.isfinite().all() and every.isfinite().all() and 0 < eta.min() and eta.max() < 1
    torch.testing.assert_close(every.diagonal(), 1 - eta, atol=2e-4, rtol=0)
    draws = torch.stack([match.self_mismatch(e, 8, generator=generator) for _ in range(40)])
    assert within_error(eta, draws)
    draws = torch.stack([match.pairwise(e, e, 8, generator=generator) for _ in range(40)])
    assert ((draws.mean(0) - every).abs() <= 4 * draws.std(0) / 40**0.5 + 1e-4).all()
    first, second = e[[0, 1]], e[[2, 3]]
    exact = match.prob(first, second, method="quadrature")
    assert within_error(exact, torch.stack([match.prob(first, second, 8, generator=generator) for _ in range(40)]))


@pytest.mark.parametrize(("dim", "b"), [(3, 6.5), (3, 15.0), (3, 40.0), (8, 9.0), (128, 6.5), (128, 40.0), (512, 15.0)])
def test_series_and_closed_form_meet_their_tolerance(dim, b):
    """Against the integral over the noncentral chi law, with variances that are equal in all dimensions."""
    scale = b / 3  # distances around the margin b / a
    mean, variance = scale * images(dim).mu[:, 0], (scale**2 * 0.2 / dim) * torch.ones(4, dim, dtype=torch.float64)
    exact = expected_sigmoid(mean, variance, torch.tensor(2.0), torch.tensor(b), 1e-10)
    series = series_of_sigmoid(mean, variance, 2.0, b, 1e-6)
    assert series is not None and (series - exact).abs().max() < 1e-6
    if b < 15:
        closed = expansion_of_sigmoid(mean.T, variance.T, 2.0, b, 1e-3)
        assert closed is not None and (closed - exact).abs().max() < 1e-3


@pytest.mark.parametrize("dim", [128, 512])
def test_the_isotropic_integral_does_not_overflow(dim):
    mean, variance = torch.zeros(2, dim), torch.full((2, dim), 0.1)
    mean[1, 0] = 1.0
    exact = expected_sigmoid(mean, variance, torch.tensor(1.5), torch.tensor(8.0), 1e-9)
    length = (variance.double().sqrt() * torch.randn(5_000, 1, dim, dtype=torch.float64) + mean.double()).norm(dim=2)
    assert within_error(exact, torch.sigmoid(8 - 1.5 * length))


def test_a_tolerance_that_cannot_be_met_names_one_that_can():
    e = images(3)
    with pytest.raises(ValueError, match="1e-09 cannot be met for D = 3 and b = 1; 1e-6 can"):
        MatchProbability().prob(e, e, method="quadrature", tolerance=1e-9)
    for b in (-2.0, 0.5, 4.0, 6.0, 8.0, 30.0, 200.0):
        assert MatchProbability(max(b, 1.0), b).prob(e, e, method="quadrature").isfinite().all()


def test_far_and_wide_images():
    """Distances of a thousand margins, variances at both ends of their range."""
    mu = torch.zeros(4, 1, 16)
    mu[1] += 1000
    logvar = torch.stack([torch.full((1, 16), v) for v in (-14.0, 6.0, -14.0, 6.0)])
    e = GaussianMixtureEmbedding(mu, logvar)
    for b in (2.0, 20.0):
        every = MatchProbability(b, b).pairwise(e, e, method="quadrature")
        assert every.isfinite().all() and every[0, 1] == 0 and every[0, 2] > 0.7
        assert abs(every[0, 3] - every[3, 0]) < 1e-6
