"""Bad input: one clear error, as the card of the reference's behaviour says; good odd input works."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics import MetricCollection

from prdc_metrics import (
    PRDCMetric,
    RealManifold,
    compute_prdc,
    knn_radii,
    prdc,
    realism,
    relabelled_intervals,
    smallest_k,
    subsample_intervals,
)

X = np.random.default_rng(0).standard_normal((30, 4))
CASES = {
    "NaN in real": (np.where(np.arange(30)[:, None] == 7, np.nan, X), X, 5),
    "inf in real": (np.where(np.arange(30)[:, None] == 7, np.inf, X), X, 5),
    "1-D input": (X[:, 0], X, 5),
    "3-D input": (X[None], X, 5),
    "feature dims differ": (X, X[:, :3], 5),
    "nearest_k=0": (X, X, 0),
    "nearest_k=-1": (X, X, -1),
    "nearest_k=5.0": (X, X, 5.0),
    "empty fake": (X, X[:0], 5),
    "nearest_k > N-2 (k=N-1)": (X, X, 29),
    "nearest_k > N-1": (X, X, 30),
    "Python lists": (X.tolist(), X.tolist(), 5),
    "torch CPU tensor float64": (torch.tensor(X), torch.tensor(X), 5),
    "torch tensor with requires_grad": (torch.tensor(X, requires_grad=True), torch.tensor(X), 5),
    "bfloat16 tensor": (torch.tensor(X).bfloat16(), torch.tensor(X).bfloat16(), 5),
    "integer or uint8 arrays": ((X * 50).astype(int), (X * 50).astype(np.int8), 5),
    "real float32, fake float64": (X.astype("f"), X, 5),
}


@pytest.mark.parametrize(
    "row", json.loads((Path(__file__).parent / "golden" / "error_behaviour.json").read_text()), ids=lambda r: r["case"]
)
def test_odd_input(row):
    real, fake, k = CASES[row["case"]]
    expected = row.get("ours", row["reference"])
    if expected in ("ValueError", "TypeError"):
        with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[expected]):
            compute_prdc(real, fake, k)
    else:
        assert all(0 <= value <= 30 for value in compute_prdc(real, fake, k).values())


def test_messages_name_the_place():
    with pytest.raises(ValueError, match="real has NaN or infinite values in 1 of 30 rows, first in row 7"):
        compute_prdc(*CASES["NaN in real"])
    with pytest.raises(ValueError, match="real has 4 dimensions and fake 3"):
        compute_prdc(X, X[:, :3], 5)
    with pytest.raises(ValueError, match=r"k must lie in 1..29 for 30 real samples, got 30"):
        compute_prdc(X, X, 30)
    with pytest.raises(ValueError, match="bool"):
        compute_prdc(X, X, True)
    with pytest.raises(ValueError, match="metrics must be some of"):
        compute_prdc(X, X, 5, metrics=("fid",))
    with pytest.raises(ValueError, match="rescale"):
        compute_prdc(X * 1e200, X, 5)
    with pytest.warns(UserWarning, match="radius 0"):
        compute_prdc(np.zeros((10, 2)), X[:, :2], 3)


def test_few_fakes_are_fine_without_recall():
    values = compute_prdc(X, X[:2] + 0.01, 5, metrics=("density", "coverage"))
    assert list(values) == ["density", "coverage"]
    with pytest.raises(ValueError, match="2 fake samples"):
        compute_prdc(X, X[:2] + 0.01, 5)


def test_leaving_recall_out_skips_the_fake_fake_pass(monkeypatch):
    import prdc_metrics.metrics as metrics

    seen = []
    original = metrics.nearest_squared
    monkeypatch.setattr(metrics, "nearest_squared", lambda x, *rest: seen.append(len(x)) or original(x, *rest))
    compute_prdc(X, X[:20], 3, metrics=("precision", "density", "coverage"))
    assert seen == [30]


def test_metric_equals_one_call_and_merges():
    one, two = PRDCMetric(ks=(3,)), PRDCMetric(ks=(3,))
    one.update(real=X[:10], fake=X[:5] + 0.1)
    two.update(real=X[10:])
    two.update(fake=X[5:] + 0.1)
    one.merge_state(two)
    assert one.compute() == compute_prdc(X, X + 0.1, 3)
    with pytest.raises(ValueError, match="fake has 2 dimensions, earlier batches 4"):
        one.update(fake=X[:, :2])
    with pytest.raises(ValueError, match="fake has NaN"):
        one.update(real=X, fake=np.full((1, 4), np.nan))
    assert sum(map(len, one.real)) == 30  # a refused call leaves nothing behind
    one.reset()
    with pytest.raises(ValueError, match="no real and no fake features"):
        one.compute()


def test_metric_is_one_of_torchmetrics():
    """In a collection, cloned, pickled, moved; a forward scores its batch and keeps it."""
    metric = pickle.loads(pickle.dumps(PRDCMetric(ks=(5, 3), metrics=("density",)).to("cpu")))
    assert metric(real=X, fake=X + 0.1)["density_k3"] == compute_prdc(X, X + 0.1, 3)["density"]
    metric.update(real=X + 5, fake=X + 5.1)
    whole = prdc(np.concatenate([X, X + 5]), np.concatenate([X + 0.1, X + 5.1]), (3, 5)).values
    assert metric.clone().compute() == {"density_k3": whole[3]["density"], "density_k5": whole[5]["density"]}
    collection = MetricCollection({"prdc": PRDCMetric(ks=(3,))})
    collection.update(real=X, fake=X + 0.1)
    assert collection.compute() == compute_prdc(X, X + 0.1, 3)


def test_arrays_as_they_come():
    """Views, byte orders, lists, frames: the values of the plain array; or one clear line."""
    values = compute_prdc(X, X + 0.1, 3)
    frame = pd.DataFrame(X)
    same = [X[:, ::-1][:, ::-1], np.asfortranarray(X), X.astype(">f8"), np.ma.masked_invalid(X), frame, X.tolist()]
    same += [frame.astype(object), X.astype(np.longdouble), np.repeat(X, 2, 1)[:, ::2]]
    for x in same:
        assert compute_prdc(x, X + 0.1, 3) == values
    assert compute_prdc(X[::-1], X + 0.1, 3) == values
    with pytest.raises(ValueError, match="real has masked entries"):
        compute_prdc(np.ma.masked_less(X, 0), X, 3)
    with pytest.raises(ValueError, match="real contains something other than numbers"):
        compute_prdc(frame.astype(object).replace(X[0, 0], "a"), X, 3)
    with pytest.raises(ValueError, match="real must hold numbers, got dtype <U1"):
        compute_prdc(np.full((5, 2), "a"), X, 3)
    with pytest.raises(TypeError, match=r"ks must be several k such as \(5,\)"):
        prdc(X, X, 5)


def test_manifold_file_that_was_cut_or_changed_is_refused(tmp_path):
    path = tmp_path / "real.safetensors"
    RealManifold.fit(X, (5,)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:40], b"", whole[:-3] + b"\x00\x01\x02"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="real.safetensors"):
            RealManifold.load(path)
    with pytest.raises(FileNotFoundError):
        RealManifold.load(tmp_path / "none.safetensors")


def test_realism():
    scores = realism(X, np.concatenate([X[:1], X[:1] + 100]), 5)
    assert scores[1] < 0.1
    inside = realism(X, X.mean(0, keepdims=True), 5)
    assert inside.shape == (1,) and inside > 0
    assert torch.isinf(realism(X, X, 5)).sum() == 15  # the half of the reals with the smaller radii


@pytest.mark.parametrize("offset, dtype", [(0, "d"), (1e5, "d"), (0, "f")])
def test_realism_is_its_definition(offset, dtype):
    """Largest ratio of radius to distance over the reals whose radius is at most the median."""
    rng = np.random.default_rng(1)
    spread = rng.uniform(0.2, 3, (301, 1))  # radii that differ much: the wrong half would show
    real = (rng.standard_normal((301, 6)) * spread + offset).astype(dtype)
    fake = (rng.standard_normal((97, 6)) + offset).astype(dtype)
    fake[:5] = real[:5]
    radii = knn_radii(real, 3).numpy()
    distances = np.sqrt(((real[:, None].astype("d") - fake[None].astype("d")) ** 2).sum(-1))
    with np.errstate(divide="ignore"):
        expected = (radii[:, None] / distances)[radii <= np.median(radii)].max(0)
    np.testing.assert_allclose(realism(real, fake, 3).numpy(), expected, rtol=1e-12)


def test_realism_of_balls_without_radius():
    copies = np.repeat(X[:4], 6, 0)
    with pytest.warns(UserWarning, match="radius 0"):
        assert (realism(copies, X, 5) == 0).all()


def test_a_k_that_is_too_small_is_said():
    """As the command line does: coverage cannot reach what the paper's rule asks for."""
    with pytest.warns(UserWarning, match=r"nearest_k=1 gives an expected coverage of 0.508.*smallest_k"):
        compute_prdc(X, X + 0.1, 1)


def test_discrete_features_are_said_to_miss_the_closed_forms():
    """Bits: no two rows equal, yet most distances tie. Continuous features say nothing."""
    rng = np.random.default_rng(0)
    bits = [(rng.random((400, 60)) < 0.2).astype("f") for _ in range(2)]
    with pytest.warns(UserWarning, match="exactly on the sphere of a real: discrete features"):
        assert compute_prdc(*bits, 5)["density"] < 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_prdc(rng.standard_normal((400, 60)), rng.standard_normal((400, 60)), 5)


def test_subsample_intervals_do_not_repeat_points():
    table = subsample_intervals(X, X + 0.01, 3, n=8)
    assert (table.low <= table["mean"]).all() and (table["mean"] <= table.high).all()
    assert table.loc["coverage", "mean"] > 0.3  # halves drawn with replacement would have radii near 0


def test_relabelled_intervals_know_of_ties():
    """Bits of one law: the expectations that fresh draws have, far from the closed forms; N != M."""
    rng = np.random.default_rng(0)

    def bits(rows):
        return (rng.random((rows, 40)) < 0.2).astype("f")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = pd.DataFrame([prdc(bits(200), bits(120)).values[5] for _ in range(30)])
        table = relabelled_intervals(bits(200), bits(120), n=30)
    assert fresh.density.mean() < 0.8 and (table.n == 30).all()
    error = 4 * (fresh.std() ** 2 / 30 + fresh.std() ** 2) ** 0.5  # of 30 draws, and of the one pool
    assert ((table["mean"] - fresh.mean()).abs() < error).all() and abs(table.loc["density", "mean"] - 1) > 0.2
    shifted = relabelled_intervals(X, X + 100, 3, n=5)  # the sets as they are give 0
    assert shifted.loc["coverage", "mean"] > 0.5
    with pytest.raises(ValueError, match="need n >= 2"):
        relabelled_intervals(X, X, n=1)


def test_smallest_k():
    assert smallest_k(10_000, 10_000) == 5
    with pytest.raises(ValueError, match="no k below"):
        smallest_k(3, 1, 0.99)
