"""The data set that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fl_linkability.data.bundle import FederatedBundle
from fl_linkability.data.reading import Reading
from fl_linkability.data.styled import make_digits_users, make_mnist_users
from fl_linkability.settings import TEXTS, Settings

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def load_bundle(settings: Settings, seed: int, reading: Reading, fabric: Fabric) -> FederatedBundle:
    """Users, tests and background.

    Raises:
        FileNotFoundError: the data set is not below the data root.
        ValueError: it has too few users or samples.
    """
    s = settings
    if s.dataset in ("digits", "mnist"):
        users: dict[str, Any] = {
            "n_users": s.users, "n_per_device": s.images_per_device, "n_prior": s.prior_images, "alpha": s.alpha,
            "style": s.style, "skew": s.skew, "drift": s.drift, "iid": s.iid, "background_size": s.background,
            "side": s.side,
        }  # fmt: skip
        return (
            make_digits_users(seed, **users) if s.dataset == "digits" else make_mnist_users(reading.root, seed, **users)
        )
    if s.dataset == "femnist":
        from fl_linkability.data.femnist import load_femnist

        return load_femnist(s, seed, reading)
    if s.dataset in TEXTS:
        from fl_linkability.data.texts import load_texts

        return load_texts(s, seed, reading)
    from fl_linkability.data.photos import load_photos

    return load_photos(s, seed, reading, fabric)
