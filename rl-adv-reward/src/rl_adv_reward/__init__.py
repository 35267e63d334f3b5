"""Sequential attacks on agents for long-term adversarial goals (arXiv 1805.12487).

Names are imported on first use, so the command line's --help does not load torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "any_env": ("train_attack",),
    "atn": ("ATN", "AttackedQ", "perturbation_size", "project"),
    "attacks": ("ATNAttack", "make_attack"),
    "dqn": ("dqn_targets", "nstep_returns", "tabular_attack"),
    "envs": ("make_envs",),
    "envs.minipong": ("MiniPong", "MiniPongVec"),
    "envs.wrappers": ("AttackVectorWrapper", "AttackWrapper"),
    "evaluation": ("Evaluation", "evaluate"),
    "files": ("load_atn", "load_victim", "save_atn", "save_victim"),
    "models": ("Victim", "mlp", "nature_cnn"),
    "rewards": ("REWARDS", "AdversarialReward", "make_reward"),
    "settings": ("PRESETS", "Settings"),
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
