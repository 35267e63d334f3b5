"""What devices train on and send under each mitigation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fl_linkability import privacy
from fl_linkability.mitigations import (
    KINDS,
    Background,
    CentralDP,
    Clip,
    Compose,
    GaussianNoise,
    LocalDP,
    Mitigation,
    StyleJitter,
    group_sums,
    weighted_mean,
)
from fl_linkability.styles import NAMES, apply_styles, random_styles

X, Y = torch.zeros(20, 1, 4, 4), torch.arange(20) % 5
BX = torch.arange(1, 51).float().view(50, 1, 1, 1).expand(50, 1, 4, 4) / 50  # background images by their value
BY = torch.arange(50) % 5
CLUSTER = np.arange(50) // 10


def rng(*numbers):
    return np.random.default_rng(numbers)


def test_a_background_has_as_many_labels_as_samples():
    for labels in (BY[:5], torch.cat([BY, BY])):
        with pytest.raises(ValueError, match="as many labels as samples, got"):
            Background(BX, labels, "random", 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_amounts(kind, ratio):
    x, y = Background(BX, BY, kind, ratio, CLUSTER).prepare_data(X, Y, rng(1))
    from_background = int((x.amax((1, 2, 3)) > 0).sum())
    assert from_background == 20 * ratio
    assert len(x) == len(y) == (20 if kind == "repl" else 20 + 20 * ratio)
    rows = (x[:, 0, 0, 0] * 50).round().long() - 1
    assert (BY[rows[rows >= 0]] == y[rows >= 0]).all()  # images keep their labels


def test_the_same_generator_draws_the_same_and_another_one_others():
    mitigation = Background(BX, BY, "random", 2.0)
    a, b, c = (mitigation.prepare_data(X, Y, rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_mm_aug_draws_one_cluster():
    x, _ = Background(BX, BY, "cluster", 2.0, CLUSTER).prepare_data(X, Y, rng(3))
    rows = (x[20:, 0, 0, 0] * 50).round().long().numpy() - 1
    assert len(rows) == 40 and len(np.unique(CLUSTER[rows])) == 1 and len(np.unique(rows)) > 3


def test_calibrated_levels_the_classes_and_decoys_do_not():
    skewed = torch.tensor([0] * 16 + [1] * 4)
    _, y = Background(BX, BY, "calibrated", 3.0).prepare_data(X, skewed, rng(1))
    assert torch.bincount(y).tolist() == [16] * 5
    _, y = Background(BX, BY, "adversarial", 3.0).prepare_data(X, skewed, rng(1))
    assert torch.bincount(y[20:], minlength=5).float().std() > 5
    lacking = BY != 2  # a class that the background does not have is not asked for
    _, y = Background(BX[lacking], BY[lacking], "calibrated", 3.0).prepare_data(X, skewed, rng(1))
    assert 2 not in y


def test_noise_of_two_devices_is_independent_and_of_the_right_size():
    noise = GaussianNoise(0.3)
    zero = np.zeros(20_000, np.float32)
    a, b = (noise.transform_update(zero, rng(0, device)) for device in (1, 2))
    assert a.dtype == np.float32 and a.std() == pytest.approx(0.3, rel=0.03)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_clip_and_local_dp():
    delta = np.array([3.0, 4.0], np.float32)
    assert Clip(1.0).transform_update(delta, rng(0)) == pytest.approx([0.6, 0.8])
    assert Clip(9.0).transform_update(delta, rng(0)) is delta
    zero = np.zeros(3, np.float32)
    assert Clip(1.0).transform_update(zero, rng(0)).tolist() == [0, 0, 0]
    private = LocalDP(0.5, 50.0)
    sent = private.transform_update(np.zeros(50_000, np.float32), rng(0))
    assert sent.std() == pytest.approx(private.sigma, rel=0.02)
    assert private.epsilon_of(20) > 20 and math.isinf(Clip(1.0).epsilon_of(1))


def hockey_stick(epsilon, mu):
    """The definition of delta, integrated: how much N(mu, 1) exceeds e^epsilon N(0, 1)."""
    z = np.linspace(-12 - mu, 12 + 2 * mu, 400_001)
    return np.trapezoid(np.maximum(norm.pdf(z - mu) - np.exp(epsilon + norm.logpdf(z)), 0), z)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 10.0, 50.0])
def test_one_round_of_local_dp_is_what_it_says(epsilon):
    """Any two updates lie 2C apart after clipping; the noise makes these two (epsilon, delta)-indistinguishable."""
    private = LocalDP(0.5, epsilon, 1e-5)
    a, b = (private.transform_update(np.full(9, sign, np.float32), rng(1)) for sign in (1, -1))
    distance = np.linalg.norm(a - b)  # the same noise: what is left are the clipped updates
    assert distance == pytest.approx(1, rel=1e-4)  # in float32, under the noise
    assert hockey_stick(epsilon, 1 / private.sigma) == pytest.approx(1e-5, rel=1e-3)
    assert private.epsilon_of(1) == pytest.approx(epsilon, rel=1e-6)
    smaller = LocalDP(0.25, epsilon, 1e-5)
    assert smaller.sigma == pytest.approx(private.sigma / 2) and smaller.epsilon_of(3) == pytest.approx(
        private.epsilon_of(3)
    )


def test_many_rounds_compose():
    private = LocalDP(1.0, 1.0, 1e-5)
    epsilon = private.epsilon_of(9)
    assert 1 < epsilon < 9 and hockey_stick(epsilon, 3 * 2 / private.sigma) == pytest.approx(1e-5, rel=1e-3)
    assert privacy.gaussian_epsilon(0.0, 1, 1e-5) == math.inf and privacy.gaussian_epsilon(1e6, 1, 1e-5) == 0


def test_what_is_composed_keeps_its_epsilon_and_noise():
    private, noise, central = LocalDP(0.5, 5.0), GaussianNoise(0.3), CentralDP(1.0, 2.0)
    both = Compose(private, noise, Clip(9.0))
    assert both.epsilon_of(4) == private.epsilon_of(4) == both.model_epsilon_of(4)
    assert both.noise_std == pytest.approx(math.hypot(private.sigma, 0.3))
    assert math.isinf(central.epsilon_of(1)) and 0 < central.model_epsilon_of(1) < math.inf  # the server sees it raw
    server = Compose(Mitigation("both"), central)
    assert math.isinf(server.epsilon_of(1)) and server.model_epsilon_of(2) == central.model_epsilon_of(2)


def test_central_dp_is_the_server_s():
    deltas, counts = np.array([[3.0, 4.0], [0.3, 0.4]]), np.array([1, 9])
    server = CentralDP(1.0, 0.0)
    assert server.aggregate(deltas, counts, rng(0)) == pytest.approx([(0.6 + 0.3) / 2, (0.8 + 0.4) / 2])
    assert server.transform_update(deltas[0], rng(0)).tolist() == [3, 4]  # the adversary sees it raw
    assert weighted_mean(deltas, counts) == pytest.approx([0.57, 0.76])
    noisy = [CentralDP(1.0, 2.0).aggregate(np.zeros((4, 1000)), np.ones(4), rng(i)).std() for i in range(20)]
    assert np.mean(noisy) == pytest.approx(2 / 4, rel=0.05)


def test_style_jitter_and_styles():
    images = torch.rand(6, 1, 8, 8)
    x, y = StyleJitter().prepare_data(images, Y[:6], rng(1))
    assert x.shape == images.shape and torch.equal(y, Y[:6]) and 0 <= x.min() and x.max() <= 1
    plain = np.zeros((6, len(NAMES)))
    plain[:, NAMES.index("scale")] = plain[:, NAMES.index("gain")] = 1
    torch.testing.assert_close(apply_styles(images, plain, rng(0)), images, rtol=0, atol=1e-5)
    thick, thin = plain.copy(), plain.copy()
    thick[:, NAMES.index("stroke")], thin[:, NAMES.index("stroke")] = 1, -1
    torch.testing.assert_close(apply_styles(images, thick, rng(0)), torch.nn.functional.max_pool2d(images, 3, 1, 1))
    torch.testing.assert_close(apply_styles(images, thin, rng(0)), -torch.nn.functional.max_pool2d(-images, 3, 1, 1))
    styles = random_styles(500, rng(0))
    assert styles.shape == (500, 8) and abs(styles[:, 0]).max() <= 0.35
    with pytest.raises(ValueError, match="style jitter needs grey images"):
        StyleJitter().prepare_data(torch.zeros(2, 3, 4, 4), Y[:2], rng(0))


def test_composition_applies_both_in_order():
    both = Compose(Background(BX, BY, "random", 1.0), GaussianNoise(0.1), Clip(1.0))
    x, _ = both.prepare_data(X, Y, rng(0))
    assert len(x) == 40
    sent = both.transform_update(np.full(5000, 1.0, np.float32), rng(0))
    assert np.linalg.norm(sent) == pytest.approx(1, rel=1e-5)
    assert Compose(Mitigation("both"), CentralDP(1.0, 0.0)).aggregate(
        np.array([[3.0, 4.0]]), np.array([1]), rng(0)
    ) == pytest.approx([0.6, 0.8])
    assert Compose(Background(BX, BY, "random", 1.0, refresh="round"), Clip(1.0)).refresh == "round"


def test_group_sums():
    assert group_sums(np.arange(6.0).reshape(3, 2), np.array([1, 0, 1])).tolist() == [[2, 3], [4, 6]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mitigation("all"), "who must be one of anon, both, got 'all'"),
        (lambda: Background(BX, BY, "half", 1.0), "kind must be one of"),
        (lambda: Background(BX, BY, "repl", 1.5), r"ratio must lie in \[0, 1\], got 1.5"),
        (lambda: Background(BX, BY, "random", float("nan")), "ratio must lie in"),
        (lambda: Background(BX, BY, "cluster", 1.0), "needs the cluster of each of the 50"),
        (lambda: Background(BX[:0], BY[:0], "random", 1.0), "the background is empty"),
        (lambda: Background(BX, torch.zeros(50, 3), "adversarial", 1.0), "the background has labels"),
        (lambda: GaussianNoise(float("nan")), "std must be finite"),
        (lambda: Clip(0.0), "the clipping norm must be positive and finite, got 0.0"),
        (lambda: Clip(float("nan")), "the clipping norm must be positive"),
        (lambda: LocalDP(1.0, 0.0), "epsilon must be positive and finite, got 0.0"),
        (lambda: LocalDP(1.0, 1.0, 0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: CentralDP(1.0, -1.0), "noise_multiplier must not be negative"),
        (lambda: Compose(Mitigation("anon"), Mitigation("both")), "must have the same who"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
