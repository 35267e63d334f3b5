"""The later metrics against their definitions, pair by pair in plain loops."""

import math

import numpy as np
import pytest
import torch

from prdc_metrics import authenticity, compute_family, nearest_reals
from prdc_metrics.family import good_share_scores

RNG = np.random.default_rng(0)
PLAIN = RNG.standard_normal((83, 5))
SETS = {
    "plain": (PLAIN, RNG.standard_normal((61, 5)) + 0.3),
    "odd sizes, float32": (PLAIN[:80].astype("f"), RNG.standard_normal((47, 5)).astype("f") * 1.3),
    "far apart": (PLAIN, RNG.standard_normal((61, 5)) + 50),
    "offset": (PLAIN + 1e6, PLAIN[:50] * 0.7 + 1e6),
    "two far clusters": (PLAIN + 1e6 * (np.arange(83) % 2)[:, None], PLAIN[:50] + 1e6 + 0.1),
    "integers with ties": (RNG.integers(-3, 4, (83, 3)), RNG.integers(-3, 4, (61, 3))),
    "crowded": (np.repeat(RNG.integers(0, 2, (2, 3)), 350, 0), RNG.integers(0, 2, (21, 3))),
    "copies": (PLAIN, PLAIN[::-1][:40].copy()),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*radius 0")
each_set = pytest.mark.parametrize("real, fake", SETS.values(), ids=SETS)


def distances(a, b):
    return [[math.dist(x, y) for y in b] for x in a]


def by_definition(real, fake, k):
    """Loops over pairs, nothing shared with the package."""
    real, fake = real.astype(float).tolist(), fake.astype(float).tolist()
    d = distances(real, fake)
    own = {}
    for name, points in (("real", real), ("fake", fake)):
        rows = distances(points, points)
        own[name] = [sorted(row[:i] + row[i + 1 :]) for i, row in enumerate(rows)]
    radius, fake_radius = ([row[k - 1] for row in own[name]] for name in ("real", "fake"))
    n, m = len(real), len(fake)
    in_real = [[d[i][j] < radius[i] for j in range(m)] for i in range(n)]
    in_fake = [[d[i][j] < fake_radius[j] for j in range(m)] for i in range(n)]
    precision = sum(any(in_real[i][j] for i in range(n)) for j in range(m)) / m
    recall = sum(any(row) for row in in_fake) / n
    coverage = sum(any(row) for row in in_real) / n
    covered_fakes = sum(any(in_fake[i][j] for i in range(n)) for j in range(m)) / m
    found = {"symmetric_precision": min(precision, covered_fakes), "symmetric_recall": min(recall, coverage)}

    for name, reach, size in (("p_precision", radius, m), ("p_recall", fake_radius, n)):
        width, total = 1.2 * sum(reach) / len(reach), 0.0
        for one in range(size):
            outside = 1.0
            for each in [d[i][one] for i in range(n)] if name == "p_precision" else d[one]:
                outside *= each / width if each < width else 1.0
            total += 1 - outside
        found[name] = total / size

    clipped = [min(r, float(np.median(radius))) for r in radius]
    around = [sum(d[i][j] <= clipped[i] for i in range(n)) for j in range(m)]
    rows = distances(real, real)
    ideal = [sum(rows[i][j] <= clipped[i] for i in range(n) if i != j) for j in range(n)]
    found["clipped_density"] = min(1, np.mean(np.minimum(around, k)) / np.mean(np.minimum(ideal, k)))
    score = np.mean([min(sum(row), k) / k for row in in_real])
    found["clipped_coverage"] = sum(value < score for value in good_share_scores(n, m, k)) / (m + 1)

    authentic = 0
    for j in range(m):
        nearest = min(range(n), key=lambda i: d[i][j])
        authentic += own["real"][nearest][0] < d[nearest][j]
    return found | {"authenticity": authentic / m}


@pytest.mark.parametrize("k, tile", [(1, None), (5, 48)])
@each_set
def test_the_family_is_its_definitions(real, fake, k, tile):
    found = compute_family(real, fake, k, tile=tile)
    assert all(type(value) is float and 0 <= value <= 1 for value in found.values())
    assert found == pytest.approx(by_definition(real, fake, k), abs=1e-12)


@each_set
def test_nearest_reals_in_order(real, fake):
    """Every index, also where reals are equally near: the lower row comes first."""
    found = nearest_reals(real, fake, 7, tile=16)
    squared = ((fake[:, None].astype(float) - real[None].astype(float)) ** 2).sum(-1)
    order = squared.argsort(1, kind="stable")[:, :7]
    if not np.array_equal(found.indices.numpy(), order):  # sums in another order differ in the last bit
        np.testing.assert_allclose(np.take_along_axis(squared, found.indices.numpy(), 1), np.sort(squared)[:, :7])
        assert real.dtype.kind == "f"
    np.testing.assert_allclose(found.distances.numpy(), np.sqrt(np.take_along_axis(squared, order, 1)), rtol=1e-12)


def test_clipped_coverage_reads_as_a_share_of_good_samples():
    """Salvy et al.: with a share of fakes far away the value is near the share that is left."""
    rng = np.random.default_rng(1)
    real = rng.standard_normal((600, 4))
    for share in (0.25, 0.5, 1.0):
        values = []
        for _ in range(4):
            fake = rng.standard_normal((600, 4))
            fake[round(600 * share) :] += 1e3
            values.append(compute_family(real, fake, 5))
        assert np.mean([v["clipped_coverage"] for v in values]) == pytest.approx(share, abs=0.05)
        assert np.mean([v["clipped_density"] for v in values]) == pytest.approx(share, abs=0.07)


def test_good_share_scores_by_simulation():
    """Any continuous law will do; N != M."""
    rng = np.random.default_rng(2)
    n, k, draws = 12, 3, []
    for _ in range(4000):
        real, fake = rng.random(n), rng.random(20)
        radius = np.sort(np.abs(real[1:] - real[0]))[k - 1]
        draws.append([min((np.abs(fake[:m] - real[0]) < radius).sum(), k) / k for m in (5, 20)])
    scores = good_share_scores(n, 20, k)
    assert len(scores) == 21 and (scores[:k] == 0).all() and (np.diff(scores) >= 0).all()
    np.testing.assert_allclose(np.mean(draws, 0), scores[[5, 20]], atol=4 * np.std(draws, 0).max() / np.sqrt(4000))


def test_copies_are_not_authentic():
    """A fake nearer to its real than any other real is a copy, moved a little or not."""
    mask = authenticity(PLAIN, np.concatenate([PLAIN[:3], PLAIN[3:6] + 1e-6, PLAIN[:1] + 50]))
    assert mask.dtype == torch.bool and mask.tolist() == [False] * 6 + [True]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="k must lie in 1..83 for 83 real samples, got 84"):
        nearest_reals(PLAIN, PLAIN, 84)
    with pytest.raises(ValueError, match="real has 5 dimensions and y 2"):
        authenticity(PLAIN, PLAIN[:, :2])
    with pytest.raises(ValueError, match="k must lie in 1..3 for 4 fake samples, got 5"):
        compute_family(PLAIN, PLAIN[:4], 5)
    with pytest.raises(ValueError, match="real has 5 dimensions and fake 3"):
        compute_family(PLAIN, PLAIN[:, :3], 5)
