"""Archives of stable-baselines3, read without it: the same values and actions as theirs, or one line."""

import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from rl_adv_reward.files import load_victim

stable_baselines3, sb3_contrib = map(pytest.importorskip, ("stable_baselines3", "sb3_contrib"))
pytestmark = pytest.mark.filterwarnings("ignore")


class Board(gym.Env):
    """Noise: only the spaces matter."""

    def __init__(self, shape=(2, 36, 36), actions=None, low=0, high=255, dtype=np.uint8):
        self.observation_space = gym.spaces.Box(low, high, shape, dtype)
        self.action_space = actions or gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


SMALL = {"DQN": {"buffer_size": 10}, "QRDQN": {"buffer_size": 10}, "PPO": {"n_steps": 8}, "A2C": {}}


def saved(path, algorithm="DQN", policy="MlpPolicy", env=None, **options):
    torch.manual_seed(0)
    kind = getattr(sb3_contrib if algorithm == "QRDQN" else stable_baselines3, algorithm)
    model = kind(policy, env or Board(), device="cpu", policy_kwargs=options, **SMALL[algorithm])
    with torch.no_grad():
        for parameter in model.policy.parameters():  # as an agent that has learned: no two actions alike
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
    model.save(path)
    model.policy.set_training_mode(False)
    return model


@pytest.mark.parametrize(
    "algorithm, policy, options",
    [
        ("DQN", "CnnPolicy", {}),
        ("DQN", "CnnPolicy", {"normalize_images": False}),
        ("DQN", "MlpPolicy", {"net_arch": [32]}),
        ("DQN", "MlpPolicy", {"activation_fn": nn.ELU}),
        ("PPO", "CnnPolicy", {}),
        ("PPO", "MlpPolicy", {"normalize_images": False, "share_features_extractor": False}),
        ("PPO", "MlpPolicy", {"net_arch": []}),
        ("A2C", "MlpPolicy", {"activation_fn": nn.ReLU}),
    ],
)
def test_values_and_actions_are_theirs(tmp_path, algorithm, policy, options):
    model = saved(tmp_path / "model.zip", algorithm, policy, **options)
    victim = load_victim(tmp_path / "model.zip", "pong", "sb3")
    frames = torch.randint(0, 256, (200, 2, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert victim.act(frames).tolist() == model.predict(frames.numpy(), deterministic=True)[0].tolist()
    with torch.no_grad():
        if algorithm == "DQN":
            ours, theirs = victim.q(frames / 255), model.policy.q_net(frames)
        else:
            ours = victim.q(frames / 255).log_softmax(1)
            theirs = model.policy.get_distribution(frames).distribution.logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_mean_over_quantiles_is_taken(tmp_path):
    model = saved(tmp_path / "qr.zip", "QRDQN", n_quantiles=7)
    frames = torch.randint(0, 256, (3, 2, 36, 36), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.policy.quantile_net(frames).mean(1)
    ours = load_victim(tmp_path / "qr.zip", "pong", "sb3").q(frames / 255)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class OwnExtractor(stable_baselines3.common.torch_layers.BaseFeaturesExtractor):
    def __init__(self, space):
        super().__init__(space, 8)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36 * 36, 8))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "algorithm, options, message",
    [
        ("PPO", {"env": Board(actions=gym.spaces.Box(-1, 1, (2,)))}, "has continuous actions"),
        ("DQN", {"env": Board((4,), low=-1, high=1, dtype=np.float32)}, "expected uint8 observations .C, H, W., got"),
        ("DQN", {"features_extractor_class": OwnExtractor}, "holds a custom network .*Victim.module."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, algorithm, options, message):
    saved(tmp_path / "model.zip", algorithm, **options)
    with pytest.raises(ValueError, match=message) as error:
        load_victim(tmp_path / "model.zip", "pong", "sb3")
    assert "\n" not in str(error.value)


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_victim(tmp_path / "nothing.zip", "pong", "sb3")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a stable-baselines3 archive"):
        load_victim(tmp_path / "text.zip", "pong", "sb3")
    with zipfile.ZipFile(tmp_path / "sac.zip", "w") as archive:
        archive.writestr("data", json.dumps({}))
        torch.save({"actor.mu.weight": torch.zeros(1)}, tmp_path / "policy.pth")
        archive.write(tmp_path / "policy.pth", "policy.pth")
    with pytest.raises(ValueError, match="not a DQN, QR-DQN, PPO or A2C"):
        load_victim(tmp_path / "sac.zip", "pong", "sb3")


def test_an_archive_of_an_old_version_needs_no_gym(tmp_path):
    """Before 2.0 the spaces were those of gym, in pickled parts that cannot be read today."""
    model = saved(tmp_path / "new.zip")
    with zipfile.ZipFile(tmp_path / "new.zip") as new, zipfile.ZipFile(tmp_path / "old.zip", "w") as old:
        text = new.read("data").decode().replace("gymnasium.spaces", "gym.spaces").replace('"_shape"', '"shape"')
        data = json.loads(text)
        for part in data.values():
            if isinstance(part, dict) and ":serialized:" in part:
                part[":serialized:"] = "Z2FyYmFnZQ=="
        old.writestr("data", json.dumps(data))
        old.writestr("policy.pth", new.read("policy.pth"))
    frames = torch.randint(0, 256, (20, 2, 36, 36), dtype=torch.uint8)
    theirs = model.predict(frames.numpy(), deterministic=True)[0]
    assert load_victim(tmp_path / "old.zip", "pong", "sb3").act(frames).tolist() == theirs.tolist()
