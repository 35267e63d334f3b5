"""The table files, checked against the settings; light, so that small commands start fast."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from fl_linkability.settings import Settings
from shared_utils.tables import Table, load_tables

PROJECT = Path(__file__).parents[2]


def tables() -> list[Table]:
    """All table files.

    Raises:
        FileNotFoundError: outside a source checkout.
        ValueError: an unknown key, row, scale, metric or setting, with the nearest valid one.
    """
    if not (PROJECT / "tables").is_dir():
        raise FileNotFoundError("the tables are in the source checkout: run from an editable install of it")
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])
