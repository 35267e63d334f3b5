"""The table files, checked against the settings; imports little, so small commands start fast."""

from __future__ import annotations

from dataclasses import fields

from fl_linkability.settings import Settings
from shared_utils.folders import project_folder
from shared_utils.tables import Table, load_tables

PROJECT = project_folder(__file__)


def tables() -> list[Table]:
    """All table files.

    Raises:
        ValueError: an unknown key, row, scale, metric or setting, with the nearest valid one.
    """
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])
