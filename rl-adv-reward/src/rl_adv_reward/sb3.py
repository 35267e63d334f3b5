"""Reads policies saved by stable-baselines3 without it: tensors with weights_only, settings from the plain JSON.

An archive is a zip of `policy.pth` (a state dict) and `data` (JSON). Pickled parts of the JSON are never loaded, so
archives of any age and origin are safe, and old ones do not need the package `gym`.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HEADS = {  # algorithm: names of its parts in the state dict, its activation, and whether it gives values
    "DQN": ("q_net.features_extractor.", ("q_net.q_net.",), nn.ReLU, "q"),
    "QR-DQN": ("quantile_net.features_extractor.", ("quantile_net.quantile_net.",), nn.ReLU, "q"),
    "PPO or A2C": ("features_extractor.", ("mlp_extractor.policy_net.", "action_net."), nn.Tanh, "logits"),
}
NATURE_KERNELS, NATURE_STRIDES = (8, 4, 3), (4, 2, 1)


class QuantileMean(nn.Module):
    """Maps (N, quantiles * A) to (N, A): the mean over quantiles."""

    def __init__(self, n_actions: int):
        super().__init__()
        self.n_actions = n_actions

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.n_actions)).mean(1)


def read_sb3(path: Path | str) -> tuple[nn.Module, float, str]:
    """The network of a DQN, QR-DQN, PPO or A2C archive with a CNN or MLP policy and discrete actions.

    Args:
        path: zip file of `model.save`.

    Returns:
        The network, (N, C, H, W) to (N, A); its input per pixel value 0 .. 255 (1/255, or 1 if the policy was trained
        with normalize_images=False); "q" or "logits".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such an archive, continuous actions, observations that are not an image stack, or a custom
            network.
    """
    weights, data = _parts(Path(path))
    algorithm = next((name for name, parts in HEADS.items() if any(k.startswith(parts[1][0]) for k in weights)), "")
    if not algorithm and "action_net.weight" in weights:
        algorithm = "PPO or A2C"  # without hidden layers
    if not algorithm:
        raise ValueError(f"{path}: not a DQN, QR-DQN, PPO or A2C; its first weight is {next(iter(weights), 'missing')}")
    space, actions = data.get("observation_space", {}), data.get("action_space", {})
    if "log_std" in weights or "n" not in actions:
        raise ValueError(f"{path}: has continuous actions; a victim needs Discrete ones")
    shape = tuple(space.get("_shape") or space.get("shape") or ())
    if len(shape) != 3 or str(space.get("dtype")) != "uint8":
        raise ValueError(f"{path}: expected uint8 observations (C, H, W), got {space.get('dtype')} {shape}")
    extractor, heads, activation, output = HEADS[algorithm]
    options = data.get("policy_kwargs") or {}
    named = re.search(r"activation\.(\w+)", str(options.get("activation_fn", "")))
    activation = getattr(nn, named.group(1)) if named else activation
    n_actions = int(actions["n"])
    try:
        features = _features({k.removeprefix(extractor): v for k, v in weights.items() if k.startswith(extractor)})
        layers = [layer for head in heads for layer in _head(weights, head, activation)]
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: holds a custom network ({error}); pass it as Victim(module)") from error
    network = nn.Sequential(*features, *layers, *([QuantileMean(n_actions)] if algorithm == "QR-DQN" else []))
    try:
        with torch.no_grad():
            found = network(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit observations {shape} ({error})") from error
    if found != n_actions:
        raise ValueError(f"{path}: has {n_actions} actions, but its network has {found} outputs")
    return network, (1 / 255 if options.get("normalize_images", True) else 1.0), output


def _parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
            weights = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, JSON and pickle errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a stable-baselines3 archive ({reason})") from error
    return weights, data


def _features(weights: dict[str, Tensor]) -> list[nn.Module]:
    """NatureCNN, or only flattening."""
    if not weights:
        return [nn.Flatten()]
    convolutions = [weights.pop(f"cnn.{number}.weight") for number in (0, 2, 4)]
    biases = [weights.pop(f"cnn.{number}.bias") for number in (0, 2, 4)]
    if tuple(c.shape[-1] for c in convolutions) != NATURE_KERNELS:
        raise ValueError(f"expected the kernels of NatureCNN, got {[tuple(c.shape[2:]) for c in convolutions]}")
    layers: list[nn.Module] = []
    for weight, bias, stride in zip(convolutions, biases, NATURE_STRIDES, strict=True):
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], stride=stride)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    linear = _linear(weights.pop("linear.0.weight"), weights.pop("linear.0.bias"))
    if weights:
        raise ValueError(f"unknown layer {next(iter(weights))}")
    return [*layers, nn.Flatten(), linear, nn.ReLU()]


def _head(weights: dict[str, Tensor], prefix: str, activation: type[nn.Module]) -> list[nn.Module]:
    """The linear layers under a prefix, in order; the activation follows hidden ones and all of mlp_extractor."""
    names = [name.removesuffix("weight") for name in weights if name.startswith(prefix) and name.endswith("weight")]
    names.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    layers: list[nn.Module] = []
    for number, name in enumerate(names):
        layers.append(_linear(weights[f"{name}weight"], weights[f"{name}bias"]))
        if number < len(names) - 1 or prefix.startswith("mlp_extractor"):
            layers.append(activation())
    return layers


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    if weight.ndim != 2:
        raise ValueError(f"expected a linear layer, got one of shape {tuple(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
