"""Runs, files of victims and attacks, settings and table files."""

from dataclasses import asdict, fields

import pytest
import torch
from torch import nn

from rl_adv_reward import experiments
from rl_adv_reward.atn import ATN
from rl_adv_reward.experiments import Subject, execute
from rl_adv_reward.files import load_atn, load_victim, save_atn, save_victim
from rl_adv_reward.models import Victim, mlp
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


def test_a_cleanrl_state_dict_is_a_victim(tmp_path):
    theirs = nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6),
    )  # fmt: skip
    torch.save({f"network.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "dqn.pt")
    victim = load_victim(tmp_path / "dqn.pt", "pong", "cleanrl")
    frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(victim.q(frames / 255), theirs(frames / 255.0))
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
    attacked = execute(asdict(small(attack="atn", learner="frozen_q", goal="park", compare=True)), 0, store=tmp_path)
    assert {"lead_low", "gain", "success"} <= attacked.metrics.keys()
    assert len(attacked.details["curve"]) == 4 and attacked.metrics["linf"] <= 0.05 + 1e-6
    with pytest.raises(RuntimeError, match="too weak to be worth an attack after 30 iterations: miss_rate"):
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
