"""The public loss: every pair once, none invented, the same in any dimension; and what a miner may hand over."""

import math
import warnings

import pytest
import torch

from hib_ndigit_mnist import GaussianMixtureEmbedding, HedgedEncoder, VIBPairLoss, soft_contrastive_loss
from hib_ndigit_mnist.losses import eta_of_variance
from hib_ndigit_mnist.pair_nll import all_pairs_nll, pair_nll
from hib_ndigit_mnist.pairs import sample_pairs


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("objective", ["log_mean", "mean_log"])
@pytest.mark.parametrize("dim", [1, 2, 4, 5, 40])
def test_every_pair_of_a_batch_once(dim, objective, monkeypatch):
    monkeypatch.setattr("hib_ndigit_mnist.pair_nll.TILE", 60)  # several tiles
    z = (draw(0, 7, 3, dim) + 5).requires_grad_()
    a, b = (
        torch.tensor(1.7, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.4, dtype=torch.float64).requires_grad_(),
    )
    labels = torch.tensor([3, 0, 0, 3, 3, 1, 2])
    first, second = torch.triu_indices(7, 7, 1)
    match = labels[first] == labels[second]
    distance = ((z[first][:, :, None] - z[second][:, None]).square().sum(-1) + 1e-12).sqrt()
    each = soft_contrastive_loss(b - a * distance, match, objective, "none")
    halves = each[match].mean(), each[~match].mean()
    expected = sum(halves) / 2
    loss, positive, negative = all_pairs_nll(z, labels, a, b, objective, 1e-12)
    listed = pair_nll(z, first, second, match, a, b, objective, 1e-12)
    torch.testing.assert_close(torch.stack([loss, positive, negative]), torch.stack([expected, *halves]))
    torch.testing.assert_close(listed, each)
    weights = torch.where(match, 0.5 / match.sum(), 0.5 / (~match).sum())
    wanted = torch.autograd.grad(expected, (z, a, b), retain_graph=True)
    for ours in (loss, (listed * weights).sum()):
        for found, right in zip(torch.autograd.grad(ours, (z, a, b)), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)


def test_batches_of_both_kinds_of_negatives_agree_on_average():
    labels = torch.arange(40) // 2 % 8
    e = GaussianMixtureEmbedding(draw(1, 40, 1, 6), draw(2, 40, 1, 6) - 2)
    generator = torch.Generator().manual_seed(0)
    every = torch.stack([VIBPairLoss(negatives="all")(e, labels, generator=generator).loss for _ in range(40)])
    some = torch.stack([VIBPairLoss()(e, labels, generator=generator).loss for _ in range(200)])
    assert abs(every.mean() - some.mean()) < 4 * (every.var() / 40 + some.var() / 200).sqrt()


def test_the_default_takes_matches_and_as_many_others_without_padding():
    labels = torch.arange(128) // 2 % 50
    pairs = sample_pairs(labels, torch.Generator().manual_seed(0))
    matching = int((labels[:, None] == labels).sum() - 128) // 2
    assert len(pairs.first) == 2 * matching and int(pairs.match.sum()) == matching
    assert (pairs.weight > 0).all() and abs(float(pairs.weight.sum()) - 1) < 1e-6
    assert (pairs.first < pairs.second).all() and len((pairs.first * 128 + pairs.second).unique()) == 2 * matching
    other = sample_pairs(labels, torch.Generator().manual_seed(1))
    assert not torch.equal(pairs.second, other.second)


def test_what_a_miner_hands_over():
    mu, logvar = draw(0, 4, 1, 3).requires_grad_(), draw(1, 4, 1, 3).requires_grad_()
    e, nothing = GaussianMixtureEmbedding(mu, logvar), torch.tensor([], dtype=torch.long)
    for empty in ((nothing,) * 4, (nothing,) * 3):
        out = VIBPairLoss(beta=0.1)(e, indices_tuple=empty)
        gradients = torch.autograd.grad(out.loss, (mu, logvar))
        assert out.loss == 0 and all((g == 0).all() for g in gradients)
    only_others = VIBPairLoss(beta=0.0)(e, indices_tuple=(nothing, nothing, torch.tensor([0]), torch.tensor([1])))
    assert only_others.loss > 0 and only_others.nll_pos == 0
    with pytest.raises(ValueError, match="image 2 twice"):
        VIBPairLoss()(e, indices_tuple=tuple(map(torch.tensor, ([2], [2], [0], [1]))))
    triplet = VIBPairLoss()(e, indices_tuple=tuple(map(torch.tensor, ([0], [1], [2]))))
    assert triplet.nll_pos > 0 and triplet.nll_neg > 0


@pytest.mark.parametrize("dim", [2, 16, 128, 512])
def test_the_start_is_the_same_in_every_dimension(dim):
    embedding = HedgedEncoder(dim=dim)(torch.rand(8, 1, 28, 56))
    eta = VIBPairLoss().match.self_mismatch(embedding, method="quadrature")
    assert 0.3 < float(eta.mean()) < 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VIBPairLoss()(embedding, torch.arange(8) // 2)


def test_a_hopeless_start_is_told_once():
    wide = GaussianMixtureEmbedding(torch.zeros(4, 1, 128), torch.full((4, 1, 128), -2.0))
    loss, labels = VIBPairLoss(), torch.tensor([0, 0, 1, 1])
    with pytest.warns(UserWarning, match="matches itself with a probability of 0.0"):
        loss(wide, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(wide, labels)
        VIBPairLoss(b=8.0)(wide, labels)
    exact = loss.match.self_mismatch(wide, method="quadrature")[0]
    assert math.isclose(eta_of_variance(128 * math.exp(-2), 1.0, 1.0), float(exact), rel_tol=0.02)
