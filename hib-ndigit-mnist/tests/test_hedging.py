"""The model's arithmetic against slow float64 definitions, its invariances, and its faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hib_ndigit_mnist import (
    GaussianMixtureEmbedding,
    MatchProbability,
    VIBPairLoss,
    contrastive_loss,
    expected_sigmoid,
    soft_contrastive_loss,
)
from hib_ndigit_mnist.expansion import expansion_of_sigmoid, sigmoid_as_gaussians
from hib_ndigit_mnist.pair_nll import pair_nll
from hib_ndigit_mnist.pairs import balanced_pairs, sample_pairs


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(seed, batch=5, components=2, dim=2):
    shape = (batch, components, dim)
    return GaussianMixtureEmbedding(draw(seed, *shape), draw(seed + 1, *shape) - 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["log_mean", "mean_log"]), st.integers(1, 5), st.integers(1, 4))
def test_fused_pair_loss_equals_the_definition(seed, objective, samples, dim):
    z = draw(seed, 6, samples, dim).requires_grad_()
    a, b = (draw(seed + i, 1).abs()[0].add(0.1).requires_grad_() for i in (1, 2))
    first, second = torch.randint(6, (2, 9), generator=torch.Generator().manual_seed(seed))
    match = torch.arange(9) % 2 == 0
    distance = ((z[first][:, :, None] - z[second][:, None]).square().sum(-1) + 1e-6).sqrt()
    slow = soft_contrastive_loss(b - a * distance, match, objective, "none")
    fast = pair_nll(z, first, second, match, a, b, objective, 1e-6)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    weight = draw(seed + 3, 9)
    grads = [torch.autograd.grad((each * weight).sum(), (z, a, b)) for each in (fast, slow)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 8), st.floats(-2, 7))
def test_quadrature_and_closed_form_agree(seed, a, b):
    mean, variance = 2 * draw(seed, 8, 2), (1.5 * draw(seed + 1, 8, 2) - 2).exp()
    exact = expected_sigmoid(mean, variance, torch.tensor(a), torch.tensor(b), 1e-9)
    for tolerance in (1e-2, 1e-4):
        closed = expansion_of_sigmoid(mean.T, variance.T, a, b, tolerance)
        assert closed is not None and (closed - exact).abs().max() < tolerance
    grid = (torch.arange(-6, 6, 0.04, dtype=torch.float64) + 0.02)[:, None, None]
    x, y = (mean[:, d] + variance[:, d].sqrt() * grid.transpose(0, d)[..., 0, None] for d in (0, 1))
    weight = torch.exp(-(grid.square() + grid.transpose(0, 1).square()) / 2) * 0.04**2 / (2 * math.pi)
    slow = (torch.sigmoid(b - a * torch.hypot(x, y)) * weight).sum((0, 1))
    torch.testing.assert_close(exact, slow, atol=5e-4, rtol=0)  # the plain grid does not see the cone's tip


def test_points_are_exact_at_any_steepness():
    match, point = MatchProbability(3.0, 30.0), GaussianMixtureEmbedding(draw(0, 4, 1, 3))
    assert sigmoid_as_gaussians(30.0, 1e-6) is None
    torch.testing.assert_close(
        match.prob(point, point[[1, 2, 3, 0]], method="quadrature"),
        match.prob(point, point[[1, 2, 3, 0]], samples=1),
        atol=1e-5,
        rtol=0,
    )


def test_pairwise_is_prob_of_every_pair():
    e, match = mixture(0), MatchProbability(2.0, 3.0)
    every = match.pairwise(e, e, method="quadrature", tolerance=1e-6)
    first, second = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    one_by_one = match.prob(e[first.flatten()], e[second.flatten()], method="quadrature").view(5, 5)
    torch.testing.assert_close(every, one_by_one, atol=1e-6, rtol=0)
    assert torch.equal(every, every.T) or (every - every.T).abs().max() < 1e-12
    sampled = match.pairwise(e, e, samples=600, generator=torch.Generator().manual_seed(0))
    off = ~torch.eye(5, dtype=torch.bool)
    assert (sampled - every)[off].abs().max() < 0.1
    points = GaussianMixtureEmbedding(e.mu[:, :1])
    expected = torch.sigmoid(3 - 2 * torch.cdist(points.mu[:, 0], points.mu[:, 0]))
    torch.testing.assert_close(match.pairwise(points, points), expected, atol=1e-5, rtol=0)


def test_self_mismatch_needs_two_sample_sets():
    """One set against itself is biased by (1 - 1/K) eta + (1/K)(1 - sigmoid(b)); ours is not."""
    e, match = mixture(3, batch=1), MatchProbability(3.0, 2.0)
    exact = match.self_mismatch(e, method="quadrature")
    generator = torch.Generator().manual_seed(0)
    ours = match.self_mismatch(e[[0] * 4000], generator=generator)
    assert abs(ours.mean() - exact) < 4 * ours.std() / 4000**0.5
    z = e[[0] * 4000].sample(8, generator)
    biased = 1 - match.logits(z, z).sigmoid().mean((1, 2))
    assert abs(biased.mean() - exact) > 10 * biased.std() / 4000**0.5
    point = GaussianMixtureEmbedding(draw(0, 3, 1, 2))
    torch.testing.assert_close(
        match.self_mismatch(point), (1 - torch.sigmoid(torch.tensor(2.0))).double().expand(3), atol=1e-5, rtol=0
    )


def test_samples_are_stratified_and_moments_are_the_mixtures():
    e = mixture(5, batch=3, components=2)
    z = e.sample(40_000, torch.Generator().manual_seed(0))
    halves = z.unflatten(1, (2, -1))  # samples of a component lie side by side
    assert (halves.mean(2) - e.mu).abs().max() < 0.03
    assert (z.mean(1) - e.mean()).abs().max() < 0.03
    covariance = torch.stack([torch.cov(each.T) for each in z])
    assert (covariance - e.covariance()).abs().max() < 0.05
    noise = draw(0, 3, 4, 2)
    assert torch.equal(e.sample(4, noise=noise), e.sample(4, noise=noise))
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, 2)),
        torch.distributions.Independent(torch.distributions.Normal(e.mu, e.variance().sqrt()), 1),
    )
    torch.testing.assert_close(e.log_prob(z[:, :7]), density.log_prob(z[:, :7].transpose(0, 1)).T)


def test_jensen_and_permutation_and_stacking():
    e, labels = mixture(7, batch=8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    z, pairs, match = e.sample(8, torch.Generator().manual_seed(0)), sample_pairs(labels), MatchProbability()
    a, b = match.a.double(), match.b.double()
    nll = {o: pair_nll(z, pairs.first, pairs.second, pairs.match, a, b, o, 1e-12) for o in ("log_mean", "mean_log")}
    assert (nll["mean_log"] >= nll["log_mean"] - 1e-12).all()
    loss, order = VIBPairLoss(beta=0.1, negatives="all", kl="upper_bound"), torch.randperm(8)
    point = GaussianMixtureEmbedding(e.mu[:, :1])
    torch.testing.assert_close(loss(point, labels).loss, loss(point[order], labels[order]).loss)
    stacked = torch.stack([z, z.flip(0)]), torch.stack([pairs.first] * 2), torch.stack([pairs.second] * 2)
    both = pair_nll(*stacked, torch.stack([pairs.match] * 2), a.expand(2), b.expand(2), "log_mean", 1e-12)
    torch.testing.assert_close(both[0], nll["log_mean"])


def test_loss_of_pairs_is_the_papers():
    labels = torch.tensor([0, 0, 1, 2])
    point = GaussianMixtureEmbedding(draw(1, 4, 1, 2).requires_grad_())
    out = VIBPairLoss(negatives="all")(point, labels)
    distance = torch.cdist(point.mu[:, 0], point.mu[:, 0])
    p = torch.sigmoid(1 - distance)
    torch.testing.assert_close(out.nll_pos, -p[0, 1].log(), atol=1e-5, rtol=0)
    others = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    torch.testing.assert_close(out.nll_neg, -torch.stack([(1 - p[i]).log() for i in others]).mean(), atol=1e-5, rtol=0)
    assert out.kl == 0 and torch.isclose(out.loss, (out.nll_pos + out.nll_neg) / 2)
    mined = VIBPairLoss()(point, indices_tuple=tuple(map(torch.tensor, ([0], [1], *zip(*others, strict=True)))))
    torch.testing.assert_close(mined.loss, out.loss)
    hedged = mixture(2, batch=4, components=1)
    out = VIBPairLoss(beta=0.5)(hedged, labels)
    torch.testing.assert_close(out.kl, 2 * hedged.kl().mean())
    torch.testing.assert_close(out.loss, (out.nll_pos + out.nll_neg) / 2 + 0.5 * out.kl)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 40))
def test_balanced_pairs(seed, classes, limit):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (3, 12), generator=generator)
    pairs = balanced_pairs(labels, torch.rand(3, 66, generator=generator), limit)
    assert (pairs.first < pairs.second).all()
    for model in range(3):
        taken = pairs.weight[model] > 0
        ours = pairs.match[model][taken]
        same = labels[model][pairs.first[model][taken]] == labels[model][pairs.second[model][taken]]
        assert torch.equal(ours, same)
        total = int((labels[model][:, None] == labels[model]).sum() - 12) // 2
        assert int(ours.sum()) == min(total, limit)
        assert int((~ours).sum()) == min(int(ours.sum()), 66 - total)
        torch.testing.assert_close(pairs.weight[model][taken & pairs.match[model]].sum(), torch.tensor(0.5))
        both = pairs.first[model][taken] * 12 + pairs.second[model][taken]
        assert len(both.unique()) == len(both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e3])
@pytest.mark.parametrize("objective", ["log_mean", "mean_log"])
def test_no_nan_at_distance_0_and_1000(dtype, scale, objective):
    mu = (scale * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).to(dtype)[:, None].requires_grad_()
    logvar = torch.full_like(mu, -14.0).detach().requires_grad_()
    loss = VIBPairLoss(samples=4, objective=objective, negatives="all", a=5.0)
    out = loss(GaussianMixtureEmbedding(mu, logvar), torch.tensor([0, 0, 1, 1]))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    for value in (out.loss, mu.grad, logvar.grad, loss.match.a_raw.grad, loss.match.b.grad):
        assert value.isfinite().all()
    logits = loss.match.logits(mu, mu)
    assert soft_contrastive_loss(logits, torch.tensor([1, 0, 1, 0]), objective).isfinite()


def test_contrastive_loss():
    z1, z2 = torch.zeros(3, 2), torch.tensor([[0.5, 0.0], [0.5, 0.0], [3.0, 0.0]])
    loss = contrastive_loss(z1, z2, torch.tensor([1, 0, 0]), margin=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.25, 0.25, 0.0]))


def test_mistakes_are_named():
    e, labels = mixture(0, batch=4), torch.tensor([0, 0, 1, 1])
    for call, message in (
        (lambda: GaussianMixtureEmbedding(torch.zeros(3, 0, 2)), "C, D >= 1"),
        (lambda: GaussianMixtureEmbedding(torch.zeros(3, 1, 0)), "C, D >= 1"),
        (lambda: GaussianMixtureEmbedding(torch.zeros(3, 2, 2)), "one component, but mu has 2"),
        (lambda: e.sample(0), "K = 0"),
        (lambda: e.sample(7), "2 components.*K = 7"),
        (lambda: e.kl("closed"), "no closed-form"),
        (lambda: e.kl("mc"), "needs samples"),
        (lambda: e.kl("other"), "method: expected one of"),
        (lambda: MatchProbability(-1.0), "a: expected a positive"),
        (lambda: MatchProbability(0.0), "a: expected a positive"),
        (lambda: MatchProbability().prob(e, e, method="x"), "method: expected one of"),
        (lambda: MatchProbability().prob(e, e[:2]), "4 and 2"),
        (lambda: MatchProbability().prob(e, mixture(0, 4, 2, 3)), "2 and 3"),
        (lambda: VIBPairLoss(beta=-1.0), "beta: expected >= 0"),
        (lambda: VIBPairLoss(beta=float("nan")), "beta: expected >= 0"),
        (lambda: VIBPairLoss(samples=0), "K = 0"),
        (lambda: VIBPairLoss(objective="x"), "objective: expected one of"),
        (lambda: VIBPairLoss(samples=7)(e, labels), "K = 7"),
        (lambda: VIBPairLoss()(e, labels[:3]), r"\(4,\).*\(3,\)"),
        (lambda: VIBPairLoss()(e, torch.tensor([0, 1, 2, 3])), "no matching pair.*0: 1, 1: 1, 2: 1, 3: 1"),
        (lambda: VIBPairLoss()(e, torch.zeros(4).long()), "no non-matching pair.*0: 4"),
        (lambda: VIBPairLoss()(e), "labels or indices_tuple"),
        (lambda: soft_contrastive_loss(torch.zeros(2, 1, 1), torch.tensor([-1, 1])), "0 / 1"),
        (lambda: soft_contrastive_loss(torch.zeros(2, 1, 1), torch.tensor([1, 1, 0])), "match"),
        (lambda: contrastive_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1, 2])), "0 / 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating"):
        GaussianMixtureEmbedding(torch.zeros(3, 1, 2).long())
