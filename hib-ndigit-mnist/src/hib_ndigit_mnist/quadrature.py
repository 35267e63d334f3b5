"""E[sigmoid(b - a r)] without Monte Carlo noise, where r is the length of a Gaussian vector.

For two independent Gaussian embeddings z1 - z2 ~ N(mu1 - mu2, S1 + S2), so the match probability is an integral in D
dimensions, not 2D. In polar coordinates around zero distance the integrand has no cone (the Jacobian is r), so
Gauss-Legendre in the radius and equal steps in the angle converge exponentially. Both cover only the region where the
density is not negligible; the number of nodes follows from the tolerance and the smallest scale of the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy.special import roots_legendre
from scipy.stats import ncx2
from torch import Tensor

NODES_AT_ONCE = 1 << 21  # 16 MB of float64 per intermediate
MAX_NODES = 4096  # per axis
NARROW = 1e-3  # a standard deviation, as a share of the lengths over which sigmoid(b - a ||v||) bends
REMOTE = 1e5  # standard deviations from the origin, from where SciPy's density is soon NaN


def expected_sigmoid(mean: Tensor, variance: Tensor, a: Tensor, b: Tensor, tolerance: float = 1e-9) -> Tensor:
    """E[sigmoid(b - a ||v||)] for v ~ N(mean, diag(variance)).

    Args:
        mean: (n, D).
        variance: (n, D), not negative; 0 means a point.
        a: (n,) or a scalar.
        b: (n,) or a scalar.
        tolerance: target absolute error; a larger one needs fewer nodes.

    Returns:
        (n,) float64.

    Raises:
        ValueError: D > 2 with variances that differ between dimensions; tolerance not in (0, 0.1]; a mean or variance
            that is not finite, or a negative variance.
    """
    if not 0 < tolerance <= 0.1:
        raise ValueError(f"tolerance: expected a value in (0, 0.1], got {tolerance}")
    if not (mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()):
        raise ValueError("expected finite means, and finite variances of 0 or more")
    mean, variance = mean.double(), variance.double()
    n, dim = mean.shape
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=mean.device).expand(n) for x in (a, b))
    floor = (0.1 * tolerance / a).square()  # of the variance: moves r by less than the tolerance
    if dim == 1:  # add a second coordinate of zero width to use the polar form
        variance = torch.cat([variance, torch.zeros_like(variance)], 1)
        mean = torch.cat([mean, torch.zeros_like(mean)], 1)
    if dim > 2 and not is_isotropic(variance):
        raise ValueError(f"variance: expected equal values in all {dim} dimensions; MatchProbability takes any")
    radius = mean.norm(dim=1)
    result = torch.sigmoid(b - a * radius)
    narrow = (dim * variance.amax(1)).sqrt() < NARROW * torch.minimum(radius, 1 / a)
    result = torch.where(narrow, result + _bending(mean, variance, a, result), result)
    live = ((variance.amax(1) > floor) & ~narrow).nonzero()[:, 0]
    if len(live):
        integrate = _isotropic if dim > 2 else _plane
        result[live] = integrate(mean[live], variance[live], a[live], b[live], tolerance)
    return result


def is_isotropic(variance: Tensor) -> bool:
    """Whether the values of every row (n, D) are equal."""
    return torch.allclose(variance, variance[:, :1].expand_as(variance), rtol=1e-6, atol=1e-12)


def _bending(mean: Tensor, variance: Tensor, a: Tensor, point: Tensor) -> Tensor:
    """E[sigmoid] of a narrow Gaussian less its value at the mean: half the variances times the second derivatives."""
    radius = mean.norm(dim=1)
    along = (variance * mean.square()).sum(1) / radius.square()  # variance in the direction of the mean
    slope = -a * point * (1 - point)
    return (along * -a * slope * (1 - 2 * point) + (variance.sum(1) - along) * slope / radius) / 2


def _plane(mean: Tensor, variance: Tensor, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """D = 2. Pairs that need similar numbers of nodes share a grid; each has its own window."""
    thin = variance.amin(1) < 1e-6 * variance.amax(1)  # practically one-dimensional
    result = torch.empty_like(a)
    for chosen, integrate in ((thin, _line), (~thin, _polar)):
        index = chosen.nonzero()[:, 0]
        if len(index):
            result[index] = integrate(mean[index], variance[index], a[index], b[index], tolerance)
    return result


def _reach(tolerance: float) -> tuple[float, float]:
    """Half width of the window and step of an equidistant rule for a Gaussian, in standard deviations."""
    log = -math.log(tolerance)
    return math.sqrt(2 * log), math.pi * math.sqrt(2 / log)


def _polar(mean: Tensor, variance: Tensor, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    reach, step = _reach(tolerance)
    sd, narrow = variance.sqrt().amax(1), variance.sqrt().amin(1)
    radius, direction = mean.norm(dim=1), torch.atan2(mean[:, 1], mean[:, 0])
    low, high = (radius - reach * sd).clamp_min(0), radius + reach * sd
    inside = reach * sd >= radius
    sector = torch.where(inside, math.pi, torch.asin((reach * sd / radius).clamp(max=1)) + 1e-9)
    touches = low == 0
    radial = (
        (high - low) / torch.minimum(narrow * step, step * step / (2 * a)) * touches.double().add(1.3).clamp(max=1.7)
    )
    radial = 6 + radial
    angular = 4 + 2 * sector * high / (narrow * step)
    return _by_size(_polar_grid, radial, angular, (mean, variance, a, b, low, high, direction, sector))


def _polar_grid(n_r: int, n_t: int, *inputs: Tensor) -> Tensor:
    mean, variance, a, b, low, high, direction, sector = inputs
    nodes, weights = _gauss_legendre(n_r, mean.device)
    half = (high - low)[:, None] / 2
    r = low[:, None] + half * (1 + nodes)  # (n, R)
    offset = (torch.arange(n_t, dtype=torch.float64, device=mean.device) + 0.5) * (2 / n_t) - 1
    theta = direction[:, None] + sector[:, None] * offset  # (n, T)
    precision = 0.5 / variance
    x = r[:, :, None] * theta.cos()[:, None] - mean[:, 0, None, None]  # (n, R, T)
    y = r[:, :, None] * theta.sin()[:, None] - mean[:, 1, None, None]
    density = x.square_().mul_(-precision[:, 0, None, None]).sub_(y.square_().mul_(precision[:, 1, None, None])).exp_()
    radial = weights * half * r * torch.sigmoid(b[:, None] - a[:, None] * r)  # (n, R)
    scale = sector * (2 / n_t) / (2 * math.pi * variance.prod(1).sqrt())
    return (density.sum(2) * radial).sum(1) * scale


def _line(mean: Tensor, variance: Tensor, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """One coordinate has zero width: an integral along the other, split where the distance is smallest (at 0)."""
    axis = variance.argmax(1, keepdim=True)
    along, across = mean.gather(1, axis)[:, 0], mean.gather(1, 1 - axis)[:, 0]
    sd = variance.amax(1).sqrt()
    reach, step = _reach(tolerance)
    result = torch.zeros_like(a)
    for sign in (1, -1):
        centre = sign * along
        low, high = (centre - reach * sd).clamp_min(0), (centre + reach * sd).clamp_min(0)
        scale = torch.minimum(sd * step, step * step / (2 * a))
        bend = across.abs().clamp_min(1e-12)  # sqrt(t^2 + across^2) has poles at +- i across
        depth = torch.where(across.abs() * a < 0.1 * tolerance, 1.0, (1 + (high / bend).log2()).clamp(1, 40))
        need = 10 + 2 * (high - low) / scale + 8 * depth
        result += _by_size(_line_grid, need, torch.ones_like(need), (centre, sd, across, a, b, low, high))
    return result


def _line_grid(n_r: int, _: int, *inputs: Tensor) -> Tensor:
    centre, sd, across, a, b, low, high = inputs
    nodes, weights = _gauss_legendre(n_r, sd.device)
    half = (high - low)[:, None] / 2
    u = (1 + nodes) / 2  # t = low + (high - low) u^2 concentrates the nodes where the distance may bend
    t = low[:, None] + 2 * half * u.square()
    jacobian = 2 * half * u  # dt / d(nodes)
    density = (-0.5 * ((t - centre[:, None]) / sd[:, None]).square()).exp() / (sd[:, None] * math.sqrt(2 * math.pi))
    r = torch.hypot(t, across[:, None].expand_as(t))
    return (weights * jacobian * density * torch.sigmoid(b[:, None] - a[:, None] * r)).sum(1)


def _isotropic(mean: Tensor, variance: Tensor, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Any D, equal variances: an integral over the length; the squared length is noncentral chi-squared."""
    reach, step = _reach(tolerance)
    dim, sd, radius = mean.shape[1], variance[:, 0].sqrt(), mean.norm(dim=1)
    square = (radius / sd).square() + dim  # mean of the squared length; the length itself varies by less than sd
    low, high = (sd * ((square - 1).sqrt() - 1 - reach)).clamp_min(0), sd * (square.sqrt() + 1 + reach)
    need = 12 + 2 * (high - low) / torch.minimum(sd * step, step * step / (2 * a))
    return _by_size(_isotropic_grid, need, torch.ones_like(need), (radius, sd, a, b, low, high), dim=dim)


def _isotropic_grid(n_r: int, _: int, *inputs: Tensor, dim: int) -> Tensor:
    radius, sd, a, b, low, high = inputs
    nodes, weights = _gauss_legendre(n_r, sd.device)
    half = (high - low)[:, None] / 2
    r = low[:, None] + half * (1 + nodes)  # (n, R)
    x, centre = (r / sd[:, None]).cpu().numpy(), (radius / sd)[:, None].cpu().numpy()
    near = np.minimum(centre, REMOTE)
    density = 2 * x * ncx2.pdf(x**2, dim, near**2)
    gaussian = np.exp(-((x - centre - (dim - 1) / (2 * centre.clip(1))) ** 2) / 2) / math.sqrt(2 * math.pi)
    density = torch.from_numpy(np.where(centre < REMOTE, density, gaussian)).to(r.device) / sd[:, None]
    return (weights * half * density * torch.sigmoid(b[:, None] - a[:, None] * r)).sum(1)


def _by_size(
    grid: Callable[..., Tensor], radial: Tensor, angular: Tensor, inputs: tuple[Tensor, ...], **options: int
) -> Tensor:
    """Evaluate `grid` with the nodes that each pair needs, rounded up in steps of about 20 %."""
    sizes = torch.stack([_round_up(radial), _round_up(angular)], 1)  # (n, 2)
    result = torch.empty(len(radial), dtype=torch.float64, device=radial.device)
    kinds, which = sizes.unique(dim=0, return_inverse=True)
    for kind, (n_r, n_t) in enumerate(kinds.tolist()):
        for part in (which == kind).nonzero()[:, 0].split(max(1, NODES_AT_ONCE // (n_r * n_t))):
            result[part] = grid(n_r, n_t, *(x[part] for x in inputs), **options)
    return result


def _round_up(need: Tensor) -> Tensor:
    steps = (need.clamp(1, MAX_NODES).log2() * 4).ceil() / 4
    return (2**steps).ceil().long()


@lru_cache(maxsize=64)
def _gauss_legendre(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    nodes, weights = roots_legendre(n)  # O(n^2); NumPy's leggauss is O(n^3)
    return torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)
