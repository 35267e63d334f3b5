"""What a run needs before its first round, and what its record must say about what was missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from fl_linkability.data.bundle import FederatedBundle
from fl_linkability.data.inventory import SETS
from fl_linkability.data.reading import Reading
from fl_linkability.settings import BACKGROUND_KINDS, Settings
from shared_utils import preflight

PAPER_USERS = {"pipa": 53, "openimages": 327, "blog": 55, "yelp": 118}
WEIGHTS = "mobilenet_v2-b0353104.pth"


def weights_file() -> Path:
    """Where torchvision keeps MobileNet's ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def needs(settings: Settings, reading: Reading) -> Iterator[preflight.Need]:
    """Data, weights and packages of one run."""
    if settings.dataset in SETS:
        data = SETS[settings.dataset]
        yield data.need(reading.root)
        if data.background and _uses_background(settings):
            yield data.background_need(reading.root)
    if settings.model.startswith("mobilenet") and settings.pretrained:
        yield preflight.file(weights_file(), "MobileNet's ImageNet weights", "fl-linkability data --download")
    if settings.engine.startswith("flower"):
        yield preflight.package("flwr", "pip install 'fl-linkability[flower]'")
    if settings.engine == "flower-ray":
        yield preflight.package("ray", "pip install 'fl-linkability[flower]'")


def _uses_background(settings: Settings) -> bool:
    mitigates = not BACKGROUND_KINDS.keys().isdisjoint(settings.mitigation.split("+"))
    return mitigates or settings.pretrain_epochs > 0 or settings.learner == "background"


def weights(settings: Settings) -> dict[str, str]:
    """Name and SHA-256 of the weights that a network started from."""
    if not (settings.model.startswith("mobilenet") and settings.pretrained):
        return {}
    return {WEIGHTS: hashlib.sha256(weights_file().read_bytes()).hexdigest()}


def caveats(settings: Settings, bundle: FederatedBundle) -> list[str]:
    """Why the figures cannot be compared with the paper's."""
    found, users = [], PAPER_USERS.get(settings.dataset)
    if bundle.skipped:
        found.append(f"{bundle.skipped} files skipped")
    if settings.model.startswith("mobilenet") and not settings.pretrained:
        found.append("random weights in place of pretrained ones")
    if users is not None and bundle.users.n_users != users:
        found.append(f"{bundle.users.n_users} of the paper's {users} users")
    return found
