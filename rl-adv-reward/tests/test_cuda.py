"""Losses, training, resuming, attacks, evaluation and table rows on a CUDA device, held against the CPU."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl_adv_reward import experiments
from rl_adv_reward.atn import ATN, AttackedQ
from rl_adv_reward.attacks import ATNAttack, make_attack
from rl_adv_reward.envs.wrappers import AttackVectorWrapper
from rl_adv_reward.evaluation import evaluate
from rl_adv_reward.experiments import run_tables, tables
from rl_adv_reward.learners import Distiller, QLearner
from rl_adv_reward.models import Smoothed, Victim, mlp, nature_cnn
from rl_adv_reward.play import Play
from rl_adv_reward.replay import Batch
from rl_adv_reward.rewards import make_reward
from rl_adv_reward.train import fit, make_fabric, own_reward

DEVICE = "cuda"
TABLE = next(table for table in tables() if table.id == "table-1")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GAMES = {"minipong": ((2, 10, 10), 3, mlp), "pong": ((4, 84, 84), 6, nature_cnn)}


def learner_of(kind, game, small, fabric, hardened=0.0):
    """Fresh weights from a fixed seed, on the CPU before they are moved."""
    shape, actions, network = GAMES[game]
    settings = small(env=game)
    torch.manual_seed(0)
    q, critic, atn = network(shape, actions), network(shape, actions), ATN(shape, 0.1)
    q[-1].weight.data.mul_(5)  # so that actions matter
    critic[-1].weight.data.mul_(5)
    if kind == "victim":
        return QLearner(q, settings.loop("victim"), fabric, hardened)
    victim = Victim(q).to(fabric.device)
    if kind == "frozen_q":
        return QLearner(AttackedQ(atn, victim), settings.loop("frozen"), fabric)
    return Distiller(atn, victim, critic, 0.05, 0, settings.distill_loop(), fabric, kind)


def batch_of(game, device, n=32):
    shape, actions, _ = GAMES[game]
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, n, *shape), generator=g, dtype=torch.uint8)
    parts = (
        frames[0],
        torch.randint(actions, (n,), generator=g),
        torch.rand(n, generator=g),
        torch.rand(n, generator=g) < 0.3,
        torch.full((n,), 0.9),
        frames[1],
        torch.ones(n),
    )
    return Batch(*(part.to(device) for part in parts))


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("kind", ["victim", "hardened", "frozen_q", "stack", "frame"])
def test_losses_and_gradients_are_the_cpu_s(small, kind, game):
    """From equal weights and transitions: bf16 against float32."""
    losses, gradients = [], []
    for fabric in (make_fabric("cpu"), make_fabric(DEVICE)):
        hardened = 0.01 if kind == "hardened" else 0.0
        learner = learner_of("victim" if hardened else kind, game, small, fabric, hardened)
        loss = learner.loss(batch_of(game, fabric.device))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in learner.q.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.9, cosine


def weights(learner):
    return torch.cat([p.detach().cpu().flatten() for p in learner.q.parameters()])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["victim", "frozen_q", "frame"])
def test_an_interrupted_run_ends_where_the_whole_one_does(tmp_path, small, kind, compile):
    class Stop(Exception):
        pass

    def stop(iteration):
        if iteration == 45:
            raise Stop

    fabric, goal = make_fabric(DEVICE), make_reward("aim_top", "minipong")

    def run(before=lambda iteration: None, checkpoint=None):
        learner = learner_of(kind, "minipong", small, fabric)
        options = {"checkpoint": checkpoint, "checkpoint_every": 20, "before": before, "compile": compile}
        loop = small(frozen_iterations=60).loop("frozen")
        trained = fit(learner, goal, loop, 3, fabric, **options)
        assert trained.iterations == 60
        return weights(learner)

    start, whole = weights(learner_of(kind, "minipong", small, fabric)), run()
    with pytest.raises(Stop):
        run(stop, tmp_path / "c.pt")
    torch.manual_seed(99)
    resumed = run(checkpoint=tmp_path / "c.pt")
    assert (whole - start).norm() > 0
    assert (resumed - whole).norm() < 0.05 * (whole - start).norm()


def test_pong_trains(tmp_path, small):
    fabric = make_fabric(DEVICE)
    loop = small(env="pong", num_envs=4, capacity=400, batch_size=16, victim_iterations=40).loop("victim")
    learner = learner_of("victim", "pong", small, fabric)
    start = weights(learner)
    trained = fit(learner, own_reward, loop, 0, fabric, checkpoint=tmp_path / "c.pt", compile=True)
    assert trained.iterations == loop.iterations and not torch.equal(weights(learner), start)
    assert all(p.device.type == DEVICE and p.dtype == torch.float32 for p in learner.q.parameters())
    atn = learner_of("frozen_q", "pong", small, fabric)
    fit(atn, make_reward("aim_top", "pong"), loop, 0, fabric)


ATTACKS = (
    "none",
    "random-uniform",
    "random-sign",
    "fgsm",
    "pgd",
    "mad",
    "timed",
    "targeted-fgsm",
    "targeted-pgd",
    "atn",
)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_the_cpu_s(name, norm):
    """Float32 on both; the sign of a gradient near zero may fall the other way."""
    shape, actions, network = GAMES["pong"]
    torch.manual_seed(0)
    module, atn = network(shape, actions), ATN(shape, 0.05, norm)
    x = torch.randint(0, 256, (4, *shape), generator=torch.Generator().manual_seed(0)) / 255
    found = []
    for device in ("cpu", DEVICE):
        victim = Victim(copy.deepcopy(module)).to(device)
        attack = make_attack(
            name,
            eps=0.05,
            norm=norm,
            generator=torch.Generator(device).manual_seed(0),
            target=lambda x: torch.ones(len(x), dtype=torch.int64, device=x.device),
            atn=atn.to(device),
            steps=2,
        )
        x_adv = attack(x.to(device), victim)
        delta = (x_adv - x.to(device)).cpu()
        size = delta.abs().amax() if norm == "linf" else delta.flatten(1).norm(dim=1).amax()
        assert x_adv.dtype == torch.float32 and size <= 0.05 + 1e-5
        found.append(x_adv.cpu())
    if name not in ("random-uniform", "random-sign", "mad"):  # draw on the device
        assert ((found[0] - found[1]).abs() > 1e-3).double().mean() < 0.05


def test_evaluation_is_the_cpu_s(victim):
    """A linear network's actions hardly depend on rounding: the same episodes on both."""
    goal = make_reward("aim_top", "minipong")
    found = []
    for device in ("cpu", DEVICE):
        own = Victim(copy.deepcopy(victim.module)).to(device)
        options = {"eps": 0.05, "episode_steps": 100, "keep_frames": 2}
        for temporal in ("stack", "frame"):
            attack = make_attack("fgsm", eps=0.05)
            found.append(evaluate(own, attack, goal, "minipong", 8, 1, temporal=temporal, **options).metrics())
    for ours, theirs in zip(found[2:], found[:2], strict=True):
        assert ours["linf"] == pytest.approx(theirs["linf"], abs=1e-6) and ours["excess"] <= 1e-6
        assert ours["episode_steps"] == pytest.approx(theirs["episode_steps"], rel=0.2)
        assert ours["flip_rate"] == pytest.approx(theirs["flip_rate"], abs=0.1)


def test_a_smoothed_victim_and_pong_are_evaluated():
    shape, actions, network = GAMES["pong"]
    torch.manual_seed(0)
    victim = Victim(Smoothed(network(shape, actions), shape, 0.05, copies=2)).to(DEVICE)
    atn = ATN(shape, 0.05).to(DEVICE)
    found = evaluate(victim, ATNAttack(atn), make_reward("aim_top", "pong"), "pong", 2, 0, eps=0.05, episode_steps=20)
    assert found.excess <= 1e-6 and found.metrics()["episode_steps"] > 0
    play = Play("pong", 2, 0, torch.device(DEVICE))
    assert play.obs.device.type == DEVICE


def test_an_environment_is_attacked_from_the_device(victim):
    class Noise(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (2, 10, 10), np.uint8)
        action_space = gym.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.np_random.integers(0, 256, (2, 10, 10), dtype=np.uint8), {}

        def step(self, action):
            return self.reset()[0], 0.0, False, False, {}

    envs = gym.vector.SyncVectorEnv([Noise, Noise])
    attack = make_attack("fgsm", eps=0.05, quantize=True)
    wrapped = AttackVectorWrapper(envs, attack, victim.to(DEVICE), eps=0.05, device=DEVICE)
    obs, info = wrapped.reset(seed=0)
    assert obs.dtype == np.uint8 and 0 < info["attack"]["linf"].max() <= 0.05


@pytest.mark.parametrize("row", ["aim_top: MAD", "aim_top: ATN, frozen_q", "aim_top: ATN, critic"])
def test_a_row_of_a_table(tmp_path, monkeypatch, row):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (record,) = run_tables([TABLE], "smoke", rows=[row]).records()
    assert record["precision"] == "bf16-mixed" and record["device"] == torch.cuda.get_device_name()
    assert record["metrics"]["excess"] <= 1e-6 and record["metrics"]["episode_steps"] > 0
