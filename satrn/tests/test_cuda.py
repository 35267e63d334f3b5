"""Training on rendered and on stored words, resuming, reading and a table's row on a CUDA device, against the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from satrn import experiments
from satrn.data import inventory
from satrn.data.streams import RenderedWords, normalise
from satrn.evaluate import aspect_ratios, read_all
from satrn.experiments import run_tables, tables, train_and_evaluate
from satrn.measure import evaluate_checkpoint
from satrn.rotation import rotate_words
from satrn.train import build_model, fit, make_fabric

DEVICE = "cuda"
TABLE = next(table for table in tables() if table.id == "table-3a")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NOWHERE = Path("nowhere")


def trained(s, fabric, **options):
    data = RenderedWords(s, s.train_images, 1, fabric.device)
    model = build_model(s, 1, fabric)
    return model, fit(model, data, s, 1, fabric, **options)


def weights(model):
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ctc_weight": 0.1},
        {"accumulate": 2, "recompute": True},
        {"pos": "2d_concat"},
        {"decoder": "lstm"},
        {"encoder": "fan", "decoder": "fan", "img_size": (32, 16)},
        {"warp": "rotate", "rotation": "none"},
    ],
    ids=str,
)
def test_losses_are_the_cpu_s(small_settings, changes):
    """Over six steps from the same weights and words, without dropout: bf16 against float32."""
    s = replace(small_settings, steps=6, **changes)
    _, expected = trained(s, make_fabric("cpu"))
    _, found = trained(s, make_fabric(DEVICE))
    ours, theirs = ([point["loss"] for point in curve] for curve in (found, expected))
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=0.05)


def test_it_trains_in_bf16_and_reads_alike_with_and_without_cache(small_settings):
    fabric = make_fabric(DEVICE)
    s = replace(small_settings, recompute=True, steps=20, dropout=0.1)
    model, curve = trained(s, fabric)
    assert curve[-1]["loss"] < curve[0]["loss"]
    images = normalise(RenderedWords(s, 8, 1, fabric.device).images, s)
    model.eval()
    assert model.generate(images).texts == model.generate(images, cache=False).texts
    assert len(model.generate(images, beam=3).texts) == 8


def test_an_interrupted_run_ends_where_the_whole_one_does(tmp_path, small_settings):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 13:
            raise Stop

    s, fabric = replace(small_settings, steps=20, dropout=0.2), make_fabric(DEVICE)
    start = weights(build_model(s, 1, fabric))
    whole, curve = trained(s, fabric)
    with pytest.raises(Stop):
        trained(s, fabric, checkpoint=tmp_path / "c.pt", checkpoint_every=6, before_step=stop)
    torch.manual_seed(99)
    resumed, again = trained(s, fabric, checkpoint=tmp_path / "c.pt")
    assert again[-1]["loss"] == pytest.approx(curve[-1]["loss"], rel=0.02)
    assert (weights(resumed) - weights(whole)).norm() < 0.05 * (weights(whole) - start).norm()


@pytest.mark.parametrize("decoder", ["satrn", "lstm"])
def test_reading_is_the_cpu_s(small_settings, decoder):
    """Float32 on both, up to TF32 in the convolutions."""
    s = replace(small_settings, decoder=decoder, steps=30)
    model, _ = trained(s, make_fabric("cpu"))
    model.eval()
    data = RenderedWords(s, 32, 5, torch.device("cpu"))
    images = normalise(data.images, s)
    targets = data.targets.clamp(min=0)
    with torch.no_grad():
        expected = model(images, targets)
    texts, labels = read_all(model, data)
    model.to(DEVICE)
    with torch.no_grad():
        found = model(images.to(DEVICE), targets.to(DEVICE))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0.02, atol=0.02)
    read, same = read_all(model, data)
    assert same == labels and sum(a == b for a, b in zip(read, texts, strict=True)) >= 30
    turned, _ = read_all(model, data, degrees=30.0)
    assert len(turned) == 32
    if decoder == "satrn":
        assert aspect_ratios(model, data.images.to(DEVICE)).isfinite().all()
        assert model.generate(images.to(DEVICE), attention=True).attention is not None


def test_rotated_words_are_the_cpu_s(small_settings):
    images = RenderedWords(small_settings, 4, 0, torch.device("cpu")).images
    angles = torch.tensor([0.0, 17.0, 90.0, 200.0])
    ours, theirs = (rotate_words(images.to(device), angles.to(device)).cpu().float() for device in (DEVICE, "cpu"))
    assert ((ours - theirs).abs() > 1).double().mean() < 1e-3


def test_stored_words_are_trained_on_and_read(tmp_path, small_settings, write_words):
    """With a worker process beside CUDA."""
    folders = [inventory.training_folder(tmp_path, name) for name in ("MJ", "ST")]
    folders += [inventory.test_folder(tmp_path, name) for name in ("IIIT5K", "SVT")]
    for number, folder in enumerate(folders):
        write_words(folder, charset="47", seed=number)
    changes = {"dataset": "lmdb", "rotation": "normal", "test_sets": ("IIIT5K", "SVT"), "test_angles": (30.0,)}
    s = replace(small_settings, **changes, steps=10)
    fabric = make_fabric(DEVICE)
    checkpoint = tmp_path / "c.pt"
    _, outcome = train_and_evaluate(s, 1, tmp_path, fabric, checkpoint, workers=1)
    assert outcome.details["curve"][-1]["loss"] > 0 and 0 <= outcome.metrics["accuracy"] <= 100
    again, _ = evaluate_checkpoint(checkpoint, tmp_path, DEVICE, ("SVT",))
    assert again["SVT"] == outcome.metrics["SVT"]


@pytest.mark.parametrize("warp", ["rotate", "multi_line", "upright_or_vertical"])
def test_reports_on_rendered_words(small_settings, warp):
    s = replace(small_settings, warp=warp, control=True, steps=6)
    _, outcome = train_and_evaluate(s, 1, NOWHERE, make_fabric(DEVICE))
    assert "control_accuracy" in outcome.metrics and outcome.details["sheet"]


@pytest.mark.parametrize("row", ["A2DPE", "None"])
def test_a_row_of_a_table(tmp_path, monkeypatch, row):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    record, *_ = run_tables([TABLE], "smoke", tmp_path, rows=[row]).records()
    assert record["precision"] == "bf16-mixed" and record["device"] == torch.cuda.get_device_name()
    assert 0 <= record["metrics"]["accuracy"] <= 100
