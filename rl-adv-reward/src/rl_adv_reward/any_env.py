"""`train_attack`: an attack on any agent in any gymnasium environment.

It takes images or vectors, discrete or continuous actions, and your own adversarial reward. The attack is a residual
ATN, x' = clip(x + eps * scale * tanh(f(x))), in front of the frozen agent. It is trained like deterministic policy
gradients: a critic learns the adversarial value of the attacked agent's actions, and f ascends it through the agent.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from rl_adv_reward.atn import ATN
from rl_adv_reward.models import ExpectedReturn, Victim, cleanrl_weights, mlp, nature_cnn

Policy = Callable[[Tensor], Tensor]
"""Maps observations (N, ...), float32 in the environment's units, to values or logits (N, A) or actions (N, *A)."""
Reward = Callable[[Any, Any, dict], float]
"""Maps (observation after the step, action, info) of one environment to the adversarial reward of the step."""

HIDDEN = 128
SETTLING = 300  # steps of unattacked play that the spread of vector observations is estimated from


class TrainedAttack(nn.Module):
    """Result of `train_attack`. Use it through `attack.observe(observation)` or `attack.wrap(env)`.

    Args:
        space: observation space.
        eps: bound on the perturbation of every value, in units of `scale`.
        centre: offset that the network subtracts, a number or (*shape).
        scale: unit of eps, a number or (*shape).
    """

    def __init__(self, space: gym.spaces.Box, eps: float, centre: np.ndarray | float, scale: np.ndarray | float):
        super().__init__()
        self.space, self.eps = space, eps
        for name, value in {"centre": centre, "scale": scale, "low": space.low, "high": space.high}.items():
            self.register_buffer(name, torch.as_tensor(np.broadcast_to(value, space.shape).copy(), dtype=torch.float32))
        if len(space.shape) == 3:
            self.body = ATN(space.shape, 0.0).body
        else:
            last = nn.Linear(HIDDEN, int(np.prod(space.shape)))
            nn.init.normal_(last.weight, std=0.01)  # without training, it changes almost nothing
            self.body = nn.Sequential(mlp(space.shape, HIDDEN), nn.ReLU(), last, nn.Unflatten(1, space.shape))

    def unit(self, x: Tensor) -> Tensor:
        """Observations relative to the centre, in units of scale."""
        return (x - self.get_buffer("centre")) / self.get_buffer("scale")

    def forward(self, x: Tensor) -> Tensor:
        """Attack observations (N, *shape) float32; the result is within the bound and the space."""
        moved = x + self.eps * self.get_buffer("scale") * self.body(self.unit(x)).tanh()
        return torch.minimum(torch.maximum(moved, self.get_buffer("low")), self.get_buffer("high"))

    @torch.no_grad()
    def observe(self, observation: Any) -> np.ndarray:
        """Attack an observation of the environment, or a batch; same shape and dtype."""
        array = np.asarray(observation)
        x = torch.as_tensor(array.reshape(-1, *self.space.shape), dtype=torch.float32)
        x_adv = self(x.to(self.get_buffer("scale").device)).cpu()
        if np.issubdtype(array.dtype, np.integer):
            x_adv = x + (x_adv - x).trunc()  # rounding must not leave the bound
        return x_adv.numpy().astype(array.dtype).reshape(array.shape)

    def wrap(self, env: Any) -> Any:
        """The environment with attacked observations: a gymnasium environment, single or vector, or a VecEnv of SB3."""
        if isinstance(env, VectorEnv):
            return gym.wrappers.vector.TransformObservation(env, self.observe)
        if isinstance(env, gym.Env):
            return gym.wrappers.TransformObservation(env, self.observe, env.observation_space)
        from stable_baselines3.common.vec_env import VecEnvWrapper

        class Attacked(VecEnvWrapper):
            def reset(wrapper) -> Any:
                return self.observe(wrapper.venv.reset())

            def step_wait(wrapper) -> Any:
                observation, *rest = wrapper.venv.step_wait()
                return self.observe(observation), *rest

        return Attacked(env)


class _Critic(nn.Module):
    """Adversarial values (N, A) of discrete actions, or (N, 1) of a given continuous action."""

    def __init__(self, shape: tuple[int, ...], actions: gym.Space):
        super().__init__()
        self.trunk: nn.Module = (nature_cnn if len(shape) == 3 and shape[1] >= 36 else mlp)(shape, HIDDEN)  # type: ignore[arg-type]
        given, out = (0, int(actions.n)) if isinstance(actions, gym.spaces.Discrete) else (_size(actions), 1)
        self.head = nn.Sequential(nn.Linear(HIDDEN + given, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out))

    def forward(self, x: Tensor, action: Tensor | None = None) -> Tensor:
        features = self.trunk(x).relu()
        return self.head(features if action is None else torch.cat([features, action.flatten(1)], 1))


def train_attack(
    victim: Any,
    env: Any,
    reward: Reward,
    *,
    eps: float = 0.1,
    steps: int = 20_000,
    gamma: float = 0.97,
    lr: float = 1e-3,
    explore: float = 0.3,
    batch_size: int = 128,
    num_envs: int = 8,
    seed: int = 0,
    device: str = "cpu",
) -> TrainedAttack:
    """Train an attack that makes an agent earn a different reward.

    Args:
        victim: a model of stable-baselines3, a file saved by CleanRL, a `Victim`, or any function from observations
            (N, ...), float32 in the environment's units, to values or logits (N, A) or continuous actions (N, *A).
            Gradients must flow through it; its weights are never changed (put a module into eval mode yourself).
        env: an id, a function that makes an environment, or one environment (`num_envs` is then ignored).
        reward: (observation after the step, action, info) -> number.
        eps: bound for every value: as a share of 255 for uint8 observations, of 1 for images (C, H, W) in [0, 1],
            otherwise of the value's standard deviation in unattacked play.
        steps: total over all environments.
        gamma: discount of the adversarial reward.
        lr: learning rate of Adam, for critic and attack.
        explore: initial share of random actions; falls to 0.02 over the first half of the training.
        batch_size: transitions per update; there is one update per step of all environments.
        num_envs: number of environments stepped together.
        seed: seed of all random numbers.
        device: device of the networks; your own function must already compute there.

    Raises:
        TypeError: a victim or an environment of another type, or observations that are not a Box.
        ValueError: actions that are neither Discrete nor Box, a victim whose output does not fit them or through which
            no gradient flows, images with the channels last, an eps that is not finite and above 0, or a reward that
            is not finite.
    """
    if not 0 < eps < np.inf:
        raise ValueError(f"eps must be finite and above 0, got {eps}")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    envs = _vector(env, num_envs)
    space, actions, n = envs.single_observation_space, envs.single_action_space, envs.num_envs
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(f"env: observations must be a Box, got {space}")
    if len(space.shape) == 3 and space.shape[2] <= 4 < space.shape[0]:
        raise ValueError(f"env: images must be (C, H, W), got {space.shape}; move the channels to the front")
    actions.seed(seed)
    policy = as_policy(victim, device, _largest(space))

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array), device=device).float()

    def play(observation: np.ndarray, attack: Policy = lambda x: x) -> np.ndarray:
        with torch.no_grad():
            return greedy(policy(attack(tensor(observation))), actions).cpu().numpy()

    observation, _ = envs.reset(seed=seed)
    _check_output(policy(tensor(observation).requires_grad_()), n, actions)
    clean = [observation]
    for _ in range(0 if len(space.shape) == 3 or space.dtype == np.uint8 else SETTLING):
        clean.append(envs.step(play(clean[-1]))[0])
    attack = TrainedAttack(space, eps, *_units(space, np.concatenate(clean))).to(device)
    critic = _Critic(space.shape, actions).to(device)
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizers = [torch.optim.Adam(part.parameters(), lr=lr) for part in (critic, attack)]
    memory: list[tuple] = []
    observation, _ = envs.reset(seed=seed + 1)
    over = np.zeros(n, bool)
    for done in range(0, steps, n):
        chosen = play(observation, attack)
        wild = rng.random(n) < max(0.02, explore * (1 - 2 * done / steps))
        for i in np.flatnonzero(wild):
            chosen[i] = actions.sample()
        after, _, terminated, truncated, info = envs.step(chosen)
        for i in np.flatnonzero(~over):  # if the last step ended an episode, this one only resets
            gained = reward(after[i], chosen[i], {name: each[i] for name, each in info.items()})
            if not np.isfinite(gained):
                raise ValueError(f"reward must be finite, got {gained}")
            memory.append((observation[i], chosen[i], gained, after[i], terminated[i]))
        over, observation = terminated | truncated, after
        if len(memory) >= batch_size:
            rows = [memory[k] for k in rng.integers(len(memory), size=batch_size)]
            x, action, r, then, ended = (tensor(np.array(part)) for part in zip(*rows, strict=True))
            losses = _losses(x, action, r, then, ended, attack, policy, critic, target, actions, gamma)
            for loss, part in zip(losses, (critic, attack), strict=True):
                part.zero_grad()
                loss.backward(inputs=list(part.parameters()))
            for optimizer in optimizers:  # after both losses: the attack's gradient uses the critic before its update
                optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.lerp_(fast, 0.02)
    if not isinstance(env, gym.Env):
        envs.close()
    return attack.requires_grad_(False).eval()


def _losses(
    x: Tensor,
    action: Tensor,
    reward: Tensor,
    then: Tensor,
    ended: Tensor,
    attack: TrainedAttack,
    policy: Policy,
    critic: nn.Module,
    target: nn.Module,
    actions: gym.Space,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Losses of the critic (one-step value of the attacked agent) and of the attack (ascent on the critic)."""
    now, later = attack.unit(x), attack.unit(then)
    out = policy(attack(x))
    with torch.no_grad():
        following = policy(attack(then))
    if not isinstance(actions, gym.spaces.Discrete):
        unit = 2 / torch.as_tensor(actions.high - actions.low, device=x.device)  # type: ignore[attr-defined]
        with torch.no_grad():
            y = reward + gamma * (1 - ended) * target(later, unit * greedy(following, actions)).squeeze(1)
        q = critic(now, unit * action).squeeze(1)
        return smooth_l1_loss(q, y), -critic(now, unit * greedy(out, actions)).mean()
    with torch.no_grad():
        y = reward + gamma * (1 - ended) * target(later).gather(1, following.argmax(1, keepdim=True)).squeeze(1)
    q = critic(now)
    advantage = (q - q.mean(1, keepdim=True)).detach()
    spread = out.std(1, keepdim=True).detach() + 1e-6
    matters = advantage.amax(1)
    push = (cross_entropy(out / spread, q.argmax(1), reduction="none") * matters).mean() / (matters.mean() + 1e-6)
    return smooth_l1_loss(q.gather(1, action.long()[:, None]).squeeze(1), y), push


# ---- victims ------------------------------------------------------------


def as_policy(victim: Any, device: str = "cpu", largest: float = 255.0) -> Policy:
    """Turn any victim of `train_attack` into a differentiable function of observations in 0 .. largest.

    Raises:
        TypeError: a victim of another type.
        ValueError: a file that cannot be read.
    """
    if isinstance(victim, str | Path):
        return read_cleanrl(victim).to(device)
    if isinstance(victim, Victim):
        return lambda x: victim.q(x / largest)
    if hasattr(victim, "policy") and hasattr(victim, "predict"):
        return _of_sb3(victim, device)
    if callable(victim):
        return victim
    raise TypeError(
        f"victim must be a model of SB3, a CleanRL file, a Victim or a function, got {type(victim).__name__}"
    )


def _of_sb3(model: Any, device: str) -> Policy:
    """The network of a DQN, QR-DQN, PPO, A2C, SAC, TD3 or DDPG model, including preprocessing."""
    policy = model.policy.to(device)
    policy.set_training_mode(False)  # like `predict`
    if hasattr(policy, "q_net"):
        return policy.q_net
    if hasattr(policy, "quantile_net"):
        return lambda x: policy.quantile_net(x).mean(1)
    space = model.action_space
    if hasattr(policy, "action_net"):

        def act(x: Tensor) -> Tensor:
            distribution = policy.get_distribution(x).distribution
            return distribution.logits if isinstance(space, gym.spaces.Discrete) else distribution.mean

        return act
    low, high = (torch.as_tensor(end, device=device) for end in (space.low, space.high))

    def unscaled(x: Tensor) -> Tensor:
        actor = policy.actor
        if hasattr(actor, "get_action_dist_params"):  # SAC
            raw = actor.get_action_dist_params(x)[0].tanh()
        else:  # TD3, DDPG
            raw = actor.mu(actor.extract_features(x, actor.features_extractor))
        return low + (raw + 1) / 2 * (high - low)

    return unscaled


def read_cleanrl(path: Path | str) -> nn.Module:
    """A policy saved by CleanRL: dqn, dqn_atari, c51, c51_atari, ppo_continuous_action, ddpg or td3_continuous_action.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or is none of these.
    """
    weights, atoms = cleanrl_weights(Path(path))
    if "network.9.bias" in weights:
        module = Victim.from_cleanrl(path, (weights["network.0.weight"].shape[1], 84, 84)).module
        return nn.Sequential(_Pixels(), module)
    names = [
        name.removesuffix("weight") for name in weights if re.fullmatch(r"(network\.|actor_mean\.|fc)\w+\.weight", name)
    ]
    if not names:
        raise ValueError(f"{path}: not a known CleanRL network; its first weight is {next(iter(weights), None)}")
    layers: list[nn.Module] = []
    for name in names:
        weight = weights[f"{name}weight"]
        if weight.ndim != 2:
            raise ValueError(f"{path}: {name}weight: expected a linear layer, got the shape {tuple(weight.shape)}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{name}bias"]})
        layers += [layer, nn.Tanh() if name.startswith("actor_mean") else nn.ReLU()]
    network = nn.Sequential(nn.Flatten(), *layers[:-1])
    if atoms is not None:
        network.append(ExpectedReturn(atoms))
    return _Scaled(network, weights["action_scale"], weights["action_bias"]) if "action_scale" in weights else network


class _Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 255


class _Scaled(nn.Module):
    """tanh, scaled to the bounds of the actions: the actor of ddpg and td3."""

    def __init__(self, network: nn.Module, scale: Tensor, bias: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).tanh() * self.get_buffer("scale") + self.get_buffer("bias")


# ---- environments ------------------------------------------------------------


def greedy(out: Tensor, actions: gym.Space) -> Tensor:
    """The action of an agent with this output: the best one, or its continuous action clipped to the bounds."""
    if isinstance(actions, gym.spaces.Discrete):
        return out.argmax(1)
    low, high = (torch.as_tensor(end, device=out.device) for end in (actions.low, actions.high))  # type: ignore[attr-defined]
    return torch.minimum(torch.maximum(out.reshape(-1, *low.shape), low), high)


def _vector(env: Any, num_envs: int) -> SyncVectorEnv:
    if isinstance(env, gym.Env):
        makers: list[Callable[[], gym.Env]] = [lambda: env]
    elif isinstance(env, str):
        makers = [lambda: gym.make(env)] * num_envs
    elif callable(env):
        makers = [env] * num_envs
    else:
        raise TypeError(f"env must be an id, a function that makes one or a gymnasium.Env, got {type(env).__name__}")
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


def _units(space: gym.spaces.Box, clean: np.ndarray) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Centre and scale of observations: their range for images, otherwise mean and standard deviation."""
    if len(space.shape) == 3 or space.dtype == np.uint8:
        return 0.0, _largest(space)
    return clean.mean(0), clean.std(0) + 1e-6


def _largest(space: gym.spaces.Box) -> float:
    return 255.0 if space.dtype == np.uint8 else 1.0


def _size(space: gym.Space) -> int:
    return int(np.prod(cast(tuple, space.shape)))


def _check_output(out: Tensor, n: int, actions: gym.Space) -> None:
    if isinstance(actions, gym.spaces.Discrete):
        expected: tuple = (n, int(actions.n))
    elif isinstance(actions, gym.spaces.Box):
        expected = (n, *actions.shape)
    else:
        raise ValueError(f"env: actions must be Discrete or a Box, got {actions}")
    if out.numel() != np.prod(expected):
        raise ValueError(f"victim: expected {expected} for {n} observations and {actions}, got {tuple(out.shape)}")
    if not out.requires_grad:
        raise ValueError("victim: no gradient flows from its output to the observation")
