"""Files of victims and attacks: written by the command line, loaded with weights_only."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rl_adv_reward.atn import ATN
from rl_adv_reward.envs import ENVIRONMENTS, sizes
from rl_adv_reward.models import NETWORKS, Victim
from rl_adv_reward.train import read, write_atomically

FORMATS = ("ours", "cleanrl", "sb3")


def save_victim(path: Path, victim: Victim, env: str) -> None:
    """Write a victim of one of our environments."""
    write_atomically(path, {"run": {"kind": "victim", "env": env}, "modules": {"q": victim.module.state_dict()}})


def load_victim(path: Path | str, env: str, format: str = "ours") -> Victim:
    """Read a victim.

    Args:
        path: file.
        env: environment of the victim.
        format: ours (`rl-adv-reward train`), cleanrl (dqn_atari) or sb3 (DQN, QR-DQN, PPO, A2C).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another kind or environment, or an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "cleanrl":
        return Victim.from_cleanrl(path)
    if format == "sb3":
        return Victim.from_sb3(path)
    path = Path(path)
    content = _of_kind(path, "victim")
    if content["run"]["env"] != env:
        raise ValueError(f"{path}: is a victim of {content['run']['env']}, not of {env}")
    module = NETWORKS[ENVIRONMENTS[env].network](*sizes(env), ENVIRONMENTS[env].background)
    _fill(path, module, content["modules"]["q"])
    return Victim(module)


def save_atn(path: Path, atn: ATN) -> None:
    """Write a trained attack."""
    write_atomically(path, {"run": {"kind": "atn", **atn.arguments}, "modules": {"atn": atn.state_dict()}})


def load_atn(path: Path | str) -> ATN:
    """Read a trained attack. Errors as in `load_victim`."""
    path = Path(path)
    content = _of_kind(path, "atn")
    arguments = {name: value for name, value in content["run"].items() if name != "kind"}
    atn = ATN(**arguments)
    _fill(path, atn, content["modules"]["atn"])
    return atn.requires_grad_(False).eval()


def _of_kind(path: Path, kind: str) -> dict:
    content = read(path)
    if content["run"].get("kind") != kind:
        raise ValueError(f"{path}: holds a {content['run'].get('kind')}, expected a {kind}")
    return content


def _fill(path: Path, module: nn.Module, weights: dict) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: holds the weights of another network ({str(error).splitlines()[0]})") from error
