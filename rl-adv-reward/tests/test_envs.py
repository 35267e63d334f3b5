"""MiniPong by its rules, ALE against the recording, the replay against what the environments gave, the wrappers."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl_adv_reward.attacks import make_attack
from rl_adv_reward.dqn import window_returns
from rl_adv_reward.envs import check_envs, make_envs
from rl_adv_reward.envs.minipong import MiniPongVec
from rl_adv_reward.envs.wrappers import AttackVectorWrapper, AttackWrapper
from rl_adv_reward.play import Play
from rl_adv_reward.replay import Replay
from rl_adv_reward.train import own_reward

GOLDEN = Path(__file__).parent / "golden"


def perfect(envs):
    """Follows the ball."""
    return np.sign(np.rint(envs.y - (envs.top + 1.5))).astype(int) + 1


# ---- MiniPong ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_minipong_passes_gymnasium_s_checker():
    check_env(gym.make("MiniPong-v0", render_mode="rgb_array").unwrapped)
    envs = gym.make_vec("MiniPong-v0", num_envs=3)
    assert envs.reset(seed=0)[0].shape == (3, 2, 10, 10)


def test_perfect_play_never_misses_and_random_play_loses():
    envs, rng = MiniPongVec(32), np.random.default_rng(0)
    totals = {}
    for name in ("perfect", "random"):
        envs.reset(seed=1)
        rewards, crossings = [], 0
        for _ in range(600):
            actions = perfect(envs) if name == "perfect" else rng.integers(0, 3, 32)
            _, reward, _, _, info = envs.step(actions)
            rewards.append(reward)
            crossings += (info["crossing_y"] >= 0).sum()
        totals[name] = np.array(rewards), crossings
    assert (totals["perfect"][0] >= 0).all() and 60 < 1000 * totals["perfect"][1] / (600 * 32) < 80
    assert -60 < 1000 * totals["random"][0].mean() < -40


def test_episodes_end_and_restart_as_next_step_says():
    envs = MiniPongVec(4)
    envs.reset(seed=0)
    for step in range(1, 301):
        obs, _, terminated, truncated, _ = envs.step(perfect(envs))
        assert (terminated | truncated)[truncated].all()
        if step < 300:
            assert not truncated.any()
    lasting = truncated.copy()
    assert lasting.any()
    obs, reward, terminated, truncated, info = envs.step(np.zeros(4, int))
    assert (reward[lasting] == 0).all() and not (terminated | truncated)[lasting].any()
    assert np.array_equal(obs[lasting, 0], obs[lasting, 1])  # a first frame, twice
    assert (envs.steps[lasting] == 0).all() and (info["crossing_y"][lasting] == -1).all()

    envs = MiniPongVec(1)
    envs.reset(seed=0)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = envs.step(np.array([0]))
        total, over = total + (reward[0] < 0), terminated[0] or truncated[0]
    assert terminated[0] and total == 5


def test_state_and_restore_repeat_the_game():
    envs = MiniPongVec(8)
    envs.reset(seed=3)
    actions = np.random.default_rng(0).integers(0, 3, (40, 8))
    for action in actions[:20]:
        envs.step(action)
    state = envs.state()
    first = [envs.step(action)[0] for action in actions[20:]]
    other = MiniPongVec(8)
    other.restore(state)
    assert all(np.array_equal(a, other.step(action)[0]) for a, action in zip(first, actions[20:], strict=True))


def test_frames_show_the_game():
    envs = MiniPongVec(5)
    obs, _ = envs.reset(seed=0)
    for _ in range(30):
        obs = envs.step(perfect(envs))[0]
        for i in range(5):
            ball = np.argwhere(obs[i, 1] == 236)
            assert ball.tolist() == [[round(envs.y[i]), envs.x[i]]]
            assert np.flatnonzero(obs[i, 1, :, 9] == 147).tolist() == list(
                range(int(envs.top[i]), int(envs.top[i]) + 4)
            )
            assert (obs[i, 1, :, 0] == 148).sum() == 4


# ---- ALE ------------------------------------------------------------


def test_ale_gives_the_recorded_preprocessing():
    from ale_py.vector_env import AtariVectorEnv

    envs = AtariVectorEnv("pong", 1, noop_max=0, reward_clipping=False, use_fire_reset=False)
    with np.load(GOLDEN / "preprocess.npz") as file:
        stacks, actions, rewards = file["stacked_obs"], file["action"], file["reward"]
    assert np.array_equal(envs.reset(seed=11)[0][0], stacks[0])
    for action, reward, stack in zip(actions, rewards, stacks[1:], strict=True):
        obs, given, *_ = envs.step(np.array([action]))
        assert np.array_equal(obs[0], stack) and given[0] == reward


# ---- replay ------------------------------------------------------------


@pytest.mark.parametrize("env, steps, rows", [("minipong", 700, 500), ("pong", 60, 40)])
def test_the_replay_gives_back_what_the_environments_gave(env, steps, rows):
    play = Play(env, 4, 0, torch.device("cpu"))
    padding = "first" if env == "minipong" else "zero"
    shape = play.envs.single_observation_space.shape
    replay = Replay(4 * rows, 4, shape, padding, "cpu")
    n_actions = play.envs.single_action_space.n
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(steps):
        obs, age = play.obs, play.age
        if env == "minipong" and torch.rand((), generator=generator) < 0.9:
            action = torch.from_numpy(perfect(play.envs))
        else:
            action = torch.randint(n_actions, (4,), generator=generator)
        reward, _, terminated, truncated, valid, _ = play.step(action, own_reward)
        replay.add(obs, age, action, reward, terminated, truncated, valid)
        seen.append((obs, action, reward, terminated, truncated, valid))
    first = steps - rows
    for t in range(first + shape[0], steps):
        row = torch.full((4,), t % rows)
        assert torch.equal(replay.stacked(row, torch.arange(4)), seen[t][0]), t
    if env == "minipong":
        assert any(s[4].any() for s in seen) and any((~s[5]).any() for s in seen)

    torch.manual_seed(0)
    batch = replay.sample(64, n_step=3, gamma=0.9)
    dummies = 0
    lookup = {}
    for t in range(first + shape[0] - 1, steps - 3):
        for e in range(4):
            lookup.setdefault(seen[t][0][e].numpy().tobytes(), []).append((t, e))
    for i in range(64):
        origins = lookup[batch.obs[i].numpy().tobytes()]
        matches = 0
        for t, e in origins:
            window = [torch.stack([seen[t + k][part][e : e + 1] for k in range(3)]) for part in (2, 3, 4)]
            returns, dead, discount, length = window_returns(
                *(w.float() if w.dtype == torch.float64 else w for w in window), 0.9
            )
            matches += bool(
                batch.action[i] == seen[t][1][e]
                and abs(float(batch.returns[i] - returns[0])) < 1e-6
                and batch.terminated[i] == dead[0]
                and batch.weight[i] == float(seen[t][5][e])
                and torch.equal(batch.next_obs[i], seen[t + int(length[0])][0][e])
            )
        assert matches, i
        dummies += batch.weight[i] == 0
    assert dummies < 8


def test_truncation_bootstraps_and_termination_does_not():
    reward = torch.ones(3, 3)
    terminated, truncated = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    terminated[1, 0], truncated[1, 1] = True, True
    returns, dead, discount, steps = window_returns(reward, terminated, truncated, 0.5)
    assert returns.tolist() == [1.5, 1.5, 1.75] and dead.tolist() == [True, False, False]
    assert steps.tolist() == [2, 2, 3] and discount.tolist() == [0.25, 0.25, 0.125]


def test_a_cut_keeps_returns_from_reaching_across():
    replay = Replay(80, 2, (2, 10, 10), "first", "cpu")
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    frame = torch.zeros(2, 2, 10, 10, dtype=torch.uint8)
    for step in range(10):
        replay.add(frame, torch.full((2,), step), torch.zeros(2, dtype=torch.int64), torch.zeros(2), no, no, yes)
    replay.cut(3)
    assert replay.valid[:7].all() and not replay.valid[7:].any()


def test_a_replay_that_is_too_small_or_empty():
    with pytest.raises(ValueError, match="capacity must be above 12"):
        Replay(12, 4, (2, 10, 10), "first", "cpu")
    with pytest.raises(ValueError, match="hold no return"):
        Replay(80, 2, (2, 10, 10), "first", "cpu").sample(4)


# ---- wrappers ------------------------------------------------------------


class Toy(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space
        space.seed(0)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


@pytest.mark.parametrize("dtype, high", [(np.uint8, 255), (np.float32, 1)])
def test_the_wrapper_attacks_what_the_policy_sees_and_keeps_the_bound(victim, dtype, high):
    eps = 0.05
    env = Toy(gym.spaces.Box(0, high, (2, 10, 10), dtype))
    wrapped = AttackWrapper(env, make_attack("fgsm", eps=eps), victim, eps=eps)
    obs, info = wrapped.reset()
    clean = info["attack"]["clean_obs"]
    assert obs.dtype == dtype and not np.array_equal(obs, clean)
    assert np.abs(obs.astype(float) - clean.astype(float)).max() / high <= eps + 1e-6
    assert 0 < info["attack"]["linf"] <= eps + 1e-6
    obs, *_, info = wrapped.step(0)
    assert wrapped.observation_space.contains(obs)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_the_vector_wrapper_works_in_both_autoreset_modes(victim, mode):
    envs = SyncVectorEnv([lambda: Toy(gym.spaces.Box(0, 255, (2, 10, 10), np.uint8))] * 2, autoreset_mode=mode)
    wrapped = AttackVectorWrapper(envs, make_attack("fgsm", eps=0.1), victim, eps=0.1)
    wrapped.reset(seed=0)
    for _ in range(3):
        obs, *_, info = wrapped.step(np.zeros(2, int))
        assert obs.shape == (2, 2, 10, 10) and info["attack"]["linf"].shape == (2,)
        assert (info["attack"]["linf"] <= 0.1).all() and (info["attack"]["linf"] > 0.09).all()


@pytest.mark.parametrize(
    "space, message",
    [
        (gym.spaces.Discrete(3), "Box of shape"),
        (gym.spaces.Box(0, 1, (4,), np.float32), "Box of shape"),
        (gym.spaces.Box(0, 1, (2, 10, 10), np.float64), "uint8 or float32, got float64"),
        (gym.spaces.Box(0, 255, (2, 10, 10), np.float32), r"must lie in \[0, 1\], got \[0.0, 255.0\]"),
        (gym.spaces.Box(-1, 1, (2, 10, 10), np.float32), r"must lie in \[0, 1\]"),
    ],
)
def test_observation_spaces_that_do_not_fit(victim, space, message):
    with pytest.raises(ValueError, match=message):
        AttackWrapper(Toy(space), make_attack("fgsm", eps=0.1), victim, eps=0.1)


def test_environments_that_do_not_fit(victim):
    box = gym.spaces.Box(0, 255, (2, 10, 10), np.uint8)
    with pytest.raises(ValueError, match="autoreset_mode must be"):
        check_envs(SyncVectorEnv([lambda: Toy(box)], autoreset_mode=AutoresetMode.SAME_STEP))
    check_envs(SyncVectorEnv([lambda: Toy(box)], autoreset_mode=AutoresetMode.NEXT_STEP))
    with pytest.raises(ValueError, match="uint8 for the replay"):
        check_envs(SyncVectorEnv([lambda: Toy(gym.spaces.Box(0, 1, (2, 10, 10), np.float32))]))
    with pytest.raises(ValueError, match="env must be one of"):
        make_envs("pung", 1)
    with pytest.raises(ValueError, match=r"eps must lie in \[0, 1\]"):
        AttackWrapper(Toy(box), make_attack("none", eps=0.1), victim, eps=2.0)
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        MiniPongVec(0)
    with pytest.raises(ValueError, match=r"actions must be \(2,\)"):
        MiniPongVec(2).step(np.zeros(3, int))
