"""The table files, checked against the settings, and where a run's files are; light, so that small commands start fast.

A source checkout has tables/, results/ and runs/ beside src/. A wheel carries tables/ and results/ inside the package,
and a user's own runs/ are in the working directory.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from fl_linkability.settings import Settings
from shared_utils.tables import Table, load_tables

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]
PROJECT = CHECKOUT if (CHECKOUT / "tables").is_dir() else Path.cwd()


def shipped(name: str) -> Path:
    """The folder tables or results, of the checkout or of the installed package."""
    return PROJECT / name if (PROJECT / "tables").is_dir() else PACKAGE / name


def checkout() -> Path:
    """Where results are recorded and drawn. ValueError outside a source checkout."""
    if not (PROJECT / "tables").is_dir():
        raise ValueError("results are recorded in a source checkout: install it with `pip install -e`")
    return PROJECT


def tables() -> list[Table]:
    """All table files.

    Raises:
        ValueError: an unknown key, row, scale, metric or setting, with the nearest valid one.
    """
    return load_tables(shipped("tables"), [field.name for field in fields(Settings)])
