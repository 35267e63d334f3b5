"""Linkability of updates in federated learning: attacks and defences (arXiv 1805.05838).

The public API by name; a module is imported when one of its names is first used, so small commands start fast.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "ANONYMOUS": "data.bundle",
    "MLP": "models",
    "Background": "mitigations",
    "CentralDP": "mitigations",
    "Clip": "mitigations",
    "Compose": "mitigations",
    "FedAvgConfig": "federation",
    "FederatedBundle": "data.bundle",
    "GaussianNoise": "mitigations",
    "LocalDP": "mitigations",
    "LocalSGD": "train",
    "Mitigation": "mitigations",
    "PRIOR": "data.bundle",
    "Recording": "recording",
    "SimulationResult": "engines",
    "StyleJitter": "mitigations",
    "UpdateStore": "store",
    "UserDataset": "data.bundle",
    "identification_metrics": "linkage",
    "identify": "attacks",
    "make_digits_users": "data.styled",
    "make_mnist_users": "data.styled",
    "match": "attacks",
    "matching_metrics": "linkage",
    "open_world_metrics": "linkage",
    "pair_scorer": "attacks",
    "permuted_device_chance": "linkage",
    "read_updates": "recording",
    "report_partition": "recording",
    "simulate": "engines",
    "split_closed": "splits",
    "split_matching": "splits",
    "split_open": "splits",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
