"""Victim networks, and the frozen victim that every attack sees."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_adv_reward.sb3 import read_sb3

OUTPUTS = ("q", "logits")


class Centre(nn.Module):
    """(x - background) * 3: without this, a constant grey background completely stalls a small network."""

    def __init__(self, background: float):
        super().__init__()
        self.background = background

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.background) * 3


def feature_size(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Number of values per sample that a network outputs for (C, H, W). ValueError if the input is too small for it."""
    try:
        with torch.no_grad():
            return network(torch.zeros(1, *shape)).numel()
    except RuntimeError as error:
        raise ValueError(f"observations of shape {shape} are too small for the network ({error})") from error


def mlp(obs_shape: tuple[int, ...], n_actions: int, background: float = 0.0, width: int = 96) -> nn.Sequential:
    """Two hidden layers; the victim of MiniPong."""
    return nn.Sequential(
        Centre(background),
        nn.Flatten(),
        nn.Linear(math.prod(obs_shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, n_actions),
    )


def nature_cnn(obs_shape: tuple[int, int, int], n_actions: int, background: float = 0.0) -> nn.Sequential:
    """The network of Mnih et al. 2015: 32 @ 8x8 s4, 64 @ 4x4 s2, 64 @ 3x3 s1, 512 units."""
    features = nn.Sequential(
        Centre(background) if background else nn.Identity(),
        nn.Conv2d(obs_shape[0], 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(
        *features, nn.Linear(feature_size(features, obs_shape), 512), nn.ReLU(), nn.Linear(512, n_actions)
    )


NETWORKS = {"mlp": mlp, "nature": nature_cnn}


class Victim(nn.Module):
    """A frozen policy network: eval mode, no gradient to its weights, gradients to its input allowed.

    Args:
        module: maps (N, C, H, W) to (N, A).
        scale: the module's input per pixel value 0 .. 255: 1/255 if it expects [0, 1], 1 if it expects raw pixels.
        output: "q" (action values) or "logits" (of a policy); in both cases actions are the argmax.

    Raises:
        ValueError: an unknown output, or a batch norm layer in train mode (inputs would change its statistics).
    """

    def __init__(self, module: nn.Module, *, scale: float = 1 / 255, output: str = "q"):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        for name, layer in module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
                raise ValueError(f"module: {type(layer).__name__} {name!r} is in train mode; call module.eval() first")
        self.module, self.scale, self.output = module, scale, output
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Victim:
        """Always stay in eval mode."""
        return self

    def q(self, x: Tensor) -> Tensor:
        """Values or logits (N, A), at least float32, of observations (N, C, H, W) in [0, 1]."""
        factor = 255 * self.scale
        out = self.module(x if factor == 1 else x * factor)
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out

    forward = q

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Greedy actions (N,) int64 for uint8 frames or floats in [0, 1]; the first one wins ties."""
        return self.q(to_unit(obs)).argmax(1)

    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and values of weights and buffers."""
        return weights_hash(self.module)

    @classmethod
    def from_cleanrl(cls, path: Path | str, obs_shape: tuple[int, int, int] = (4, 84, 84)) -> Victim:
        """A network saved by CleanRL's `dqn_atari` or `c51_atari` (`--save-model`), for observations in [0, 1]."""
        weights, atoms = cleanrl_weights(Path(path))
        try:
            module = nature_cnn(obs_shape, len(weights["network.9.bias"]))
            module.load_state_dict({_cleanrl_key(name): value for name, value in weights.items()})
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not the state dict of CleanRL's dqn_atari or c51_atari ({error})") from error
        return cls(module if atoms is None else nn.Sequential(module, ExpectedReturn(atoms)))

    @classmethod
    def from_sb3(cls, path: Path | str) -> Victim:
        """A stable-baselines3 DQN, QR-DQN (values), PPO or A2C (logits); see `sb3.read_sb3` for its limits."""
        module, scale, output = read_sb3(path)
        return cls(module, scale=scale, output=output)


class ExpectedReturn(nn.Module):
    """Maps logits of a return distribution (N, A * atoms) to values (N, A): the mean over its atoms (C51)."""

    def __init__(self, atoms: Tensor):
        super().__init__()
        self.register_buffer("atoms", atoms)

    def forward(self, logits: Tensor) -> Tensor:
        atoms = self.get_buffer("atoms")
        return logits.unflatten(1, (-1, len(atoms))).softmax(2) @ atoms


class Smoothed(nn.Module):
    """A network's mean over noisy copies of the observation, a defence without training (after Cohen et al. 2019).

    The noise is drawn only once, so the defended policy is deterministic and an attacker can use its gradient.
    """

    def __init__(self, module: nn.Module, obs_shape: tuple[int, int, int], std: float, copies: int = 8):
        super().__init__()
        self.module = module
        noise = std * torch.randn(copies, *obs_shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, A)."""
        noisy = x[:, None] + self.get_buffer("noise")
        return self.module(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2]).mean(1)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_unit(obs: Tensor) -> Tensor:
    """Convert uint8 frames to floats in [0, 1]; floats are unchanged. TypeError for anything else."""
    if obs.dtype == torch.uint8:
        return obs.float().div_(255)
    if not obs.is_floating_point():
        raise TypeError(f"observations must be uint8 or floating point, got {obs.dtype}")
    return obs


def cleanrl_weights(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """The policy's weights in a CleanRL file, and for C51 the atoms of its return distribution.

    FileNotFoundError, or ValueError if it cannot be read.
    """
    saved = load_weights(path)
    if isinstance(saved, tuple | list) and saved:  # ddpg and td3: the actor, then its critics
        saved = saved[0]
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(saved).__name__}")
    weights = dict(saved.get("model_weights", saved))  # c51 also saves its arguments
    return weights, weights.pop("atoms", None)


def _cleanrl_key(name: str) -> str:
    """network.i is layer i + 1 here, because ours has a layer for the background in front."""
    _, number, kind = name.split(".")
    return f"{int(number) + 1}.{kind}"


def load_weights(path: Path) -> Any:
    """Read a file of tensors with weights_only. FileNotFoundError, or ValueError with one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors of a damaged or unknown file
        raise ValueError(f"{path}: cannot be read as a state dict ({str(error).splitlines()[0]})") from error
