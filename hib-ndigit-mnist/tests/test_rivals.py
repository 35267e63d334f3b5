"""Other ways to an uncertainty, against computations that share nothing with them."""

import math

import pytest
import torch
from scipy import integrate, special, stats

from hib_ndigit_mnist import (
    BackboneTraining,
    DropoutHead,
    GaussianMixtureEmbedding,
    HedgedModel,
    MatchProbability,
    MCInfoNCEHead,
    MCInfoNCELoss,
    PFEHead,
    PFELoss,
    harmonic_mean_sigma,
    infonce_of_samples,
    inverse_concentration,
    mismatch_of_passes,
    mutual_likelihood_score,
    von_mises_fisher_samples,
)
from hib_ndigit_mnist.finetune import score


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mutual_likelihood_is_the_integral_over_the_shared_point():
    first, second = (GaussianMixtureEmbedding(draw(i, 4, 1, 1), draw(i + 2, 4, 1, 1)) for i in (0, 1))
    for i, found in enumerate(mutual_likelihood_score(first, second).tolist()):
        laws = [stats.norm(float(e.mu[i]), math.exp(float(e.logvar[i]) / 2)) for e in (first, second)]
        inside, _ = integrate.quad(lambda z, laws=laws: laws[0].pdf(z) * laws[1].pdf(z), -12, 12)
        assert found == pytest.approx(math.log(inside), abs=1e-6)
    wide = [GaussianMixtureEmbedding(draw(i, 3, 1, 6), draw(i + 2, 3, 1, 6)) for i in (0, 1)]
    law = torch.distributions.Normal(torch.zeros(3, 6), (wide[0].variance() + wide[1].variance())[:, 0].sqrt())
    expected = law.log_prob((wide[0].mu - wide[1].mu)[:, 0]).sum(1)
    torch.testing.assert_close(mutual_likelihood_score(*wide), expected)
    sigma = wide[0].variance()[:, 0].sqrt()
    assert harmonic_mean_sigma(wide[0]).tolist() == pytest.approx(stats.hmean(sigma.numpy(), axis=1).tolist())


def test_pfe_learns_its_variance_behind_the_means():
    """With fixed means, the variance of matching pairs that maximises the score is half their mean squared gap."""
    features = torch.randn(8, 5, requires_grad=True)
    head, loss, labels = PFEHead(5, 3), PFELoss(), torch.arange(8) // 2
    embedding = head(features)
    (by_variance,) = torch.autograd.grad(embedding.logvar.sum(), features, retain_graph=True, allow_unused=True)
    assert by_variance is None
    loss(embedding, labels).loss.backward()
    assert features.grad.abs().sum() > 0 and head.weight.grad[3:].abs().sum() > 0
    mu, logvar = draw(0, 8, 1, 1), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    gap = (mu[::2] - mu[1::2]).square().mean()
    optimizer = torch.optim.LBFGS([logvar], max_iter=100)

    def closure():
        optimizer.zero_grad()
        value = loss(GaussianMixtureEmbedding(mu, logvar.expand(8, 1, 1)), labels).kl
        value.backward()
        return value

    optimizer.step(closure)
    assert float(logvar.exp()) == pytest.approx(float(gap / 2), rel=1e-3)


def test_passes_of_dropout_scatter_as_bernoulli_features_do():
    torch.manual_seed(0)
    head, features = DropoutHead(20, 3, probability=0.3, passes=4000).eval(), torch.randn(2, 20)
    with torch.no_grad():
        mu = head(features).mu
        weight = head.head.weight
        spread = 0.3 / 0.7 * (features[:, None].square() * weight.square()).sum(2)
        torch.testing.assert_close(mu.var(1), spread, rtol=0.1, atol=0)
        assert ((mu.mean(1) - head.head(features).mu[:, 0]).abs() < 5 * (spread / 4000).sqrt()).all()
    assert head.train()(features).mu.shape == (2, 1, 3) and head.train()(features).is_point


def test_mismatch_of_passes_is_the_mean_over_different_ones():
    e, match = GaussianMixtureEmbedding(draw(0, 3, 4, 2), torch.full((3, 4, 2), -14.0).double()), MatchProbability(2, 3)
    for image, found in enumerate(mismatch_of_passes(e, match).tolist()):
        gaps = [math.dist(e.mu[image, i].tolist(), e.mu[image, j].tolist()) for i in range(4) for j in range(i)]
        assert found == pytest.approx(sum(1 / (1 + math.exp(3 - 2 * gap)) for gap in gaps) / 6, abs=1e-5)


@pytest.mark.parametrize("kappa", [float("nan"), float("inf"), 0.0])
def test_a_direction_without_a_concentration_is_refused(kappa):
    with pytest.raises(ValueError, match="kappa: expected finite values above 0, got"):
        von_mises_fisher_samples(torch.eye(2, 3), torch.tensor([1.0, kappa]), 2)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 30.0), (3, 10.0), (64, 20.0), (64, 5e4)])
def test_directions_scatter_as_von_mises_and_fisher_say(dim, kappa):
    torch.manual_seed(0)
    mean = torch.nn.functional.normalize(draw(1, 2, dim), dim=1)
    kappas = torch.tensor([kappa, 1.0], dtype=torch.float64, requires_grad=True)
    z = von_mises_fisher_samples(mean, kappas, 4000)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(4000, 2, dtype=torch.float64))
    along = (z * mean).sum(2)
    theirs = stats.vonmises_fisher(mean[0].numpy(), kappa).rvs(4000, random_state=0) @ mean[0].numpy()
    assert stats.ks_2samp(along[:, 0].detach().numpy(), theirs).pvalue > 0.001
    cosine = special.ive(dim / 2, kappa) / special.ive(dim / 2 - 1, kappa)
    slope, other = torch.autograd.grad(along[:, 0].mean(), kappas)[0].tolist()
    assert slope == pytest.approx(1 - cosine**2 - (dim - 1) / kappa * cosine, rel=0.15) and other == 0
    aside = (z - along[..., None] * mean).detach()
    assert (aside.mean(0).abs() < 5 * aside.std(0) / 4000**0.5 + 1e-12).all()  # no side is preferred


def test_mcinfonce_is_the_mean_softmax_of_partners_among_others():
    labels, scale = torch.tensor([0, 1, 0, 2, 0, 1]), 3.0
    z = torch.nn.functional.normalize(draw(0, 4, 6, 3), dim=2)
    terms = []
    for i, j in ((i, j) for i in range(6) for j in range(6) if i != j and labels[i] == labels[j]):
        right = []
        for k in range(4):
            others = sum(math.exp(scale * float(z[k, i] @ z[k, m])) for m in range(6) if labels[m] != labels[i])
            own = math.exp(scale * float(z[k, i] @ z[k, j]))
            right.append(own / (own + others))
        terms.append(-math.log(sum(right) / 4))
    assert len(terms) == 8
    assert float(infonce_of_samples(z, labels, scale)) == pytest.approx(sum(terms) / 8)


def test_mcinfonce_finds_the_images_whose_partners_scatter():
    """Partners of classes 0 .. 3 lie together, those of 4 .. 7 anywhere: these end with the larger 1 / kappa."""
    torch.manual_seed(0)
    labels, loss = torch.arange(64) % 8, MCInfoNCELoss(8)
    centre = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)[labels]
    scatter = torch.where(labels < 4, 0.1, 2.0)[:, None]
    mu = torch.nn.functional.normalize(centre + scatter * torch.randn(64, 4), dim=1)[:, None]
    logvar = torch.full((64, 1, 1), -2.0, requires_grad=True)
    optimizer = torch.optim.Adam([logvar], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        out = loss(GaussianMixtureEmbedding(mu, logvar.expand(64, 1, 4)), labels)
        out.loss.backward()
        optimizer.step()
    assert loss.log_scale.grad != 0 and float(out.scale.detach()) == pytest.approx(20.0)
    unsure = logvar.detach().flatten().exp()
    assert unsure[labels >= 4].median() > 3 * unsure[labels < 4].median()
    head, features = MCInfoNCEHead(5, 64), torch.randn(3, 5, requires_grad=True)
    e = head(features)
    assert float(inverse_concentration(e).mean().detach()) == pytest.approx(1 / 320, rel=1.0)
    torch.testing.assert_close(e.mu.norm(dim=2), torch.ones(3, 1))
    (by_kappa,) = torch.autograd.grad(inverse_concentration(e).sum(), features)
    assert (by_kappa.abs().sum(1) > 0).all()
    with pytest.raises(ValueError, match="dim: expected >= 2"):
        MCInfoNCEHead(5, 1)


@pytest.mark.parametrize("method", ["pfe", "mc-dropout", "mc-infonce", "point"])
def test_rivals_are_scored_as_hedged_embeddings_are(method):
    torch.manual_seed(0)
    model = HedgedModel(BackboneTraining("timm:test_resnet", 32, method, dim=2, samples=4))
    labels = torch.arange(8) // 2
    model.loss(model.train()(torch.rand(8, 3, 32, 32)), labels).loss.backward()
    with torch.no_grad():
        e, outside = (model.eval()(torch.rand(8, 3, 32, 32)) for _ in range(2))
    found = score(model, e, labels, outside)
    assert 0 <= found["r1"] <= 1
    if method != "point":
        assert model.uncertainty(e).shape == (8,) and 0 <= found["ood_auroc"] <= 1
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        DropoutHead(5, 2, probability=1.0)
