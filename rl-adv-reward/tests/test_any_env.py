"""train_attack: anybody's agent in anybody's environment; agents are trained in seconds by stable-baselines3 itself."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from rl_adv_reward import train_attack
from rl_adv_reward.any_env import TrainedAttack, as_policy, read_cleanrl
from rl_adv_reward.models import Victim

stable_baselines3, sb3_contrib = map(pytest.importorskip, ("stable_baselines3", "sb3_contrib"))
pytestmark = pytest.mark.filterwarnings("ignore")


def played(model, env, measure, episodes=3):
    """Mean over the steps of an SB3 model of something that is read from the game."""
    seen = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=100 + seed)
        over = False
        while not over:
            action, _ = model.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            seen.append(measure(env.unwrapped.state))
            over = terminated or truncated
    return np.mean(seen)


def test_an_agent_that_balances_a_pole_is_driven_to_either_side():
    model = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=256, learning_rate=1e-3, device="cpu", seed=0)
    model.learn(2048)
    velocity = {}
    for side in (-1, 1):

        def towards(observation, action, info, side=side):
            return side * observation[1]

        attack = train_attack(model, "CartPole-v1", towards, eps=1.0, steps=1600, gamma=0.9)
        velocity[side] = played(model, attack.wrap(gym.make("CartPole-v1")), lambda state: state[1])
    assert velocity[-1] < velocity[1] - 0.1


def test_a_continuous_agent_is_made_to_swing():
    model = stable_baselines3.TD3(
        "MlpPolicy", "Pendulum-v1", learning_starts=200, train_freq=4, policy_kwargs={"net_arch": [64, 64]},
        device="cpu", seed=0,
    )  # fmt: skip
    model.learn(2000)
    attack = train_attack(
        model, "Pendulum-v1", lambda observation, action, info: observation[2] ** 2 / 64, eps=0.5, steps=3000
    )
    clean, attacked = (
        played(model, env, lambda state: state[1] ** 2)
        for env in (gym.make("Pendulum-v1"), attack.wrap(gym.make("Pendulum-v1")))
    )
    assert attacked > 1.3 * clean


class Catch(gym.Env):
    """One's own class: a bar under a ball that falls on a board of 10 x 10."""

    observation_space = gym.spaces.Box(0, 255, (1, 10, 10), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bar, self.steps = 5, 0
        self.drop()
        return self.drawn(), {"bar": self.bar}

    def drop(self):
        self.column, self.row = int(self.np_random.integers(10)), 0

    def drawn(self):
        frame = np.zeros((1, 10, 10), np.uint8)
        frame[0, self.row, self.column] = 255
        frame[0, 9, self.bar - 1 : self.bar + 2] = 180
        return frame

    def step(self, action):
        self.bar = int(np.clip(self.bar + action - 1, 1, 8))
        self.row, self.steps, reward = self.row + 1, self.steps + 1, 0.0
        if self.row == 9:
            reward = 1.0 if abs(self.column - self.bar) <= 1 else -1.0
            self.drop()
        return self.drawn(), reward, False, self.steps >= 90, {"bar": self.bar}


class Catcher(nn.Module):
    """Follows the ball: a policy of one's own, in the environment's units."""

    def forward(self, x):
        columns = torch.arange(10.0)
        ball, bar = x[:, 0, :9].sum(1) @ columns / 255, x[:, 0, 9] @ columns / (3 * 180)
        return torch.stack([bar - ball, torch.full_like(ball, 0.4), ball - bar], 1)


def test_ones_own_class_and_policy_with_a_reward_read_from_info():
    catcher = Catcher()
    attack = train_attack(
        catcher, Catch, lambda observation, action, info: float(info["bar"] <= 3), eps=0.2, steps=4000
    )
    board = Catch()

    def rate(attacked):
        observation, _ = board.reset(seed=5)
        left = 0
        for _ in range(90):
            seen = attack.observe(observation) if attacked else observation
            assert seen.dtype == np.uint8 and abs(seen.astype(int) - observation).max() <= 0.2 * 255
            action = catcher(torch.as_tensor(seen[None]).float()).argmax(1).item()
            observation, _, _, _, info = board.step(action)
            left += info["bar"] <= 3
        return left / 90

    assert rate(True) > rate(False) + 0.1
    assert not list(catcher.parameters())


@pytest.mark.parametrize(
    "algorithm, game",
    [
        ("DQN", "CartPole-v1"),
        ("QRDQN", "CartPole-v1"),
        ("A2C", "CartPole-v1"),
        ("A2C", "Pendulum-v1"),
        ("SAC", "Pendulum-v1"),
        ("TD3", "Pendulum-v1"),
    ],
)
def test_the_policy_of_every_algorithm_does_what_its_model_does(algorithm, game):
    from rl_adv_reward.any_env import greedy

    library = sb3_contrib if algorithm == "QRDQN" else stable_baselines3
    model = getattr(library, algorithm)("MlpPolicy", game, device="cpu", seed=0)
    observations = np.stack([model.observation_space.sample() for _ in range(20)])
    observations = np.clip(observations, -3, 3)
    x = torch.as_tensor(observations, dtype=torch.float32, device="cpu").requires_grad_()
    out = as_policy(model)(x)
    theirs = model.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(greedy(out, model.action_space).detach().numpy(), theirs, atol=1e-5)
    assert torch.autograd.grad(out.sum(), x)[0].abs().sum() > 0


def test_vector_environments_and_sb3_s_own_are_wrapped():
    from stable_baselines3.common.vec_env import DummyVecEnv

    space = gym.make("CartPole-v1").observation_space
    attack = TrainedAttack(space, 0.5, 0.0, 0.1)
    nn.init.normal_(attack.body[-2].weight)
    for env in (gym.make_vec("CartPole-v1", 3), DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3)):
        wrapped = attack.wrap(env)
        first = wrapped.reset()
        clean = first[0] if isinstance(first, tuple) else first
        assert clean.shape == (3, 4)
        assert np.abs(wrapped.step(np.zeros(3, int))[0]).max() < 2
    x = 0.1 * torch.randn(8, 4)
    moved = (attack(x) - x).abs().max()
    assert 0.01 < moved <= 0.05 + 1e-6


def test_what_cleanrl_saves(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    torch.save({f"network.{name}": value for name, value in network.state_dict().items()}, tmp_path / "dqn")
    x = torch.randn(5, 4)
    torch.testing.assert_close(read_cleanrl(tmp_path / "dqn")(x), network(x))
    atoms, c51 = torch.linspace(-3, 5, 7), nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2 * 7))
    state = {f"network.{name}": value for name, value in c51.state_dict().items()} | {"atoms": atoms}
    torch.save({"model_weights": state, "args": {"env_id": "CartPole-v1", "v_min": -3.0}}, tmp_path / "c51")
    values = [[(logits.softmax(0) * atoms).sum() for logits in c51(each).split(7)] for each in x]
    torch.testing.assert_close(read_cleanrl(tmp_path / "c51")(x), torch.tensor(values))
    mean = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    state = {f"actor_mean.{name}": value for name, value in mean.state_dict().items()}
    torch.save(state | {"actor_logstd": torch.zeros(1, 1), "critic.0.weight": torch.zeros(8, 3)}, tmp_path / "ppo")
    torch.testing.assert_close(read_cleanrl(tmp_path / "ppo")(x[:, :3]), mean(x[:, :3]))
    actor = {
        "fc1.weight": torch.randn(8, 3),
        "fc1.bias": torch.randn(8),
        "fc_mu.weight": torch.randn(1, 8),
        "fc_mu.bias": torch.zeros(1),
    }
    torch.save(
        (actor | {"action_scale": torch.tensor([[2.0]]), "action_bias": torch.tensor([[0.5]])}, {}), tmp_path / "td3"
    )
    hidden = (x[:, :3] @ actor["fc1.weight"].T + actor["fc1.bias"]).relu()
    torch.testing.assert_close(
        read_cleanrl(tmp_path / "td3")(x[:, :3]), (hidden @ actor["fc_mu.weight"].T).tanh() * 2 + 0.5
    )
    torch.save(torch.zeros(3), tmp_path / "tensor")
    with pytest.raises(ValueError, match="tensor: expected a state dict, got Tensor"):
        read_cleanrl(tmp_path / "tensor")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a known CleanRL network"):
        read_cleanrl(tmp_path / "other")


@pytest.mark.parametrize(
    "victim, env, error, message",
    [
        (3, "CartPole-v1", TypeError, "victim must be a model of SB3"),
        (nn.Linear(4, 3), "CartPole-v1", ValueError, r"victim: expected \(8, 2\)"),
        (nn.Linear(4, 2), 3, TypeError, "env must be an id"),
    ],
)
def test_wrong_arguments(victim, env, error, message):
    with pytest.raises(error, match=message):
        train_attack(victim, env, lambda observation, action, info: 0.0, steps=16)


class Still(gym.Env):
    """Shows the same bright observation for ever."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape, dtype):
        self.observation_space = gym.spaces.Box(0, 255 if dtype == np.uint8 else 1, shape, dtype)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.high, {}

    def step(self, action):
        return self.observation_space.high, 0.0, False, False, {}


def policy(x):
    return x.flatten(1)[:, :2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eps": float("nan")}, "eps must be finite and above 0, got nan"),
        ({"eps": -1.0}, "eps must be finite and above 0, got -1"),
        ({"reward": lambda observation, action, info: float("nan")}, "reward must be finite, got nan"),
        ({"victim": lambda x: policy(x).detach()}, "no gradient flows from its output"),
        ({"env": lambda: Still((12, 12, 3), np.uint8)}, r"images must be \(C, H, W\), got \(12, 12, 3\); move the"),
    ],
)
def test_what_would_train_nothing_is_refused(changes, message):
    usual = {"victim": policy, "env": lambda: Still((3, 12, 12), np.uint8), "reward": lambda *step: 0.0, "steps": 16}
    with pytest.raises(ValueError, match=message):
        train_attack(**usual | changes)


@pytest.mark.parametrize("dtype, largest", [(np.uint8, 255.0), (np.float32, 1.0)])
def test_a_victim_sees_images_in_its_own_unit(dtype, largest):
    """A Victim takes [0, 1], whatever the environment shows."""
    env = Still((3, 12, 12), dtype)
    seen = []

    class Noted(nn.Module):
        def forward(self, x):
            seen.append(float(x.detach().max()))
            return policy(x)

    attack = train_attack(Victim(Noted()), lambda: env, lambda *step: 0.0, steps=16, num_envs=2)
    assert max(seen) == pytest.approx(1.0) and attack.scale.max() == largest


def test_small_integers_in_a_table_are_bounded_as_a_share_of_255():
    attack = train_attack(policy, lambda: Still((4, 4), np.uint8), lambda *step: 0.0, eps=0.1, steps=16, num_envs=2)
    assert (attack.scale == 255).all() and (attack.centre == 0).all()
