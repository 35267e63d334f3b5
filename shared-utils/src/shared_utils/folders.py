"""Where a project's tables, results and runs are: in its source checkout, or in and around the installed package."""

from __future__ import annotations

import shutil
from pathlib import Path


def project_folder(module: str) -> Path:
    """The folder that holds tables/ and results/: the source checkout, otherwise the installed package.

    Args:
        module: `__file__` of a module directly in the package, which is in src/ of its checkout.
    """
    package = Path(module).parent
    checkout = package.parents[1]
    return checkout if (checkout / "tables").is_dir() else package


def is_installed(project: Path) -> bool:
    """Whether a project folder is an installed package (nothing is written there)."""
    return (project / "__init__.py").is_file()


def runs_folder(project: Path) -> Path:
    """Where run logs and checkpoints go: runs/ of the checkout, or of the working directory."""
    return (Path.cwd() if is_installed(project) else project) / "runs"


def results_folder(project: Path) -> Path:
    """Where tables are drawn: results/ of the checkout. For an installed package, copies its results/ to here first."""
    if not is_installed(project):
        return project / "results"
    return Path(shutil.copytree(project / "results", Path.cwd() / "results", dirs_exist_ok=True))
