"""Noise: gaussian, shot, impulse, speckle.

As in the other modules of this package, `draw_x(streams, images, severity)` draws what is random, and
`x(images, severity, draws)` computes the corrupted images from it: uint8 (N, 3, H, W) -> floating point in [0, 1], not
yet clipped, or uint8.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cutmix_robustness.corruptions.pixels import to_unit
from cutmix_robustness.corruptions.streams import SampleStreams


def draw_normal(streams: SampleStreams, images: Tensor, severity: float) -> Tensor:
    """One standard normal number per value: (N, 3, H, W)."""
    return streams.normal(*images.shape[1:])


def gaussian_noise(images: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Additive noise: x + sigma * noise."""
    return to_unit(images).add_(noise, alpha=sigma)


def speckle_noise(images: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Multiplicative noise: x + sigma * x * noise."""
    x = to_unit(images)
    return x + sigma * x * noise


def draw_uniform(streams: SampleStreams, images: Tensor, severity: float) -> Tensor:
    """One uniform number in [0, 1) per value: (N, 3, H, W)."""
    return streams.uniform(*images.shape[1:])


def impulse_noise(images: Tensor, amount: float, u: Tensor) -> Tensor:
    """Salt and pepper: a share `amount` of the values becomes 0 or 1, half each, independently per channel."""
    return to_unit(images).masked_fill_(u < amount, 0).masked_fill_(u < amount / 2, 1)


def draw_photons(streams: SampleStreams, images: Tensor, photons: float) -> Tensor:
    """Poisson counts with mean images / 255 * photons: (N, 3, H, W) float32."""
    accept, alias = (table.to(images.device) for table in _poisson_tables(photons))
    columns = accept.shape[1]
    u = streams.uniform(*images.shape[1:]).mul_(columns)
    column = u.long()
    cell = images.long().mul_(columns).add_(column)
    return torch.where(u - column < accept.take(cell), column.float(), alias.take(cell))


def shot_noise(images: Tensor, photons: float, counts: Tensor) -> Tensor:
    """Photon noise: Poisson counts over the count of a white pixel."""
    return counts / photons


@lru_cache(maxsize=16)
def _poisson_tables(photons: float) -> tuple[Tensor, Tensor]:
    """Walker's alias tables of the Poisson distributions with means level / 255 * photons, levels 0 to 255.

    An 8-bit image has only 256 means, so a table turns one uniform number into an exact Poisson count. Each column is
    filled up to its fair share 1 / columns by the currently most likely count.

    Returns:
        The probability that a column keeps its own count, and the count it gives otherwise, (256, columns) each.
    """
    columns = int(photons + 10 * photons**0.5 + 20)
    counts = torch.arange(columns, dtype=torch.float64)
    means = torch.arange(256, dtype=torch.float64)[:, None] / 255 * photons
    share = torch.exp(torch.xlogy(counts, means) - means - torch.lgamma(counts + 1))
    share *= columns / share.sum(1, keepdim=True)
    accept, alias = torch.ones_like(share), counts.repeat(256, 1)
    open_ = torch.zeros_like(share)  # becomes inf once a column is settled
    levels = torch.arange(256)
    for _ in range(columns):
        least, most = (share + open_).argmin(1), (share - open_).argmax(1)
        accept[levels, least] = share[levels, least]
        alias[levels, least] = most.double()
        share[levels, most] -= 1 - share[levels, least]
        open_[levels, least] = torch.inf
    return accept.float(), alias.float()
