"""The objectives by hand, and which gradient reaches which network."""

import pytest
import torch

from rebias import LearnedMixinLoss, ReBiasLoss, RUBiLoss, hex_project, hsic
from rebias.objectives import SampleLosses, generalized_cross_entropy, lff_weights


def test_rebias_losses_are_the_paper_s_and_stay_in_their_network():
    generator = torch.Generator().manual_seed(0)
    f, g = (torch.randn(16, 5, generator=generator, requires_grad=True) for _ in range(2))
    f_logits, g_logits = (torch.randn(16, 3, generator=generator, requires_grad=True) for _ in range(2))
    targets = torch.arange(16) % 3
    loss = ReBiasLoss(f_lambda=2.0, g_lambda=3.0, sigma_f=1.5, sigma_g=0.5)
    dependence = hsic(f, g, 1.5, 0.5)
    f_total, parts = loss.f_loss(f_logits, f, [g, g], targets)
    torch.testing.assert_close(f_total, torch.nn.functional.cross_entropy(f_logits, targets) + 4 * dependence)
    assert parts["f_hsic"].item() == pytest.approx(2 * dependence.item()) and not parts["f_hsic"].requires_grad
    f_total.backward()
    assert g.grad is None and f.grad.abs().sum() > 0
    f.grad = None
    g_total, _ = loss.g_loss(g_logits, g, f, targets)
    torch.testing.assert_close(g_total, 3 * torch.nn.functional.cross_entropy(g_logits, targets) - dependence)
    g_total.backward()
    assert f.grad is None and g.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_last_batch_that_is_too_small_for_hsic_is_classified_only(size, conditional):
    loss = ReBiasLoss(sigma_f="median", sigma_g="median", conditional=conditional)
    logits, features = torch.randn(size, 10, requires_grad=True), torch.randn(size, 4, requires_grad=True)
    plain = torch.nn.functional.cross_entropy(logits, torch.arange(size))
    total, parts = loss.f_loss(logits, features, [torch.randn(size, 4)], torch.arange(size))
    torch.testing.assert_close(total, plain)
    assert parts["f_hsic"] == 0
    total.backward()
    torch.testing.assert_close(loss.g_loss(logits, features, torch.randn(size, 4), torch.arange(size))[0], plain)


def test_within_classes_of_four_hsic_counts_and_of_fewer_it_is_zero():
    features = torch.randn(8, 3)
    loss = ReBiasLoss(conditional=True)
    assert loss.dependence(features, features, torch.arange(8) // 4) > 0
    assert loss.dependence(features, features, torch.arange(8) // 3) == 0


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5])
def test_near_copies_do_not_blow_up_the_gradient(noise):
    """A dominant colour or dead ReLUs: 48 of 64 features are the same but for noise."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 16, generator=generator)
    base[:48] = base[0]
    f, g = (base + noise * torch.randn(64, 16, generator=generator) for _ in range(2))
    f.requires_grad_()
    logits, targets = torch.randn(64, 10, generator=generator, requires_grad=True), torch.arange(64) % 10
    loss, _ = ReBiasLoss(f_lambda=30.0, sigma_f="median", sigma_g="median").f_loss(logits, f, [g], targets)
    loss.backward()
    assert f.grad.norm() < logits.grad.norm()


def test_an_unknown_word_for_sigma():
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match="'median' or 'dimension', got 'mean'"):
        ReBiasLoss(sigma_f="mean").dependence(x, x, torch.zeros(8))


def test_lff_remembers_every_sample_s_loss_and_compares_it_within_its_class():
    losses = SampleLosses(4, num_classes=2)
    losses.update(torch.tensor([2.0, 4.0]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    losses.update(torch.tensor([1.0, 8.0]), torch.tensor([0, 0]), torch.tensor([0, 3]))
    assert losses.average.tolist() == pytest.approx([0.7 * 2 + 0.3 * 1, 0, 4, 8])  # the first loss counts in full
    assert losses.relative(torch.tensor([0, 2, 3])).tolist() == pytest.approx([1.7 / 8, 1, 1])


def test_lff_weights_favour_what_the_biased_network_finds_hard():
    easy, hard = lff_weights(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0])).tolist()
    assert easy == 0 and hard == pytest.approx(2 / 3)
    g = torch.tensor([[9.0, 0, 0]], dtype=torch.float64, requires_grad=True)
    p = g.softmax(1)[0, 0].item()
    (gradient,) = torch.autograd.grad(generalized_cross_entropy(g, torch.tensor([0])), g)
    (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(g, torch.tensor([0])), g)
    torch.testing.assert_close(gradient, 0.7 * p**0.7 * plain)


@pytest.mark.parametrize("shapes", [((4, 10), (4, 10)), ((16, 10), (16, 9)), ((16,), (16,))])
def test_hex_project_refuses(shapes):
    with pytest.raises(ValueError, match="B >= C"):
        hex_project(*(torch.randn(shape) for shape in shapes))


def test_rubi_and_learned_mixin_reduce_to_cross_entropy_without_bias():
    f_logits, targets = torch.randn(8, 4), torch.arange(8) % 4
    plain = torch.nn.functional.cross_entropy(f_logits, targets)
    rubi = RUBiLoss(3, 4, question_weight=0.0)
    torch.nn.init.zeros_(rubi.fc.weight)
    torch.nn.init.constant_(rubi.fc.bias, 40.0)  # sigmoid 1
    torch.testing.assert_close(rubi(f_logits, torch.randn(8, 3), targets)[0], plain)
    mixed, parts = LearnedMixinLoss(5, w=0.0)(f_logits, torch.randn(8, 5), torch.zeros(8, 4), targets)
    torch.testing.assert_close(mixed, plain)
    assert parts["entropy"].item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
