"""A method from outside the package: `package.module:Class` or `file.py:Class`, a subclass of `Network`."""

from __future__ import annotations

import hashlib
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from wsol_eval.models.network import Network


def is_plugin(method: str) -> bool:
    """Whether the name of a method names a class outside the package."""
    return ":" in method


def load(method: str) -> type[Network]:
    """The class that `method` names. FileNotFoundError or ValueError naming it."""
    place, _, name = method.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else _imported(place, method)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Network)):
        raise ValueError(f"method: {place} has no class {name!r} that is a subclass of wsol_eval.Network")
    return found


def build(method: str, num_classes: int, feature_map: int, hyperparameters: dict[str, float]) -> Network:
    """A new network of the class: called with num_classes, feature_map and the hyperparameters as keywords."""
    made = load(method)
    strange = [name for name in hyperparameters if name not in made.hyperparameters]
    if strange:
        there = ", ".join(made.hyperparameters) or "none"
        raise ValueError(f"own: {strange[0]!r} is no hyperparameter of {method}; there are {there}")
    return made(num_classes=num_classes, feature_map=feature_map, **hyperparameters)


def checksum(method: str) -> str:
    """Of the file that defines the class, 16 hex digits: a ledger or checkpoint does not answer for another text."""
    return hashlib.sha256(Path(sys.modules[load(method).__module__].__file__ or "").read_bytes()).hexdigest()[:16]


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of a method")
    name = f"wsol_eval_method_{hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _imported(place: str, method: str) -> ModuleType:
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(f"method: {method!r}: {error}; expected package.module:Class or file.py:Class") from error
