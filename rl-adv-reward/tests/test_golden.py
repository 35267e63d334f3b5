"""The fixtures in golden/: closed forms, brute force in float64, and recordings of ale-py; see its README."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import huber_loss, mse_loss

from rl_adv_reward import attacks
from rl_adv_reward.atn import ATN, perturbation_size, project
from rl_adv_reward.dqn import dqn_targets, nstep_returns, tabular_attack
from rl_adv_reward.models import Victim

GOLDEN = Path(__file__).parent / "golden"
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
close32 = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def test_dqn_targets():
    g = load("dqn_targets")
    common = g["reward"], g["terminated"], g["q_target_next"], float(g["gamma"])
    close(dqn_targets(*common), g["y_dqn"])
    close(dqn_targets(*common, g["q_online_next"]), g["y_double_dqn"])
    close(huber_loss(g["q_sa"], g["y_dqn"], reduction="none"), g["huber_per_sample"])
    close(huber_loss(g["q_sa"], g["y_dqn"]), g["huber_mean"])
    close(mse_loss(g["q_sa"], g["y_dqn"]), g["mse_mean"])
    assert g["truncated"].any() and (g["q_online_next"].argmax(1) != g["q_target_next"].argmax(1)).any()


def test_nstep_returns():
    g = load("nstep_returns")
    names = ("reward", "terminated", "truncated", "bootstrap_value", "final_value")
    close(nstep_returns(*(g[name] for name in names), n=int(g["n"]), gamma=float(g["gamma"])), g["y"])


@pytest.mark.parametrize("dtype, equal", [(torch.float64, close), (torch.float32, close32)])
def test_projection(dtype, equal):
    g = {name: value.to(dtype) if value.is_floating_point() else value for name, value in load("projection").items()}
    x, eps = g["x"], float(load("projection")["eps_linf"])
    equal(project(x + g["delta"], x, eps), g["proj_linf"])
    equal(project(x + g["delta"], x, float(g["eps_l2"]), "l2"), g["proj_l2"])
    out = project(x + eps * g["raw"].tanh(), x, eps)
    equal(out, g["atn_out"])
    quantized = project(out, x, eps, quantize=True)
    assert torch.equal((255 * quantized).round().to(torch.uint8), g["atn_out_uint8"])
    torch.testing.assert_close(255 * quantized, (255 * quantized).round(), rtol=0, atol=1e-4)
    linf, l2, l0 = perturbation_size(out, x)
    equal(linf, g["metric_linf"])
    equal(l2, g["metric_l2"])
    if dtype == torch.float64:
        assert torch.equal(l0, g["metric_l0"])


def test_the_network_s_own_output_is_the_golden_form():
    g = load("projection")
    x = g["x"].double()
    atn = ATN(tuple(x.shape[1:]), float(g["eps_linf"])).double()
    atn.body = nn.Module()
    atn.body.forward = lambda _: g["raw"]
    close(atn(x), g["atn_out"])


def test_fgsm_on_a_linear_policy():
    g = load("fgsm_linear")
    linear = nn.Linear(20, 4).double()
    linear.weight.data, linear.bias.data = g["W"], g["b"]
    victim, x, eps = Victim(linear), g["x"], float(g["eps"])
    assert torch.equal(attacks.greedy(x, victim), g["greedy_action"])
    close(attacks.gradient(x, victim, g["greedy_action"]), g["grad_untargeted"])
    close(attacks.gradient(x, victim, g["target_action"]), g["grad_targeted"])
    close(attacks.fgsm(x, victim, eps=eps), g["x_untargeted"])
    close(attacks.targeted_fgsm(x, victim, target=lambda _: g["target_action"], eps=eps), g["x_targeted"])


def test_tabular_attack_and_its_bounds():
    g = load("tabular_attack")
    solve = partial(tabular_attack, g["P"], g["reward_adv"], gamma=float(g["gamma"]))
    own = nn.functional.one_hot(g["victim_action"], 3).bool()
    nothing, full = solve(allowed=own)[0], solve(allowed=torch.ones_like(own))[0]
    best, action = solve(allowed=g["inducible"])
    close(nothing, g["v_no_attack"])
    close(best, g["v_best_attack"])
    close(full, g["v_full_control"])
    assert torch.equal(action, g["a_best_attack"])
    assert (nothing <= best + 1e-9).all() and (best <= full + 1e-9).all()
    with pytest.raises(ValueError, match="state 0 has no allowed action"):
        solve(allowed=torch.zeros_like(own))
