"""The apps that pyproject.toml names."""

from fl_linkability.flower_app import client_app, server_app

__all__ = ["client_app", "server_app"]
