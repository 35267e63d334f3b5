"""The bound, the network and every attack: properties against a slow definition, and wrong inputs."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rl_adv_reward import attacks
from rl_adv_reward.atn import ATN, AttackedQ, perturbation_size, project
from rl_adv_reward.models import Victim, mlp, nature_cnn

SHAPE = (2, 10, 10)
NAMES = ("none", "random-uniform", "random-sign", "fgsm", "pgd", "timed", "targeted-fgsm", "targeted-pgd", "atn")


def observations(n=6, seed=0):
    pixels = torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed))
    pixels[0], pixels[1] = 0, 255
    return pixels / 255


def make(name, eps, norm="linf", quantize=False):
    torch.manual_seed(1)
    atn = ATN(SHAPE, eps, norm)
    nn.init.normal_(atn.body[-2].weight, std=2)  # far from the start: perturbations as large as they can be
    extras = {"generator": torch.Generator().manual_seed(0), "target": lambda x: torch.ones(len(x), dtype=torch.int64)}
    return attacks.make_attack(name, eps=eps, norm=norm, quantize=quantize, atn=atn, threshold=0.0, **extras)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 1), st.booleans(), st.integers(0, 2**20))
def test_projection_is_the_slow_definition(eps, quantize, seed):
    x = observations(3, seed)
    proposed = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    out = project(proposed, x, eps, quantize=quantize)
    for a, b, c in zip(out.flatten().tolist(), x.flatten().tolist(), proposed.flatten().tolist(), strict=True):
        expected = min(max(b + min(max(c - b, -eps), eps), 0.0), 1.0)
        if quantize:
            level, levels = round(b * 255), int(255 * eps + 1e-6)
            expected = min(max(round(expected * 255), level - levels), level + levels) / 255
            assert abs(a - expected) <= 1 / 255 + 1e-6 and abs(a * 255 - round(a * 255)) < 1e-3
            assert abs(round(a * 255) - level) <= levels
        else:
            assert abs(a - expected) < 1e-6


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 5), st.booleans(), st.integers(0, 2**20))
def test_l2_projection_stays_in_ball_and_range(eps, quantize, seed):
    x = observations(3, seed)
    proposed = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    out = project(proposed, x, eps, "l2", quantize=quantize)
    assert perturbation_size(out, x)[1].max() <= eps + 1e-5
    assert out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(project(x, x, eps, "l2"), x)  # nothing to scale, no NaN


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("linf", 1.0), ("l2", 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_every_attack_stays_within_the_same_bound(victim, name, norm, eps):
    x = observations()
    for quantize in (False, True):
        out = make(name, eps, norm, quantize)(x, victim)
        size = perturbation_size(out, x)[0 if norm == "linf" else 1]
        assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
        assert size.max() <= eps + 1e-6
        if name != "none" and not quantize:
            assert size.max() > 0.4 * eps


@pytest.mark.parametrize("name", NAMES)
def test_eps_0_changes_nothing(victim, name):
    x = observations()
    assert torch.equal(make(name, 0.0)(x, victim), x)


def test_fgsm_follows_the_gradient_and_pgd_goes_further(victim):
    x = observations(64)
    greedy, eps = attacks.greedy(x, victim), 0.02
    loss = partial(nn.functional.cross_entropy, target=greedy)
    clean, noise = loss(victim.q(x)), loss(victim.q(make("random-sign", eps)(x, victim)))
    once, often = loss(victim.q(make("fgsm", eps)(x, victim))), loss(victim.q(make("pgd", eps)(x, victim)))
    assert often >= once > noise and once > clean
    steered = make("targeted-pgd", 0.3)(x, victim)
    assert (attacks.greedy(steered, victim) == 1).double().mean() > 0.9


def test_the_timed_attack_strikes_where_the_choice_matters(victim):
    x = observations(64)
    preference = victim.q(x).softmax(1)
    spread = preference.amax(1) - preference.amin(1)
    threshold = float(spread.median())
    out = attacks.make_attack("timed", eps=0.02, threshold=threshold)(x, victim)
    struck = (out != x).flatten(1).any(1)
    assert torch.equal(struck, spread > threshold) and 0 < struck.sum() < 64


@pytest.mark.parametrize("shape", [SHAPE, (4, 84, 84), (3, 85, 63)])
def test_the_untrained_network_hardly_acts_and_the_gradient_reaches_it_through_the_victim(shape):
    torch.manual_seed(0)
    module = mlp(shape, 3) if shape == SHAPE else nature_cnn(shape, 6)
    victim, atn = Victim(module), ATN(shape, 0.05, width=8)
    x = torch.rand(2, *shape)
    assert atn(x).shape == x.shape and 0 < atn.perturbation(x).abs().max() < 0.05
    before = victim.weights_hash()
    q = AttackedQ(atn, victim)
    q(x).sum().backward()
    assert {name for name, _ in q.named_parameters()} == {f"atn.{name}" for name, _ in atn.named_parameters()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in atn.parameters())
    assert all(p.grad is None for p in victim.parameters()) and victim.weights_hash() == before


def test_a_copy_for_the_target_shares_the_victim(victim):
    q = AttackedQ(ATN(SHAPE, 0.05), victim)
    target = copy.deepcopy(q)
    assert target._victim[0] is victim and target.atn is not q.atn
    assert torch.equal(target(observations()), q(observations()))


def test_the_victim_is_frozen_and_stays_in_eval_mode(victim):
    assert not any(p.requires_grad for p in victim.parameters())
    assert not victim.train().training and not victim.module.training
    frames = (255 * observations()).round().to(torch.uint8)
    assert torch.equal(victim.act(frames), victim.q(observations()).argmax(1))
    raw = Victim(nn.Sequential(nn.Flatten(), nn.Linear(200, 3)), scale=1.0)
    torch.testing.assert_close(raw.q(observations()), raw.module(255 * observations()))
    tie = nn.Sequential(nn.Flatten(), nn.Linear(200, 3))
    nn.init.zeros_(tie[1].weight), nn.init.zeros_(tie[1].bias)
    assert Victim(tie).act(frames).tolist() == [0] * 6
    other = Victim(copy.deepcopy(victim.module))
    assert other.weights_hash() == victim.weights_hash()
    other.module[-1].bias.data[0] += 1e-3
    assert other.weights_hash() != victim.weights_hash()


@pytest.mark.parametrize(
    "make_it, error, message",
    [
        (lambda: ATN(SHAPE, -0.1), ValueError, r"eps must lie in \[0, 1\]"),
        (lambda: ATN(SHAPE, 1.5), ValueError, r"eps must lie in \[0, 1\]"),
        (lambda: ATN(SHAPE, float("nan")), ValueError, "eps"),
        (lambda: ATN(SHAPE, 0.1, "l1"), ValueError, "norm must be one of linf, l2"),
        (lambda: ATN((10, 10), 0.1), ValueError, r"obs_shape must be \(C, H, W\)"),
        (lambda: ATN((1, 40, 2), 0.1), ValueError, "too small"),
        (lambda: ATN(SHAPE, 0.1)(torch.rand(1, 3, 10, 10)), ValueError, r"x must be \(N, 2, 10, 10\)"),
        (lambda: ATN(SHAPE, 0.1)(torch.rand(1, *SHAPE) + 1), ValueError, r"x must lie in \[0, 1\]"),
        (lambda: ATN(SHAPE, 0.1)(torch.full((1, *SHAPE), float("nan"))), ValueError, "without NaN"),
        (lambda: ATN(SHAPE, 0.1)(torch.zeros(1, *SHAPE, dtype=torch.uint8)), TypeError, "divide uint8 frames by 255"),
        (lambda: project(torch.rand(2, 3), torch.rand(2, 4), 0.1), ValueError, "shape of x"),
        (lambda: attacks.make_attack("fgms", eps=0.1), ValueError, "attack must be one of"),
        (lambda: attacks.make_attack("atn", eps=0.1), ValueError, "'atn' needs atn"),
        (lambda: attacks.make_attack("targeted-fgsm", eps=0.1), ValueError, "needs target"),
        (lambda: attacks.make_attack("random-sign", eps=0.1), ValueError, "needs generator"),
        (lambda: Victim(nn.Linear(2, 2), output="v"), ValueError, "output must be one of q, logits"),
        (lambda: Victim(nn.Sequential(nn.BatchNorm1d(2))), ValueError, "BatchNorm1d '0' is in train mode"),
        (lambda: Victim(nn.Flatten()).act(torch.zeros(1, 2, dtype=torch.int64)), TypeError, "uint8 or floating"),
    ],
)
def test_wrong_inputs(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
