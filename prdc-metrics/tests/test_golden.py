"""Every decision equals the float64 direct-difference oracle: reference fixtures, tiles, threads, filters, ranks."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prdc_metrics import compute_prdc, expected_coverage, prdc, smallest_k

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
pytestmark = pytest.mark.filterwarnings("ignore:.*radius 0", "ignore:.*on the sphere", "ignore:nearest_k=")


def check(case: str, **options) -> None:
    z = np.load(GOLDEN / f"{case}.npz")
    k, few = int(z["nearest_k"]), len(z["fake"]) <= int(z["nearest_k"])
    metrics = ("precision", "density", "coverage") if few else ("precision", "recall", "density", "coverage")
    result = prdc(z["real"], z["fake"], (k,), metrics=metrics, masks=True, **options)
    for name in metrics:
        assert result.values[k][name] == pytest.approx(float(z[f"exact_{name}"]), abs=1e-12), name
    for name in ("fake_counts", "precision_mask", "coverage_mask") + (() if few else ("recall_mask",)):
        np.testing.assert_array_equal(getattr(result, name)[:, 0].numpy(), z[name], err_msg=name)
    for name in ("real_radii",) if few else ("real_radii", "fake_radii"):
        np.testing.assert_allclose(getattr(result, name)[:, 0].numpy(), z[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("tile", [64, None])
@pytest.mark.parametrize("case", CASES)
def test_fixture(case, tile):
    check(case, tile=tile)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_fixture_in_any_filter_precision(case, precision):
    check(case, tile=64, precision=precision)


@pytest.mark.parametrize("case", CASES)
def test_fixture_with_two_threads(case):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "recipe", json.loads((GOLDEN / "recipes.json").read_text()), ids=lambda r: f"{r['N']}-{r['D']}"
)
def test_recipe(recipe):
    real, fake = (_from_recipe(recipe, side) for side in ("real", "fake"))
    for x, side in ((real, "real"), (fake, "fake")):
        if hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() != recipe[f"{side}_sha256"]:
            pytest.skip("this numpy draws other normals than the recipe's")
    k = recipe["nearest_k"]
    result = prdc(real, fake, (k,), masks=True)
    for name, value in recipe["exact"].items():
        assert result.values[k][name] == pytest.approx(value, abs=1e-12)
    assert int(result.fake_counts.sum()) == recipe["count_inside"]
    assert float(result.real_radii.mean()) == pytest.approx(recipe["real_radii_mean"], rel=1e-9)
    assert float(result.fake_radii.mean()) == pytest.approx(recipe["fake_radii_mean"], rel=1e-9)


def _from_recipe(recipe: dict, side: str) -> np.ndarray:
    """Evaluate the recipe's formula, e.g. "(default_rng(1).standard_normal((M,D))*0.5) cast to dtype"."""
    formula = recipe[side].removesuffix(" cast to dtype")
    names = {"default_rng": np.random.default_rng, "N": recipe["N"], "M": recipe["M"], "D": recipe["D"]}
    return eval(formula, {"__builtins__": {}}, names).astype(recipe["dtype"])


def test_closed_forms():
    golden = json.loads((GOLDEN / "closed_form.json").read_text())
    for row in golden["expectation"]:
        assert expected_coverage(row["N"], row["M"], row["k"]) == pytest.approx(row["expected_coverage"], abs=1e-12)
    for row in golden["smallest_k"]:
        assert smallest_k(row["N"], row["M"], row["target"]) == row["smallest_k"]


def test_drop_in_returns_python_floats_in_the_reference_order():
    z = np.load(GOLDEN / "gauss_n_ne_m.npz")
    values = compute_prdc(z["real"], z["fake"], int(z["nearest_k"]))
    assert list(values) == ["precision", "recall", "density", "coverage"]
    assert all(type(value) is float for value in values.values())
