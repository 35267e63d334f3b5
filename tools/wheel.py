"""The build hook of every project's wheel: it includes what the checkout keeps next to the package.

An editable install reads it from the checkout; see shared_utils/folders.py.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Wheel(BuildHookInterface):
    """Adds tables/ and results/ as package data, and shared_utils, so that no other package is needed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        project = Path(self.root)
        package = next((project / "src").iterdir()).name
        build_data["force_include"] |= {str(project / name): f"{package}/{name}" for name in ("tables", "results")}
        build_data["force_include"][str(project.parent / "shared-utils/src/shared_utils")] = "shared_utils"
