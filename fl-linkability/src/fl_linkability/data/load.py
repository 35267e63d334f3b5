"""The data set that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_linkability.data.bundle import FederatedBundle
from fl_linkability.data.styled import make_digits_users, make_mnist_users
from fl_linkability.settings import Settings

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def load_bundle(settings: Settings, seed: int, data_root: Path, fabric: Fabric) -> FederatedBundle:
    """Users, tests and background.

    Raises:
        FileNotFoundError: the data set is not below data_root.
        ValueError: too few users or images in it.
    """
    s = settings
    if s.dataset in ("digits", "mnist"):
        users: dict[str, Any] = {
            "n_users": s.users, "n_per_device": s.images_per_device, "n_prior": s.prior_images, "alpha": s.alpha,
            "style": s.style, "skew": s.skew, "drift": s.drift, "iid": s.iid, "background_size": s.background,
            "side": s.side,
        }  # fmt: skip
        return make_digits_users(seed, **users) if s.dataset == "digits" else make_mnist_users(data_root, seed, **users)
    from fl_linkability.data.real import load_real

    return load_real(s, seed, data_root, fabric)
