"""Later metrics on the same distances: symmetric, probabilistic and clipped, and authenticity.

Each decides on exact float64 distances, as the four metrics do. If a paper leaves something open (open or closed balls,
the zero of a scale), we follow its authors' code, so values are comparable with published ones.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import betaln, gammaln
from torch import Tensor

from prdc_metrics.balls import ball_membership
from prdc_metrics.distances import Frame, exact_squared_distances, group_minima, pairs_below
from prdc_metrics.metrics import Features, as_features, checked_ks, exact_arithmetic, squared_radii
from prdc_metrics.schedule import Schedule
from prdc_metrics.single_samples import authenticity

STRETCH = 1.2  # Park & Kim's a: their balls have 1.2 times the mean k-th neighbour distance
PRECISION = "float32"  # of the filter


def compute_family(
    real_features: Features,
    fake_features: Features,
    nearest_k: int,
    *,
    device: str | torch.device | None = None,
    tile: int | None = None,
) -> dict[str, float]:
    """Seven metrics that build on precision, recall, density and coverage, all higher is better.

    - symmetric_precision, symmetric_recall (Khayatkhoei & AbdAlmageed, ICML 2023): the smaller of precision and the
      share of fake balls that hold a real; the smaller of recall and coverage. Open balls.
    - p_precision, p_recall (Park & Kim, ICCV 2023): probability of lying in the union of random balls, one radius per
      set. Their paper takes k = 4.
    - clipped_density, clipped_coverage (Salvy, Talbot & Thirion 2025, arXiv 2507.01761): no sample counts more than
      once and no ball is wider than the median one; calibrated, so a value is a share of good samples.
    - authenticity (Alaa et al., ICML 2022): share of fakes that are not near-copies of a real, see `authenticity`.

    Args:
        real_features: (N, D), as `compute_prdc` takes them.
        fake_features: (M, D).
        nearest_k: k, 1 <= k <= min(N, M) - 1.
        device: where to compute; default: the features' device.
        tile: side of a distance tile; the result does not depend on it.

    Returns:
        Python floats in [0, 1] by the names above.

    Raises:
        ValueError, TypeError: as `compute_prdc`.
    """
    real, fake = as_features(real_features, "real", device), as_features(fake_features, "fake", device)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real has {real.shape[1]} dimensions and fake {fake.shape[1]}")
    (k,) = checked_ks((nearest_k,), real, "real")
    checked_ks((k,), fake, "fake")
    schedule = Schedule(tile)
    real_squared, _ = squared_radii(real, (k,), schedule, PRECISION, "real")
    fake_squared, _ = squared_radii(fake, (k,), schedule, PRECISION, "fake")
    with exact_arithmetic(PRECISION, fake):
        in_real, in_fake, _ = ball_membership(real, fake, real_squared, fake_squared, schedule, PRECISION, closed=False)
        assert in_fake is not None  # fake radii were given
        widths = (float(squared.sqrt().mean()) * STRETCH for squared in (real_squared, fake_squared))
        p_precision, p_recall = _p_precision_and_recall(real, fake, tuple(widths), schedule)
        values = {
            "symmetric_precision": min(_share(in_real.counts > 0), _share(in_fake.held > 0)),
            "symmetric_recall": min(_share(in_fake.counts > 0), _share(in_real.held > 0)),
            "p_precision": p_precision,
            "p_recall": p_recall,
            "clipped_density": _clipped_density(real, fake, real_squared, k, schedule),
            "clipped_coverage": _clipped_coverage(in_real.held[:, 0], len(fake), k),
        }
    return values | {"authenticity": _share(authenticity(real, fake, tile=tile))}


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / len(mask)


def _clipped_density(real: Tensor, fake: Tensor, real_squared: Tensor, k: int, schedule: Schedule) -> float:
    """Real balls around a fake, at most k of them, over the same count around a real; at most 1. Closed balls."""
    ordered = real_squared[:, 0].sort()[0]
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    median = low if low == high else ((low.sqrt() + high.sqrt()) / 2).square()
    clipped = real_squared.clamp(max=median)
    around_fakes, _, _ = ball_membership(real, fake, clipped, None, schedule, PRECISION, closed=True)
    around_reals, _, _ = ball_membership(real, real, clipped, None, schedule, PRECISION, closed=True)
    others = around_reals.counts - 1  # every ball holds its own centre
    fakes, reals = (int(counts.clamp(max=k).sum()) for counts in (around_fakes.counts, others))
    return min(1.0, fakes * len(real) / (reals * len(fake)))


def _clipped_coverage(held: Tensor, num_fake: int, k: int) -> float:
    """Fakes in each real ball (N,), at most k of them, calibrated by `good_share_scores`. Open balls."""
    score = int(held.clamp(max=k).sum()) / (k * len(held))
    scale = good_share_scores(len(held), num_fake, k)
    return int(np.searchsorted(scale, score)) / len(scale)


def good_share_scores(num_real: int, num_fake: int, k: int) -> np.ndarray:
    """Expected uncalibrated clipped coverage if m of M fakes follow the reals' distribution and the rest are far away.

    A real ball has content Beta(k, N - k), whatever the distribution, so the number of good fakes in it is
    beta-binomial: E[min(number, k)] / k. Below m = k the authors take 0.

    Returns:
        (M + 1,) for m = 0..M, rising.
    """
    m = np.arange(k, num_fake + 1)[:, None]
    j = np.arange(k)[None]
    choose = gammaln(m + 1) - gammaln(j + 1) - gammaln(m - j + 1)
    chance = np.exp(choose + betaln(j + k, m - j + num_real - k) - betaln(k, num_real - k))  # of j in the ball
    return np.concatenate([np.zeros(k), 1 - ((k - j) * chance).sum(1) / k])


def _p_precision_and_recall(
    real: Tensor, fake: Tensor, radii: tuple[float, ...], schedule: Schedule
) -> tuple[float, float]:
    """1 - prod min(1, distance / radius) over the other set, the mean over each set: P-precision, P-recall.

    The radii are those of all real balls and of all fake balls.
    """
    frame = Frame(real, fake, precision=PRECISION)
    centres, members = frame.points(real), frame.points(fake)
    outside_real = torch.ones(len(fake), dtype=torch.float64, device=real.device)  # probability of being outside
    outside_fake = torch.ones(len(real), dtype=torch.float64, device=real.device)
    reach = torch.tensor(max(radii), dtype=torch.float64, device=real.device)
    limit = frame.threshold(reach.square() * (1 + 2**-50), torch.inf)  # the square was rounded
    rows, columns = (schedule.blocks(len(points.bias), real.device) for points in (centres, members))
    out = centres.values.new_empty(rows[0].stop * columns[0].stop)
    for i in rows:
        for j in columns:
            tile = frame.lower_bounds(centres, i, members, j, out)
            centre, member, _ = pairs_below(tile, 0, limit.expand(len(tile)), group_minima(tile, 0))
            centre, member = centre + i.start, member + j.start
            distance = exact_squared_distances(real, fake, centre, member).sqrt()
            for outside, place, radius in zip((outside_real, outside_fake), (member, centre), radii, strict=True):
                inside = distance < radius
                outside.scatter_reduce_(0, place[inside], distance[inside] / radius, "prod")
    return 1 - float(outside_real.mean()), 1 - float(outside_fake.mean())
