"""The learners and their loop: losses by hand, kill and resume, when it ends."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_adv_reward import train as training
from rl_adv_reward.atn import ATN, AttackedQ
from rl_adv_reward.attacks import fgsm, none
from rl_adv_reward.evaluation import evaluate
from rl_adv_reward.learners import Distiller, QLearner
from rl_adv_reward.models import Victim, mlp, nature_cnn
from rl_adv_reward.replay import Batch
from rl_adv_reward.rewards import lose
from rl_adv_reward.settings import PRESETS
from rl_adv_reward.train import fit, make_fabric, own_reward, read

SHAPE = (2, 10, 10)
CPU = make_fabric("cpu")


# ---- learners ------------------------------------------------------------


def batch(n=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2, n, *SHAPE), generator=g, dtype=torch.uint8)
    action = torch.randint(3, (n,), generator=g)
    return Batch(
        frames[0],
        action,
        torch.rand(n, generator=g),
        torch.rand(n, generator=g) < 0.3,
        torch.full((n,), 0.9),
        frames[1],
        torch.ones(n),
    )


def test_the_q_loss_is_double_dqn_by_hand_and_dummies_have_no_weight(small):
    torch.manual_seed(0)
    learner = QLearner(mlp(SHAPE, 3), small().loop("victim"), CPU)
    learner.q[-1].weight.data.mul_(5)  # so that online and target networks disagree
    b = batch()
    x, then = b.obs.float() / 255, b.next_obs.float() / 255
    expected = []
    for i in range(32):
        a = learner.q(then[i : i + 1]).argmax()
        y = b.returns[i] + (0 if b.terminated[i] else 0.9 * learner.target(then[i : i + 1])[0, a])
        error = abs((learner.q(x[i : i + 1])[0, b.action[i]] - y).item())
        expected.append(error**2 / 2 if error < 1 else error - 0.5)
    assert abs(learner.loss(b).item() - np.mean(expected)) < 1e-5
    half = b._replace(weight=(torch.arange(32) < 16).float())
    assert abs(learner.loss(half).item() - np.sum(expected[:16]) / 32) < 1e-5


def test_exploration_falls_linearly_and_then_stays(small):
    loop = replace(small(), victim_iterations=100, victim_explore=(1.0, 0.2, 0.5)).loop("victim")
    learner = QLearner(mlp(SHAPE, 3), loop, CPU)
    assert [round(learner.exploration(i), 3) for i in (0, 25, 50, 99)] == [1.0, 0.6, 0.2, 0.2]


@pytest.mark.parametrize("kind", ["frozen_q", "critic"])
def test_an_update_moves_the_attack_and_never_the_victim(victim, small, kind):
    atn, before = ATN(SHAPE, 0.1), victim.weights_hash()
    if kind == "frozen_q":
        learner = QLearner(AttackedQ(atn, victim), small().loop("frozen"), CPU)
    else:
        learner = Distiller(atn, victim, mlp(SHAPE, 3), 0.05, 0, small().distill_loop(), CPU)
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in atn.parameters()}
    start = [p.clone() for p in atn.parameters()]
    for seed in range(3):
        learner.optimizer.zero_grad()
        learner.loss(batch(seed=seed)).backward()
        learner.optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(start, atn.parameters(), strict=True))
    assert victim.weights_hash() == before


def test_distillation_teaches_the_critic_s_actions(victim, small):
    torch.manual_seed(0)
    atn, critic = ATN(SHAPE, 0.3), mlp(SHAPE, 3)
    learner = Distiller(atn, victim, critic, 0.05, 0, small().distill_loop(), CPU)
    b = batch(256)
    x = b.obs.float() / 255
    wanted = critic(x).argmax(1)
    agree = (victim.q(x).argmax(1) == wanted).double().mean()
    for _ in range(60):
        learner.optimizer.zero_grad()
        learner.loss(b).backward()
        learner.optimizer.step()
    assert (victim.q(atn(x)).argmax(1) == wanted).double().mean() > max(0.9, agree + 0.2)


def test_the_distillation_s_loss_by_hand(victim, small):
    """Weighted by how much the choice matters: max - mean of the critic's values, not their level."""
    torch.manual_seed(0)
    atn, critic = ATN(SHAPE, 0.3), mlp(SHAPE, 3)
    critic[-1].bias.data += 10
    b = batch()
    x, then = b.obs.float() / 255, b.next_obs.float() / 255
    for temporal, shown, seen in (
        ("stack", atn(x), x),
        ("frame", torch.cat([atn(x)[:, 1:], atn(then)[:, -1:]], 1), then),
    ):
        learner = Distiller(atn, victim, critic, 0.05, 0, small().distill_loop(), CPU, temporal)
        wanted, q = critic(seen), victim.q(shown)
        each = torch.nn.functional.cross_entropy(
            (q - q.mean(1, keepdim=True)) / 0.05, wanted.argmax(1), reduction="none"
        )
        torch.testing.assert_close(learner.loss(b), (each * (wanted.amax(1) - wanted.mean(1))).mean())


def test_a_hardened_victim_learns_on_observations_under_fgsm(small):
    torch.manual_seed(0)
    q = mlp(SHAPE, 3)
    plain, hardened = (QLearner(q, small().loop("victim"), CPU, eps) for eps in (0.0, 0.1))
    b = batch()
    attacked = fgsm(b.obs.float() / 255, Victim(copy.deepcopy(q)), eps=0.1)
    target = hardened.target(b.next_obs.float() / 255).amax(1)
    y = b.returns + 0.9 * ~b.terminated * target
    expected = torch.nn.functional.huber_loss(q(attacked).gather(1, b.action[:, None]).squeeze(1), y)
    torch.testing.assert_close(hardened.loss(b), expected)
    assert abs(plain.loss(b) - expected) > 1e-4


# ---- the loop ------------------------------------------------------------


def killed_training(name, slow):
    """What the child of the next test does, and what it is compared with."""
    loop = replace(PRESETS["smoke"], victim_iterations=420, num_envs=4).loop("victim")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learner = QLearner(mlp(SHAPE, 3), loop, CPU)

    def before(iteration):
        assert iteration < loop.iterations, "the training goes on after its last iteration"
        if iteration > 60:
            time.sleep(slow)

    fit(learner, own_reward, loop, 5, CPU, checkpoint=name, checkpoint_every=50, before=before)
    return learner.q.state_dict()


def test_sigkill_and_continue_is_bit_equal(tmp_path):
    path = tmp_path / "killed"
    code = f"import pathlib, runpy; runpy.run_path({__file__!r})['killed_training'](pathlib.Path({str(path)!r}), 0.05)"
    child = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() or read(path)["state"]["iteration"] < 100:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 100 <= read(path)["state"]["iteration"] < 420
    killed, whole = killed_training(path, 0), killed_training(tmp_path / "whole", 0)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def train(loop, path=None, **options):
    torch.manual_seed(0)
    learner = QLearner(mlp(SHAPE, 3, 87 / 255), loop, CPU)

    def bounded(iteration):
        assert iteration < loop.iterations, "the training goes on after its last iteration"

    return learner, fit(learner, own_reward, loop, 0, CPU, checkpoint=path, before=bounded, **options)


def test_a_checkpoint_of_another_run_or_damaged_is_refused(tmp_path, small):
    loop, path = small().loop("victim"), tmp_path / "c.pt"
    train(loop, path)
    assert "replay" not in read(path)  # finished
    with pytest.raises(ValueError, match="of another run .different loop."):
        train(replace(loop, lr=0.5), path)
    with pytest.raises(ValueError, match="of another run .different goal."):
        train(loop, path, identity={"goal": "other"})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a checkpoint of this project .*name another file"):
        train(loop, path)
    with pytest.raises(FileNotFoundError, match="checkpoint not found"):
        read(tmp_path / "nothing.pt")


def test_ale_continues_with_new_episodes_and_all_the_rest(tmp_path, small):
    path = tmp_path / "c.pt"
    settings = small(env="pong", num_envs=2, starts=8, capacity=200, batch_size=4)
    loop = replace(settings, victim_iterations=24, victim_longest=1).loop("victim")

    class Stop(Exception):
        pass

    def stop(iteration):
        if iteration == 20:
            raise Stop

    def learner():
        torch.manual_seed(0)
        return QLearner(nature_cnn((4, 84, 84), 6), loop, CPU)

    with pytest.raises(Stop):
        fit(learner(), own_reward, loop, 0, CPU, checkpoint=path, checkpoint_every=10, before=stop)
    assert read(path)["state"]["iteration"] == 20 and read(path)["play"] is None
    fit(learner(), own_reward, loop, 0, CPU, checkpoint=path, checkpoint_every=10)
    assert read(path)["state"] == {"iteration": 24, "curve": [], "count": 16, "finished": True}


def test_training_ends_when_the_check_says_so_and_nan_is_an_error(small):
    loop = replace(small(), victim_iterations=100).loop("victim")
    _, trained = train(loop, evaluate=lambda i: ({"value": i}, i >= 50), evaluate_every=25)
    assert [point["iteration"] for point in trained.curve] == [25, 50] and trained.iterations == 50
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        train(replace(loop, lr=float("inf")))


def test_a_short_training_learns_to_return_the_ball(small):
    settings = replace(PRESETS["minipong"], victim_iterations=700, victim_explore=(1.0, 0.02, 0.5), num_envs=16)
    learner, _ = train(settings.loop("victim"))
    trained = evaluate(Victim(learner.q), none, lose, "minipong", 8, 1).rate("misses")
    torch.manual_seed(1)
    fresh = evaluate(Victim(mlp(SHAPE, 3, 87 / 255)), none, lose, "minipong", 8, 1).rate("misses")
    assert trained < 0.7 * fresh


class Counting(QLearner):
    """Notes when it acts, learns and is told that an iteration ended."""

    def __init__(self, loop):
        torch.manual_seed(0)
        super().__init__(mlp(SHAPE, 3, 87 / 255), loop, CPU)
        self.acted, self.losses, self.ended = [], [], []

    def act(self, x, iteration):
        self.acted.append(iteration)
        return super().act(x, iteration)

    def loss(self, batch):
        value = super().loss(batch)
        self.losses.append((len(self.acted), value.item(), len(batch.action)))
        return value

    def after(self, iteration):
        self.ended.append(iteration)
        super().after(iteration)


def test_a_training_acts_learns_measures_and_saves_when_it_should(small, monkeypatch, tmp_path):
    """Ten iterations of which the first four only collect, two updates each, measured after 3, 6, 9 and 10."""
    loop = replace(small().loop("victim"), iterations=10, num_envs=4, starts=4, updates=2, batch_size=8)
    learner, saved, begun, save = Counting(loop), [], [], training._save

    def spy(path, run, state, *rest):
        saved.append((path.name, state["iteration"], state["finished"]))
        save(path, run, state, *rest)

    monkeypatch.setattr(training, "_save", spy)
    options = {"evaluate": lambda i: ({"value": 2 * i}, False), "evaluate_every": 3, "before": begun.append}
    path = tmp_path / "c.pt"
    trained = fit(learner, own_reward, loop, 7, CPU, checkpoint=path, checkpoint_every=4, **options)
    assert begun == learner.acted == list(range(10)) and learner.ended == list(range(1, 11))
    assert [at for at, *_ in learner.losses] == [at for at in range(5, 11) for _ in range(2)]
    assert {size for *_, size in learner.losses} == {8}
    assert saved == [("c.pt", 4, False), ("c.pt", 8, False), ("c.pt", 10, True)] and trained.iterations == 10
    values = {at: [value for when, value, _ in learner.losses if when == at] for at in range(5, 11)}
    means = [0, np.mean(values[5] + values[6]), np.mean(values[7] + values[8] + values[9]), np.mean(values[10])]
    assert [point["loss"] for point in trained.curve] == pytest.approx(means, rel=1e-6)
    assert [(point["iteration"], point["value"]) for point in trained.curve] == [(3, 6), (6, 12), (9, 18), (10, 20)]
    content = read(path)
    assert content["run"]["seed"] == 7 and set(content) == {"run", "state", "loss", "modules"}
    assert fit(Counting(loop), own_reward, loop, 7, CPU, checkpoint=path, **options) == trained and len(begun) == 10
    fit(Counting(loop), own_reward, loop, 7, CPU, checkpoint_every=4)
    assert len(saved) == 3


def test_an_unfinished_training_keeps_all_that_the_rest_depends_on(small, tmp_path):
    loop = replace(small().loop("victim"), iterations=10, num_envs=4, starts=4, updates=2, batch_size=8)
    path = tmp_path / "c.pt"

    class Stop(Exception):
        pass

    def stop(iteration):
        if iteration == 8:
            raise Stop

    options = {"checkpoint": path, "checkpoint_every": 8, "identity": {"goal": "own"}}
    with pytest.raises(Stop):
        fit(Counting(loop), own_reward, loop, 7, CPU, before=stop, **options)
    content = read(path)
    assert set(content) == {"run", "state", "loss", "modules", "optimizer", "rng", "replay", "play"}
    assert content["run"] == {"loop": content["run"]["loop"], "seed": 7, "goal": "own"}
    assert content["loss"].item() > 0 and content["state"]["count"] == 4 * 2


@pytest.mark.parametrize("capability, precision", [((7, 5), "32-true"), ((8, 0), "bf16-mixed"), (None, "32-true")])
def test_device_and_precision_follow_the_machine(monkeypatch, capability, precision):
    made = {}
    monkeypatch.setattr("lightning.fabric.Fabric", lambda **options: made.update(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    make_fabric()
    assert made == {"accelerator": "cuda" if capability else "cpu", "devices": 1, "precision": precision}
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    make_fabric("cuda", "32-true")
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    make_fabric("cpu", "bf16-mixed")
    assert (made["accelerator"], made["precision"]) == ("cpu", "bf16-mixed")
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"run": Path("/"), "modules": {}}, tmp_path / "c.pt")  # unpickling calls a constructor
    with pytest.raises(ValueError, match="c.pt: not a checkpoint of this project .*eights only load failed"):
        read(tmp_path / "c.pt")
