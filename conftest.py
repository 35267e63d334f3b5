"""Import the packages that are called like their project's folder, before pytest names test modules after folders.

In importlib mode a test module of rebias/tests is `rebias.tests.test_x`: without the package in sys.modules, the
folder `rebias` would stand for it.
"""

import contextlib
import importlib
import tomllib
from pathlib import Path

for entry in tomllib.loads((Path(__file__).parent / "workspace.toml").read_text())["project"]:
    if entry["name"] == entry["package"] and entry["status"] == "built":
        with contextlib.suppress(ModuleNotFoundError):  # `make -C <project> install` has that project alone
            importlib.import_module(entry["package"])
