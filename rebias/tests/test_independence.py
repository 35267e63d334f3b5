"""Properties of HSIC, and that it refuses what it cannot compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rebias import conditional_hsic, gram_hsic, hsic, median_sigma, rbf_gram
from rebias.independence import dimension_sigma


def draw(m, d, seed, dtype=torch.float64):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cubic(k, l):  # noqa: E741
    """Song et al. 2012, written with matrix products."""
    m = len(k)
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(m, 1, dtype=k.dtype)
    product = (one.T @ k @ one) * (one.T @ l @ one) / ((m - 1) * (m - 2))
    return ((k @ l).trace() + product - 2 / (m - 2) * one.T @ k @ l @ one).item() / (m * (m - 3))


sizes = st.integers(4, 24)
seeds = st.integers(0, 10_000)
sigmas = st.floats(0.2, 5)


@settings(deadline=None, max_examples=40)
@given(sizes, seeds, sigmas, sigmas)
def test_equals_the_matrix_form(m, seed, sigma_x, sigma_y):
    x, y = draw(m, 3, seed), draw(m, 2, seed + 1)
    k, l = rbf_gram(x, sigma_x), rbf_gram(y, sigma_y)  # noqa: E741
    assert hsic(x, y, sigma_x, sigma_y).item() == pytest.approx(cubic(k, l), rel=1e-9, abs=1e-14)
    h = torch.eye(m, dtype=torch.float64) - 1 / m
    biased = ((k @ h @ l @ h).trace() / (m - 1) ** 2).item()
    assert hsic(x, y, sigma_x, sigma_y, "biased").item() == pytest.approx(biased, rel=1e-9, abs=1e-14)
    assert biased >= -1e-15


@settings(deadline=None, max_examples=25)
@given(sizes, seeds, sigmas)
def test_symmetric_and_blind_to_order_and_translation(m, seed, sigma):
    x, y = draw(m, 3, seed), draw(m, 3, seed + 1)
    value = hsic(x, y, sigma).item()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    for other in (hsic(y, x, sigma), hsic(x[order], y[order], sigma), hsic(x + 100, y - 7, sigma)):
        assert other.item() == pytest.approx(value, rel=1e-7, abs=1e-12)


def test_a_constant_added_off_the_diagonal_changes_nothing():
    k, l = rbf_gram(draw(12, 3, 0), 1.0), rbf_gram(draw(12, 3, 1), 1.0)  # noqa: E741
    assert gram_hsic(k + 5, l).item() == pytest.approx(gram_hsic(k, l).item(), abs=1e-12)


def test_a_linear_kernel_has_its_true_diagonal_removed():
    x, y = draw(16, 4, 0), draw(16, 4, 1)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert gram_hsic(k, l).item() == pytest.approx(cubic(k, l), rel=1e-10)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_constant_features_give_zero_and_finite_gradients(estimator):
    x, y = draw(8, 3, 0).requires_grad_(), torch.ones(8, 2, dtype=torch.float64, requires_grad=True)
    value = hsic(x, y, 1.0, median_sigma(y), estimator)
    gradients = torch.autograd.grad(value, (x, y))
    assert abs(value.item()) < 1e-15 and all(gradient.isfinite().all() for gradient in gradients)


def test_sigma_to_zero():
    x, y = draw(10, 3, 0), draw(10, 3, 1)
    assert hsic(x, y, 1e-4).item() == 0
    assert hsic(x, y, 1e-4, estimator="biased").item() == pytest.approx(1 / 9)


def test_unbiased_has_mean_zero_under_independence_and_the_biased_one_has_not():
    values = torch.tensor(
        [
            [hsic(draw(8, 2, i), draw(8, 2, 10_000 + i), 1.0, None, e) for e in ("unbiased", "biased")]
            for i in range(2000)
        ]
    )
    mean, error = values.mean(0), values.std(0) / 2000**0.5
    assert abs(mean[0]) < 4 * error[0] and values[:, 0].min() < 0
    assert mean[1] > 20 * error[1]


def test_affine_maps_with_orthogonal_row_spaces_are_independent():
    """The paper's lemma: f(X) and g(X) are independent iff A S B' = 0."""
    x = draw(1500, 4, 0)
    s = x.T @ x / len(x)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(s)).T  # sample covariance exactly the identity
    f, g, h = x[:, :2], x[:, 2:], x[:, 1:3]
    independent, dependent = (hsic(f, other, 1.5).item() for other in (g, h))
    assert abs(independent) < 1e-3 < dependent / 10


def test_within_classes():
    x, y, labels = draw(13, 3, 0), draw(13, 3, 1), torch.tensor([0] * 5 + [1] * 6 + [2] * 2)
    expected = (hsic(x[:5], y[:5]) + hsic(x[5:11], y[5:11])) / 2
    assert conditional_hsic(x, y, labels).item() == pytest.approx(expected.item(), rel=1e-9)
    parts = [hsic(x[i], y[i], estimator="biased") for i in (slice(0, 5), slice(5, 11), slice(11, 13))]
    assert conditional_hsic(x, y, labels, estimator="biased").item() == pytest.approx(sum(parts).item() / 3, rel=1e-9)


def test_float32_under_autocast():
    x, y = draw(64, 16, 0, torch.float32), draw(64, 16, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = hsic(x.bfloat16(), y.bfloat16(), 3.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(hsic(x.bfloat16().double(), y.bfloat16().double(), 3.0).item(), abs=1e-6)


def test_diagonal_and_range_of_the_gram_matrix():
    k = rbf_gram(1e4 + draw(20, 5, 0, torch.float32), 1.0)
    assert torch.equal(k.diag(), torch.ones(20)) and 0 <= k.min() and k.max() <= 1


def test_median_with_and_without_the_diagonal():
    x = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert median_sigma(x, include_diagonal=False).item() == 2
    assert median_sigma(x).item() == 1  # squares 0 0 0 1 1 4 4 9 9: the fifth
    assert median_sigma(torch.zeros(4, 2)).item() == pytest.approx(1e-6)
    assert dimension_sigma(torch.zeros(3, 4, 4)) == 4


@pytest.mark.parametrize("noise", [1e-6, 1e-5])
def test_the_median_distance_of_near_copies_is_exact(noise):
    """48 of 64 rows are the same up to noise, far from the origin: float32's rounding is 100 times as large."""
    rows = draw(64, 16, 0)
    rows[:48] = draw(1, 16, 1) + noise * draw(48, 16, 2)
    x = rows.float()
    expected = torch.pdist(x.double()).median().item()
    assert median_sigma(x, include_diagonal=False).item() == pytest.approx(expected, rel=1e-3)
    with_diagonal = torch.cat([torch.zeros(64), torch.pdist(x).repeat(2)]).quantile(0.5).item()
    assert median_sigma(x).item() == pytest.approx(with_diagonal, rel=1e-3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: hsic(x, x[:5]), ValueError, "same number of samples, got 8 and 5"),
        (lambda x: hsic(x[:3], x[:3]), ValueError, "at least 4 samples, got 3"),
        (lambda x: hsic(x[:1], x[:1], estimator="biased"), ValueError, "at least 2 samples, got 1"),
        (lambda x: hsic(x, x, estimator="minmax"), ValueError, "unbiased, biased, got 'minmax'"),
        (lambda x: hsic(x, x, 0.0), ValueError, "sigma must be positive, got 0"),
        (lambda x: hsic(x, x, 1.0, -1.0), ValueError, "sigma must be positive, got -1"),
        (lambda x: hsic(x, x, float("nan")), ValueError, "sigma must be positive, got nan"),
        (lambda x: hsic(x.long(), x), TypeError, "must be floating, got torch.int64"),
        (lambda x: hsic(x.clone().fill_(float("nan")), x), ValueError, "NaN or infinity"),
        (lambda x: rbf_gram(x[:0], 1.0), ValueError, "m >= 1"),
        (lambda x: conditional_hsic(x, x, torch.arange(8)), ValueError, "no class has the 4 samples"),
        (
            lambda x: conditional_hsic(x, x, torch.arange(8) % 2, estimator="U"),
            ValueError,
            "one of unbiased, biased, got 'U'",
        ),
        (lambda x: conditional_hsic(x, x, torch.arange(5)), ValueError, "the same samples, got 8, 8 and 5"),
        (lambda x: conditional_hsic(x[:5], x, torch.arange(5)), ValueError, "the same samples, got 5, 8 and 5"),
        (lambda x: hsic(x, x, torch.tensor(0.0)), ValueError, "sigma must be positive, got 0"),
        (lambda x: rbf_gram(x, torch.tensor(-1.0)), ValueError, "sigma must be positive, got -1"),
        (lambda x: median_sigma([]), ValueError, "at least 2 samples"),
        (lambda x: median_sigma(x[:1]), ValueError, "at least 2 samples"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(draw(8, 3, 0))
