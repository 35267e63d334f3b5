"""Properties of the exact metrics, and data made to break filters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prdc_metrics import RealManifold, balls, compute_prdc, expected_coverage, knn_radii, prdc
from prdc_metrics.distances import Frame, pairs_below

pytestmark = pytest.mark.filterwarnings("ignore:.*radius 0", "ignore:.*on the sphere", "ignore:nearest_k=")


def definition(real, fake, k, closed=False):
    """The paper's formulas on all float64 differences: counts, recall mask, coverage mask."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)

    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    def radii(x):
        d = squared(x, x)
        np.fill_diagonal(d, np.inf)
        return np.sort(d, 1)[:, k - 1]

    compare = np.less_equal if closed else np.less
    d = squared(real, fake)
    in_real, in_fake = compare(d, radii(real)[:, None]), compare(d, radii(fake)[None])
    return in_real.sum(0), in_fake.any(1), in_real.any(1)


def agree(real, fake, *ks, closed=False, **options):
    result = prdc(real, fake, ks, masks=True, closed_ball=closed, **options)
    for column, k in enumerate(ks):
        counts, recall, coverage = definition(real, fake, k, closed)
        np.testing.assert_array_equal(result.fake_counts[:, column].cpu().numpy(), counts)
        np.testing.assert_array_equal(result.recall_mask[:, column].cpu().numpy(), recall)
        np.testing.assert_array_equal(result.coverage_mask[:, column].cpu().numpy(), coverage)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_small_integer_data_full_of_ties(data):
    """Integer coordinates: distances are exact in any order, so ties are real ties."""
    n, m, dim = (data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40)), data.draw(st.integers(1, 4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    width = data.draw(st.integers(1, 6))
    real, fake = rng.integers(0, width, (n, dim)), rng.integers(0, width, (m, dim))
    k = data.draw(st.integers(1, min(n, m) - 1))
    closed, precision = data.draw(st.booleans()), data.draw(st.sampled_from(["float32", "bf16", "tf32", "float64"]))
    agree(real, fake, *sorted({1, k}), closed=closed, precision=precision)


def _hard_sets():
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((700, 12))
    yield "plain", normal[:400], normal[400:]
    yield "offset", (normal[:400] + 1e7), (normal[400:] + 1e7)
    yield "five huge rows", np.concatenate([normal[:395], normal[395:400] * 1e4]), normal[400:]
    yield "two far clusters", normal[:400] + 1e6 * (np.arange(400) % 2)[:, None], normal[400:] + 1e6
    yield "wide fakes", normal[:400], normal[400:] * 6
    yield "narrow fakes", normal[:400], normal[400:] * 0.05
    yield "wide reals", normal[:400] * 20, normal[400:]
    yield "copies", normal[:400], normal[rng.permutation(400)]
    yield "copies far away", (normal[:400] + 1e5).astype("f"), (normal[rng.permutation(400)] + 1e5).astype("f")
    yield "each row k+1 times", np.repeat(normal[:70], 6, 0), normal[400:]
    yield "one blank in three", normal[:400] * (np.arange(400) % 3 > 0)[:, None], normal[400:]
    yield "fakes far from reals", normal[:400], normal[400:] + 1e5
    yield "tiny scale", normal[:400] * 2.0**-400, normal[400:] * 2.0**-400
    yield "mixed scale", np.concatenate([normal[:200] * 1e-30, normal[200:400]]), normal[400:] * 1e-30
    yield "odd sizes", normal[:257], normal[400:401].repeat(17, 0) + np.arange(17)[:, None]


HARD_SETS = list(_hard_sets())


@pytest.mark.parametrize("tile", [64, 96, None])
@pytest.mark.parametrize("name, real, fake", HARD_SETS, ids=lambda x: x if isinstance(x, str) else "")
def test_hard_data_equals_the_definition(name, real, fake, tile):
    agree(real, fake, 5, tile=tile)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
@pytest.mark.parametrize("name, real, fake", HARD_SETS, ids=lambda x: x if isinstance(x, str) else "")
def test_hard_data_in_any_filter_precision(name, real, fake, precision):
    agree(real, fake, 1, 3, 10, precision=precision, tile=128)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("k", [150, 3], ids=["many in a ball: counted", "few in a ball: listed"])
def test_points_on_the_sphere_in_both_branches(k, closed, precision, monkeypatch):
    """Integers tie exactly."""
    listed = []
    monkeypatch.setattr(balls, "pairs_below", lambda *given: listed.append(1) or pairs_below(*given))
    rng = np.random.default_rng(0)
    real, fake = rng.integers(-12, 13, (300, 3)), rng.integers(-12, 13, (200, 3))
    agree(real, fake, 2, k, closed=closed, precision=precision)
    assert bool(listed) == (k == 3)


def test_copies_give_exactly_one():
    """k - 1 neighbours and the point itself lie strictly inside; the k-th lies on the sphere."""
    x = np.random.default_rng(0).standard_normal((257, 48)).astype("f") + 1000
    assert set(compute_prdc(x, x[::-1].copy(), 5, tile=64).values()) == {1.0}


def test_one_huge_row_does_not_widen_the_bracket_of_the_others():
    x = np.random.default_rng(0).standard_normal((2000, 64))
    calm = prdc(x[:1000], x[1000:]).recheck_pairs
    x[:5] *= 1e4
    assert prdc(x[:1000], x[1000:]).recheck_pairs < 3 * calm


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
@pytest.mark.parametrize("kind", ["normal", "positive", "tiny", "heavy", "clusters"])
def test_the_bracket_holds(precision, kind):
    """lower <= exact <= lower + slacks for every pair of an adversarial tile."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 512, generator=g, dtype=torch.float64)
    x = {
        "normal": x,
        "positive": x.abs() + 3,
        "tiny": x * 1e-38,
        "heavy": x / torch.rand(128, 1, generator=g, dtype=torch.float64) ** 3,
        "clusters": x + 1e5 * (torch.arange(128) % 2)[:, None],
    }[kind]
    frame = Frame(x, precision=precision)
    points = frame.points(x)
    exact = torch.cdist(x * frame.scale, x * frame.scale, compute_mode="donot_use_mm_for_euclid_dist").square()

    def check(lower, exact, slack):
        assert (lower.double() <= exact * (1 + 1e-12)).all()
        assert (exact <= (lower.double() + slack[:, None] + slack) * (1 + 1e-12)).all()

    out, slack = points.values.new_empty(128 * 128), points.slack.double()
    check(frame.lower_bounds(points, slice(0, 128), points, slice(0, 128), out), exact, slack)
    for part in (slice(0, 128), slice(30, 127), slice(5, 7)):  # strips of equal and of unequal width
        within = frame.lower_bounds_within(points, part, out)
        assert (within.diagonal() == torch.inf).all()
        check(within.fill_diagonal_(0), exact[part, part].fill_diagonal_(0), slack[part])


@pytest.mark.parametrize("precision, bits", [("tf32", 10), ("bf16", 7)])
def test_the_bracket_holds_where_rounding_costs_most(precision, bits):
    """Two opposite points that lose half a spacing each: 4 x^2 becomes 4, and the bound has no room to spare."""
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(64)[:, None] * (1 + 2.0 ** -(bits + 1) - 2.0**-30)
    frame = Frame(x, precision=precision)
    points = frame.points(x)
    lower = frame.lower_bounds(points, slice(0, 128), points, slice(0, 128), points.values.new_empty(128 * 128))
    exact = (x - x.T).square() * frame.scale**2
    assert (lower <= exact).all() and (exact <= lower.double() + points.slack[:, None] + points.slack).all()
    assert points.slack.double().max() < 0.51 * exact.max() * 2.0 ** -(bits - 1)  # 8 w of 4, two slacks of twice that


def test_order_scale_and_roles():
    rng = np.random.default_rng(3)
    real, fake = rng.standard_normal((300, 10)), rng.standard_normal((170, 10)) + 0.3
    values = compute_prdc(real, fake, 4)
    assert compute_prdc(rng.permutation(real), rng.permutation(fake), 4) == values
    for exponent in (-300, -80, 64, 300):
        assert compute_prdc(real * 2.0**exponent, fake * 2.0**exponent, 4) == values
    swapped = compute_prdc(fake, real, 4)
    assert (swapped["precision"], swapped["recall"]) == (values["recall"], values["precision"])
    assert swapped["density"] != values["density"]


def test_float32_extremes():
    rng = np.random.default_rng(3)
    real, fake = rng.standard_normal((200, 8)).astype("f"), rng.standard_normal((150, 8)).astype("f")
    values = compute_prdc(real, fake, 4)
    for exponent in (-80, 64):
        assert compute_prdc(real * np.float32(2.0**exponent), fake * np.float32(2.0**exponent), 4) == values


@pytest.mark.parametrize("law", ["standard_normal", "uniform", "standard_cauchy"])
@pytest.mark.parametrize("n, m, k", [(120, 120, 5), (60, 240, 1), (240, 60, 5)])
def test_expectations_hold_for_any_law(law, n, m, k):
    """Lemmas 1 and 2 by Monte Carlo; N != M catches M in the numerator."""
    draws = []
    for seed in range(60):
        draw = getattr(np.random.default_rng(seed), law)
        values = compute_prdc(draw(size=(n, 3)), draw(size=(m, 3)), k, metrics=("density", "coverage"))
        draws.append((values["density"], values["coverage"]))
    mean, error = np.mean(draws, 0), np.std(draws, 0) / np.sqrt(len(draws))
    assert abs(mean[0] - 1) < 4 * error[0]
    assert abs(mean[1] - expected_coverage(n, m, k)) < 4 * error[1]


def test_several_ks_and_the_manifold_equal_single_runs(tmp_path):
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((400, 6)), rng.standard_normal((350, 6)) * 1.2
    many = prdc(real, fake, (10, 1, 3))
    assert many.ks == (1, 3, 10)
    manifold = RealManifold.fit(real, (1, 3, 10))
    manifold.save(tmp_path / "real.safetensors")
    for k in many.ks:
        assert many.values[k] == compute_prdc(real, fake, k)
        assert RealManifold.load(tmp_path / "real.safetensors").score(fake).values[k] == many.values[k]
    assert torch.equal(manifold.radii[:, 1], knn_radii(real, 3))


@pytest.mark.parametrize("owner", [None, "all", "cuda", "mkldnn"])
@pytest.mark.parametrize("value", ["bf16", "tf32"])
def test_the_callers_matmul_settings_do_not_matter(owner, value):
    """Set through the older switch or those that PyTorch has since 2.9; afterwards all stand as before."""
    backends = torch.backends
    newer = hasattr(backends.cuda.matmul, "fp32_precision")
    if owner and (not newer or (owner, value) == ("cuda", "bf16")):
        pytest.skip("no such switch")
    owners = {"all": backends, "cuda": backends.cuda.matmul, "mkldnn": backends.mkldnn.matmul}
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((300, 64)).astype("f"), rng.standard_normal((300, 64)).astype("f")
    expected = compute_prdc(real, fake, 5)

    def state():
        found = [each.fp32_precision for each in owners.values()] if newer else []
        for read in (torch.get_float32_matmul_precision, lambda: backends.cuda.matmul.allow_tf32):
            try:
                found.append(read())
            except RuntimeError:  # PyTorch's own, once the newer switches are used
                found.append("raises")
        return found

    convolution = backends.cudnn.conv.fp32_precision if newer else None
    try:
        if owner:
            owners[owner].fp32_precision = value
        else:
            torch.set_float32_matmul_precision({"bf16": "medium", "tf32": "high"}[value])
        before = state()
        for precision in ("float32", "bf16", "tf32"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert compute_prdc(real, fake, 5, precision=precision) == expected
        assert state() == before
        if owner == "all":
            backends.fp32_precision = "ieee"
            assert backends.mkldnn.matmul.fp32_precision == "ieee"  # follows its parent as before
    finally:
        if owner:
            owners[owner].fp32_precision = "none"
            backends.cudnn.conv.fp32_precision = convolution  # setting the parent has set it, too
        else:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("stage", ("real", "fake", "balls"))
def test_hours_of_distances_go_on_where_they_were_cut_off(tmp_path, monkeypatch, caplog, stage):
    """Killed in each of the three passes; no tile is computed twice, and the numbers are those of one call."""
    rng = np.random.default_rng(2)
    real, fake = rng.standard_normal((300, 6)), rng.standard_normal((280, 6))
    options = {"ks": (2, 5), "tile": 32, "masks": True}
    tiles = [0]

    def counted(usual):
        def tile_of(*arguments):
            if tiles[0] == 0:
                raise KeyboardInterrupt
            tiles[0] -= 1
            return usual(*arguments)

        return tile_of

    for name in ("lower_bounds", "lower_bounds_within"):
        monkeypatch.setattr(Frame, name, counted(getattr(Frame, name)))
    tiles[0] = 10**6
    whole = prdc(real, fake, **options)
    total = 10**6 - tiles[0]
    assert total == 10 * 11 // 2 + 9 * 10 // 2 + 10 * 9
    first = {"real": 20, "fake": 55 + 20, "balls": 55 + 45 + 20}[stage]
    monkeypatch.setattr("prdc_metrics.schedule.SAVE_EVERY", -1.0)
    tiles[0] = first
    with pytest.raises(KeyboardInterrupt):
        prdc(real, fake, checkpoint=tmp_path / "state", **options)
    assert not tiles[0] and list((tmp_path / "state").iterdir())
    tiles[0] = 10**6
    prdc(real + 1, fake + 1, checkpoint=tmp_path / "state", **options)  # other data neither use nor remove it
    tiles[0] = total - first
    resumed = prdc(real, fake, checkpoint=tmp_path / "state", **options)
    assert not tiles[0] and "resuming at tile" in caplog.text
    for name in ("values", "counts", "recheck_pairs"):
        assert getattr(resumed, name) == getattr(whole, name)
    for name in ("real_radii", "fake_radii", "fake_counts", "recall_mask", "coverage_mask"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert not list((tmp_path / "state").iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((60, 3))
    monkeypatch.setattr("prdc_metrics.schedule.Schedule.finished", lambda self: None)
    prdc(x, x + 0.1, checkpoint=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.pt: damaged .*name another checkpoint folder"):
        prdc(x, x + 0.1, checkpoint=tmp_path)
