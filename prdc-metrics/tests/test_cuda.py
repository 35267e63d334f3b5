"""The exact metrics in every filter precision, features, the VAE and table rows on a CUDA device."""

import numpy as np
import pytest
import torch
from PIL import Image

from prdc_metrics import (
    PRDCMetric,
    RealManifold,
    authenticity,
    compute_family,
    experiments,
    extract_features,
    knn_radii,
    nearest_reals,
    prdc,
    realism,
    relabelled_intervals,
    subsample_intervals,
)
from prdc_metrics.data import load_digits
from prdc_metrics.experiments import run_tables, tables
from prdc_metrics.train import VAE, fit_vae, sample

DEVICE = "cuda"
TABLES = {table.id: table for table in tables()}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*radius 0", "ignore:.*on the sphere", "ignore:nearest_k="),
]
SMALL = dict(latent=3, hidden=(16,), epochs=6, batch_size=32, seed=1, checkpoint_every=2)


def hard_sets():
    """Ties, copies, a far point, large offsets, many dimensions: (name, real, fake)."""
    rng = np.random.default_rng(0)
    yield "ties", rng.integers(-3, 4, (300, 3)).astype(float), rng.integers(-3, 4, (200, 3)).astype(float)
    normal = rng.normal(size=(300, 64)).astype(np.float32)
    yield "normal", normal, rng.normal(size=(257, 64)).astype(np.float32)
    yield "copies", np.concatenate([normal, normal[:100], np.repeat(normal[:1], 40, 0)]), normal[:120]
    yield "offset", 1e4 + rng.normal(size=(200, 8)), 1e4 + rng.normal(size=(150, 8))
    yield "outlier", np.concatenate([normal, [[1e6] * 64]]), rng.normal(size=(99, 64))
    yield "wide", rng.normal(size=(120, 4096)).astype(np.float32), rng.normal(size=(90, 4096)).astype(np.float32)


HARD_SETS = list(hard_sets())


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64"])
@pytest.mark.parametrize("name, real, fake", HARD_SETS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("closed", [False, True])
def test_decisions_are_the_cpu_s(name, real, fake, precision, closed):
    """Of every sample, not only in the mean; the CPU's are tested against the definition."""
    options = {"ks": (1, 3, 10), "masks": True, "closed_ball": closed, "precision": precision}
    expected, found = (prdc(real, fake, device=device, **options) for device in ("cpu", DEVICE))
    assert found.values == expected.values and found.counts == expected.counts
    for part in ("fake_counts", "recall_mask", "coverage_mask", "precision_mask", "real_radii"):
        np.testing.assert_array_equal(getattr(found, part).cpu().numpy(), getattr(expected, part).numpy())


@pytest.mark.parametrize("tile", [64, None])
def test_tiles_on_the_device(tile):
    _, real, fake = HARD_SETS[1]
    assert prdc(real, fake, (5,), device=DEVICE, tile=tile).values == prdc(real, fake, (5,)).values


def test_everything_that_is_built_on_them(tmp_path):
    _, real, fake = HARD_SETS[1]
    there, these = torch.from_numpy(real).to(DEVICE), torch.from_numpy(fake).to(DEVICE)
    assert torch.equal(knn_radii(there, 5).cpu(), knn_radii(real, 5))
    assert compute_family(there, these, 5) == pytest.approx(compute_family(real, fake, 5), rel=1e-9)
    assert torch.equal(authenticity(there, these).cpu(), authenticity(real, fake))
    for ours, theirs in zip(nearest_reals(there, these, 3), nearest_reals(real, fake, 3), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
    torch.testing.assert_close(realism(there, these).cpu(), realism(real, fake))
    manifold = RealManifold.fit(there, (5,))
    manifold.save(tmp_path / "m.safetensors")
    assert RealManifold.load(tmp_path / "m.safetensors", DEVICE).score(these).values == prdc(real, fake, (5,)).values
    for intervals in (relabelled_intervals, subsample_intervals):
        ours, theirs = intervals(there, these, 5), intervals(real, fake, 5)
        np.testing.assert_allclose(ours.to_numpy(), theirs.to_numpy())
    metric = PRDCMetric(ks=(5,)).to(DEVICE)
    for part in (slice(0, 100), slice(100, None)):
        metric.update(real=there[part], fake=these[part])
    assert {name: value.item() for name, value in metric.compute().items()} == prdc(real, fake, (5,)).values[5]


def test_features_are_the_cpu_s(tmp_path):
    """Without TF32; also from files, by worker processes beside CUDA."""
    images = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    cpu, cuda = (extract_features(images, "random-vgg16-64", side=64, device=device) for device in ("cpu", DEVICE))
    assert cuda.device.type == "cpu" and cuda.dtype == torch.float32
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
    half = extract_features(images, "random-vgg16-64", side=64, device=DEVICE, precision="bf16")
    assert half.dtype == torch.float32 and (half - cpu).norm() < 0.1 * cpu.norm()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    options = {"side": 64, "batch_size": 2, "num_workers": 2}
    files = [extract_features(tmp_path, "random-vgg16-64", device=device, **options) for device in ("cpu", DEVICE)]
    torch.testing.assert_close(files[1], files[0], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def digits():
    images = load_digits().images.flatten(1)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))][:256]


def weights(model):
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def test_the_vae_s_loss_is_the_cpu_s(digits, monkeypatch):
    """Noise and order are drawn on the device: the mean alone agrees."""
    losses = {"cpu": [], DEVICE: []}
    plain = VAE.forward
    for device, found in losses.items():
        monkeypatch.setattr(VAE, "forward", lambda model, x, found=found: found.append(plain(model, x)) or found[-1])
        fit_vae(digits, device=device, **SMALL)
    ours, theirs = (torch.stack(losses[device]).detach().cpu() for device in (DEVICE, "cpu"))
    assert ours.dtype == torch.float32 and len(ours) == 48
    torch.testing.assert_close(ours[:8].mean(), theirs[:8].mean(), rtol=0.1, atol=0)
    assert ours[-8:].mean() < ours[:8].mean()


def test_an_interrupted_vae_ends_where_the_whole_one_does(digits, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    plain, steps = VAE.forward, []

    def stop(model, x):
        steps.append(1)
        if len(steps) == 40:
            raise Stop
        return plain(model, x)

    whole = fit_vae(digits, device=DEVICE, **SMALL)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(VAE, "forward", stop)
        fit_vae(digits, device=DEVICE, checkpoint=tmp_path / "c.pt", **SMALL)
    torch.manual_seed(99)
    resumed = fit_vae(digits, device=DEVICE, checkpoint=tmp_path / "c.pt", **SMALL)
    assert (weights(resumed) - weights(whole)).norm() < 0.01 * weights(whole).norm()
    images = sample(resumed, 1.0, 5, seed=0)
    assert images.device.type == "cpu" and images.dtype == torch.float32


@pytest.mark.parametrize("table", ["figure-4", "figure-6"])
def test_a_row_of_a_table(tmp_path, monkeypatch, table):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    row = TABLES[table].rows_at("smoke")[0].name
    record, *_ = run_tables([TABLES[table]], "smoke", tmp_path, rows=[row]).records()
    assert record["precision"] == "32-true" and record["device"] == torch.cuda.get_device_name()
    assert 0 <= record["metrics"]["coverage"] <= 1
