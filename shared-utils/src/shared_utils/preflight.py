"""Check everything that a run will need before its first step, and list all that is missing at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class Missing(ValueError):
    """Lists what a run needs and cannot find, one line each with the remedy."""


@dataclass(frozen=True)
class Need:
    """One thing that a run needs."""

    what: str
    """for example "ImageNet-O (64 x 64 crops)" """
    remedy: str
    """what to do if it is missing"""
    met: bool


def file(path: Path | str, what: str, remedy: str) -> Need:
    """A file or folder that must exist."""
    return Need(f"{what} ({path})", remedy, Path(path).exists())


def package(name: str, remedy: str) -> Need:
    """A package that must be installed; it is not imported."""
    return Need(f"package {name}", remedy, find_spec(name) is not None)


def disk_space(folder: Path | str, megabytes: float) -> Need:
    """Free space where something will be written; the folder need not exist yet."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**20
    return Need(f"{megabytes:,.0f} MB free in {folder} ({free:,.0f} MB are free)", "make room there", free >= megabytes)


def unmet(needs: Iterable[Need]) -> list[str]:
    """One line for each different need that is not met."""
    return list(dict.fromkeys(f"{need.what}: {need.remedy}" for need in needs if not need.met))


def require(needs: Iterable[Need]) -> None:
    """Raise Missing, with one line for each need that is not met."""
    lines = unmet(needs)
    if lines:
        raise Missing("missing:\n" + "\n".join(f"  {line}" for line in lines))
