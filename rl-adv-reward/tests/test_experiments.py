"""Runs, files of victims and attacks, settings and table files."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from torch import nn

from rl_adv_reward import experiments
from rl_adv_reward.atn import ATN
from rl_adv_reward.attacks import none
from rl_adv_reward.evaluation import SUMS, Evaluation, success_share
from rl_adv_reward.experiments import Subject, execute
from rl_adv_reward.files import load_atn, load_victim, save_atn, save_victim
from rl_adv_reward.models import Victim, mlp
from rl_adv_reward.play import Play
from rl_adv_reward.rewards import lose
from rl_adv_reward.settings import PRESETS, Settings
from rl_adv_reward.train import make_fabric

SHAPE = (2, 10, 10)
CPU = make_fabric("cpu")


def test_files_of_victims_and_attacks(tmp_path, victim):
    save_victim(tmp_path / "v.pt", victim, "minipong")
    assert load_victim(tmp_path / "v.pt", "minipong").weights_hash() == victim.weights_hash()
    atn = ATN(SHAPE, 0.1, "l2", background=0.3)
    save_atn(tmp_path / "a.pt", atn)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(load_atn(tmp_path / "a.pt")(x), atn(x))
    for load, message in (
        (lambda: load_victim(tmp_path / "v.pt", "pong"), "a victim of minipong, not of pong"),
        (lambda: load_victim(tmp_path / "a.pt", "minipong"), "holds a atn, expected a victim"),
        (lambda: load_atn(tmp_path / "v.pt"), "holds a victim, expected a atn"),
        (lambda: load_victim(tmp_path / "v.pt", "minipong", "keras"), "format must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize("atoms", (None, torch.linspace(-10, 10, 11)))
def test_a_file_of_cleanrl_s_is_a_victim(tmp_path, atoms):
    theirs = nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        nn.Linear(512, 6 if atoms is None else 6 * 11),
    )  # fmt: skip
    state = {f"network.{name}": value for name, value in theirs.state_dict().items()}
    c51 = {"model_weights": state | {"atoms": atoms}, "args": {"n_atoms": 11}}
    torch.save(state if atoms is None else c51, tmp_path / "dqn.pt")
    victim = load_victim(tmp_path / "dqn.pt", "pong", "cleanrl")
    frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    expected = theirs(frames / 255.0)
    if atoms is not None:
        expected = torch.einsum("nak,k->na", expected.view(3, 6, 11).softmax(2), atoms)
    torch.testing.assert_close(victim.q(frames / 255), expected)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not the state dict of CleanRL"):
        load_victim(tmp_path / "other.pt", "pong", "cleanrl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_victim(tmp_path / "nothing.pt", "pong", "cleanrl")


def test_runs_share_what_they_train_and_a_weak_victim_is_refused(tmp_path, small):
    first = execute(asdict(small(attack="none")), 0, store=tmp_path)
    stored = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    second = execute(asdict(small(attack="fgsm")), 0, store=tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == stored and len(stored) == 1
    assert first.details["victim_hash"] == second.details["victim_hash"]
    other = execute(asdict(small(attack="none")), 0, store=tmp_path, precision="bf16-mixed")
    assert (first.precision, other.precision) == ("32-true", "bf16-mixed") and len(list(tmp_path.glob("*.pt"))) == 2
    assert other.details["victim_hash"] != first.details["victim_hash"]
    attacked = execute(asdict(small(attack="atn", learner="frozen_q", goal="park", compare=True)), 0, store=tmp_path)
    assert {"lead_low", "gain", "success"} <= attacked.metrics.keys()
    assert len(attacked.details["curve"]) == 4 and attacked.metrics["linf"] <= 0.05 + 1e-6
    with pytest.raises(RuntimeError, match="too weak to be worth an attack after 90 iterations: miss_rate"):
        execute(asdict(small(victim_check_episodes=4)), 0, store=tmp_path)


def test_the_users_own_victim_is_attacked_and_one_with_logits_needs_the_critic(tmp_path, victim, small):
    subject = Subject(small(attack="atn", goal="aim_top"), 0, CPU, tmp_path, victim)
    assert subject.evaluate("atn").linf <= 0.05 + 1e-6 and not list(tmp_path.glob("victim-*"))
    policy = Victim(mlp(SHAPE, 3), output="logits")
    with pytest.raises(ValueError, match="frozen_q needs a victim with action values"):
        Subject(small(learner="frozen_q"), 0, CPU, tmp_path, policy).evaluate("atn")
    with pytest.raises(ValueError, match="the attack is made for observations"):
        subject.use(ATN((4, 84, 84), 0.1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attack": "fgms"}, "attack must be one of"),
        ({"learner": "q"}, "learner must be one of"),
        ({"temporal": "frames"}, "temporal must be one of"),
        ({"temporal": "frame", "norm": "l2"}, "needs norm 'linf'"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"victim_gamma": 1.0}, r"victim_gamma must lie in \[0, 1\)"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


SCALES = {"smoke": "smoke", "embedded": "minipong", "atari-short": "pong-short", "paper": "pong"}
OF_A_ROW = {"goal", "attack", "target", "learner", "measure", "transfer", "compare", "norm", "quantize", "temporal"}


def test_each_scale_is_its_preset():
    for table in experiments.tables():
        for name, scale in table.scales.items():
            if not all(row.home for row in table.rows):
                preset, resolved = PRESETS[SCALES[name]], Settings(**scale.settings)
                assert not OF_A_ROW & scale.settings.keys()
                for field in fields(Settings):
                    if field.name not in OF_A_ROW:
                        assert getattr(resolved, field.name) == getattr(preset, field.name), (
                            table.id,
                            name,
                            field.name,
                        )


@pytest.mark.parametrize("attack", ["atn", "fgsm", "pgd", "mad", "targeted-pgd"])
def test_a_bound_of_0_changes_no_action(tmp_path, small, attack):
    settings = asdict(small(attack=attack, target="0", eps=0.0, learner="frozen_q", goal="park"))
    assert execute(settings, 0, store=tmp_path).metrics["same_trajectory"] == 1


# ---- what is compared, and with whom ------------------------------------------------------------


def found(returns, steps=100):
    episodes = {name: np.zeros(len(returns)) for name in SUMS}
    episodes |= {"adv_return": np.array(returns, float), "steps": np.full(len(returns), float(steps))}
    return Evaluation(episodes, 0.0, 0.0, np.zeros(20, int), float("nan"), "", len(returns), {})


def test_success_is_above_the_95th_percentile_of_no_attack():
    nothing = found(range(100))
    assert success_share(found([50] * 4), nothing) == 0
    assert success_share(found([93, 94, 95, 99]), nothing) == 0.5


def test_the_score_is_0_at_no_attack_and_1_at_full_control(tmp_path, victim, small, monkeypatch):
    subject = Subject(small(goal="aim_top"), 0, CPU, tmp_path, victim)
    monkeypatch.setattr(subject, "evaluate", lambda name, *_: found([3.0] if name == "control" else [1.0]))
    half = subject.compare(found([2.0]))
    assert half["normalised_score"] == 0.5 and half["above_half"] == 0 and half["lead"] == 10
    assert subject.compare(found([1.0]))["normalised_score"] == 0


def test_the_critic_begins_as_the_victim(tmp_path, victim, small, monkeypatch):
    subject = Subject(small(), 0, CPU, tmp_path, victim)
    monkeypatch.setattr(subject, "fit", lambda *_: [])
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(subject.critic(x), victim.q(x))


def seen_by(monkeypatch):
    """The victims that evaluations are given."""
    victims = []

    def look(victim, *_, **__):
        victims.append(victim)
        return found([1.0])

    monkeypatch.setattr(experiments, "evaluate", look)
    return victims


def test_a_transferred_attack_meets_the_other_victim_and_a_defence_is_in_front(
    tmp_path, victim, make_victim, small, monkeypatch
):
    victims = seen_by(monkeypatch)
    other = make_victim(1)
    subject = Subject(small(transfer=1), 0, CPU, tmp_path, victim)
    monkeypatch.setattr(subject, "train_victim", lambda seed: other if seed == 1 else victim)
    subject.evaluate("fgsm")
    assert victims[-1].weights_hash() == other.weights_hash()
    smoothed = Subject(small(smoothing=0.1), 0, CPU, tmp_path, victim)
    smoothed.evaluate("fgsm")
    x = torch.rand(3, *SHAPE)
    noisy = [victim.q(x + each) for each in victims[-1].module.noise]
    assert abs(victims[-1].module.noise.std() - 0.1) < 0.01
    torch.testing.assert_close(victims[-1].q(x), torch.stack(noisy).mean(0))
    learners = []
    monkeypatch.setattr(smoothed, "fit", lambda kind, seed, learner, *_: learners.append(learner) or [])
    assert smoothed.atn and learners[-1].victim is smoothed.defended


def test_an_evaluation_is_kept_and_another_one_is_not_taken_for_it(tmp_path, victim, small, monkeypatch):
    victims = seen_by(monkeypatch)
    variants = [
        {}, {"eps": 0.04}, {"norm": "l2"}, {"quantize": True}, {"temporal": "frame"}, {"goal": "aim_bottom"},
        {"measure": "aim_bottom"}, {"low": 0.2}, {"episodes": 5}, {"episode_steps": 50}, {"pgd_steps": 2},
        {"smoothing": 0.1},
    ]  # fmt: skip
    for repeat in range(2):
        for changes in variants:
            Subject(small(**changes), 0, CPU, tmp_path, victim).evaluate("targeted-pgd", "1")
        assert len(victims) == len(variants), repeat
    subject = Subject(small(), 0, CPU, tmp_path, victim)
    for attack, target in (("targeted-pgd", "2"), ("targeted-fgsm", "1"), ("control", "1"), ("none", ""), ("pgd", "")):
        subject.evaluate(attack, target)
    Subject(small(), 1, CPU, tmp_path, victim).evaluate("none")
    assert len(victims) == len(variants) + 6


def test_an_evaluation_comes_back_as_it_was(victim):
    once = experiments.evaluate(victim, none, lose, "minipong", 2, 0, keep_frames=2, episode_steps=30)
    back = Evaluation.from_json(json.loads(json.dumps(once.to_json())))
    assert back.metrics() == once.metrics() and np.array_equal(back.frames["clean"], once.frames["clean"])
    assert (once.episodes["steps"] == 30).all() and back.landings.tolist() == once.landings.tolist()


# ---- long runs, in pieces ------------------------------------------------------------


def test_a_victim_that_fails_its_gate_trains_longer_and_is_given_up_at_last(tmp_path, small, monkeypatch):
    checks = []

    def check(victim, *_, **__):
        checks.append(victim)
        misses = found([0.0])
        misses.episodes["misses"][0] = 10 if len(checks) < 3 else 0  # per 100 steps; the gate is 0.5
        return misses

    monkeypatch.setattr(experiments, "evaluate", check)
    tried = small(victim_check_episodes=2, victim_iterations=24)
    subject = Subject(tried, 0, CPU, tmp_path)
    assert len(checks) == 3 and subject.trained_steps == 3 * 24 * 4
    assert tried.loop("victim").explore[2] * 3 == pytest.approx(tried.victim_explore[2])
    checks.clear()
    with pytest.raises(RuntimeError, match="too weak to be worth an attack after 48 iterations: miss_rate 100.00"):
        Subject(small(victim_check_episodes=2, victim_iterations=24, victim_longest=2), 0, CPU, tmp_path)
    checks[:] = [None] * 3  # all that follow pass
    early = small(victim_check_episodes=2, victim_iterations=24, victim_check_every=8)
    assert Subject(early, 1, CPU, tmp_path).trained_steps == 24 * 4 and len(checks) == 6


def test_a_run_goes_on_at_every_stage(tmp_path, small, monkeypatch):
    """Killed after every second training or evaluation, it ends with the figures of one that was not."""
    settings = asdict(small(attack="atn", compare=True, eval_every=0, episode_steps=20, pgd_steps=1))
    whole = execute(settings, 0, store=tmp_path / "whole")
    begun = []

    class Killed(Exception):
        pass

    def play(*arguments, **options):
        begun.append(arguments)
        if len(begun) > 2:  # the timed attack looks at the victim before it plays
            raise Killed
        return Play(*arguments, **options)

    monkeypatch.setattr("rl_adv_reward.train.Play", play)
    monkeypatch.setattr("rl_adv_reward.evaluation.Play", play)
    for stages in range(1, 40):  # noqa: B007
        begun.clear()
        try:
            pieces = execute(settings, 0, store=tmp_path / "pieces")
            break
        except Killed:
            continue
    assert pieces.metrics == whole.metrics and stages > 5
