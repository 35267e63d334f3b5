"""Tables, foreign checkpoints, export, and the command line."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import satrn as satrn_package
from satrn import cli, experiments
from satrn.experiments import tables
from satrn.figures import draw_all
from satrn.measure import load_model, sizes
from satrn.models import SATRN
from satrn.predict import load_images, read_images
from satrn.pretrained import load_pretrained, read_checkpoint
from satrn.settings import PRESETS, RENDERED, Settings
from satrn.train import make_fabric
from shared_utils.images import BrokenFile

BY_ID = {table.id: table for table in tables()}

# ---- tables ------------------------------------------------------------


def settings_of(table, row, scale):
    return Settings(**BY_ID[table].settings(BY_ID[table].row(row), scale))


@pytest.mark.parametrize(
    "table, row, preset, changes",
    [
        ("table-1", "SATRN, one checkpoint", "big", {}),
        ("table-2", "SATRN + SATRN", "big", {}),
        ("table-2", "ResNet + LSTM (SAR)", "big", dict(encoder="resnet", decoder="lstm")),
        ("table-3a", "A2DPE", "small", {}),
        ("table-3a", "1D-Flat", "small", dict(pos="1d")),
        ("table-3b", "1/32 x 1/4 (1-D)", "small", dict(downsample=(32, 4))),
        ("figure-8-accuracy", "separable, 9 layers", "small-9", {}),
        ("figure-8-accuracy", "convolution, 6 layers", "small", dict(laff="conv")),
        ("table-4", "FAN", "big", dict(encoder="fan", decoder="fan", rotation="uniform", img_size=(64, 64))),
        ("table-4", "SATRN", "big", dict(rotation="uniform", img_size=(64, 64))),
    ],
)
def test_paper_scale_is_the_paper_s_preset(table, row, preset, changes):
    chosen = settings_of(table, row, "paper")
    evaluation = {name: getattr(chosen, name) for name in ("test_sets", "test_angles")}
    assert chosen == replace(PRESETS[preset], **changes, **evaluation)


@pytest.mark.parametrize(
    "table, row, scale, changes",
    [
        ("rotation", "A2DPE, rotated words", "embedded", dict(control=True)),
        ("rotation", "straight words", "embedded", dict(control=True, warp="straight")),
        ("table-3a", "None", "rendered", dict(pos="none")),
        ("table-3b", "1/4 x 1/4", "rendered", {}),
        ("figure-8-accuracy", "convolution", "rendered", dict(laff="conv")),
        ("figure-7", "upright and vertical words", "rendered", dict(warp="upright_or_vertical")),
        ("figure-9", "two-line words", "rendered", dict(control=True, warp="multi_line", word_lengths=(4, 4))),
    ],
)
def test_small_scales_are_the_small_preset(table, row, scale, changes):
    assert settings_of(table, row, scale) == replace(RENDERED, **changes)


def test_learning_curves_show_both_networks_at_the_same_steps(tmp_path):
    table = BY_ID["learning-curves"]
    runs = [run for run in table.runs("rendered") if run.seed < 22]
    metrics = {"accuracy": 90.0, "control_accuracy": 40.0, "gain": 50.0}
    names = ("table", "row", "scale", "seed", "settings")
    with open(tmp_path / "rendered.jsonl", "w") as log:
        for run in runs:
            record = {name: getattr(run, name) for name in names} | {"settings_hash": run.key[-1], "metrics": metrics}
            log.write(json.dumps(record) + "\n")
    assert [path.stem for path in draw_all([table], tmp_path)] == ["learning-curves"]
    for row in ("two characters, 6,400 steps", "three characters, 1,600 steps"):
        settings = settings_of("learning-curves", row, "rendered")
        assert settings.control and f"{settings.steps:,} steps" in row and settings.train_images <= 32 * settings.steps


def test_every_public_name_can_be_used():
    for name in satrn_package.__all__:
        assert not isinstance(getattr(satrn_package, name), ModuleType), name
    assert issubclass(satrn_package.SATRN, torch.nn.Module) and callable(satrn_package.costs)


def test_every_row_is_a_possible_run_and_embedded_seeds_are_fresh():
    for table in BY_ID.values():
        for scale in table.scales:
            for run in table.runs(scale):
                Settings(**run.settings)
                assert run.seed >= 20 or scale in ("smoke", "paper")


def test_costs_of_the_swap_are_the_printed_ones():
    big = sizes(settings_of("table-2-costs", "SATRN + SATRN", "embedded"))
    assert big["parameters"] == 55_657_728
    for row, billions in (("ResNet + LSTM (SAR)", 21.9), ("SATRN + LSTM", 16.4), ("ResNet + SATRN", 41.4)):
        assert sizes(settings_of("table-2-costs", row, "embedded"))["flops_b"] == pytest.approx(billions, abs=0.05)


def test_run_twice_runs_nothing_new_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(Path(cli.__file__).parents[2] / "tables")
    run = cli.Run(("rotation", "table-3a"), scale="smoke", jobs=1)
    run()
    lines = (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["dataset"]["train"]["sha256"]
    assert "readings.png" in capsys.readouterr().out
    assert all(
        (tmp_path / "runs" / "figures" / f"{name}.png").stat().st_size > 5000 for name in ("rotation", "readings")
    )
    run()
    assert (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines() == lines
    cli.Run(("rotation",), scale="smoke", dry_run=True)()
    assert "missing runs" in capsys.readouterr().out


def test_figures_need_nothing_but_the_committed_log(tmp_path):
    results = Path(cli.__file__).parents[2] / "results"
    for log in results.glob("*.jsonl"):
        (tmp_path / log.name).write_bytes(log.read_bytes())
    names = {path.stem for path in draw_all(list(BY_ID.values()), tmp_path)}
    assert "table-1" in names


# ---- weights ------------------------------------------------------------


def test_another_charset_keeps_the_characters_that_it_shares(checkpoint):
    old, same, new = (load_pretrained(checkpoint, charset) for charset in (None, "47", "7x4"))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), same.state_dict().values(), strict=True))
    a, b = old.decoder.trg_word_emb.weight, new.decoder.trg_word_emb.weight  # end, unknown, characters, start
    assert torch.equal(b[[0, 1, 2, 4, 5]], a[[0, 1, 3, 2, 4]]) and new.cfg.charset == "7x4"
    assert torch.equal(new.backbone.conv1.conv.weight, old.backbone.conv1.conv.weight)


def test_onnx_reads_what_torch_reads(tmp_path, tiny):
    onnxruntime = pytest.importorskip("onnxruntime")
    from satrn.export import OnnxReader, export_onnx

    torch.manual_seed(0)
    model = SATRN(tiny(enc_layers=1)).eval()
    encoder, step = (onnxruntime.InferenceSession(str(path)) for path in export_onnx(model, tmp_path))
    images = torch.rand(3, 1, 16, 24) - 0.5
    cross = encoder.run(None, {"images": images.numpy()})
    with torch.no_grad():
        encoded = model.encode(images)
        state = model.decoder.start(encoded.tokens, encoded.hw)
        previous = torch.full((3,), model.cfg.classes)
        kept = [np.zeros((2, 3, 2, 0, width), np.float32) for width in (2, 8)]
        for position in range(4):
            inputs = [previous.numpy(), np.array([position]), *kept, *cross]
            names = ["previous", "position", "keys", "values", "cross_keys", "cross_values"]
            logits, *kept = step.run(None, dict(zip(names, inputs, strict=True)))
            wanted, state = model.decoder.step(previous, state)
            np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-4, atol=1e-5)
            previous = wanted.argmax(dim=-1)
    with pytest.raises(ValueError, match="export needs decoder='satrn', got 'lstm'"):
        export_onnx(SATRN(tiny(decoder="lstm")), tmp_path)
    reader = OnnxReader(tmp_path)
    assert reader.cfg == model.cfg
    for size in ((16, 24), (32, 12)):  # other than that of the export, and of the training
        images = torch.rand(5, 1, *size) - 0.5
        ours, theirs = model.generate(images), reader.generate(images)
        assert theirs.texts == ours.texts and any(ours.texts)
        np.testing.assert_allclose(theirs.confidence, ours.confidence, rtol=1e-4)
        for a, b in zip(theirs.char_confidence, ours.char_confidence, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)
    Image.new("L", (50, 20), 90).save(tmp_path / "word.png")
    ((text, _),) = read_images([tmp_path / "word.png"], tmp_path)
    pixels = load_images([tmp_path / "word.png"], model) / 255 - 0.5
    assert [text] == model.generate(pixels).texts
    with pytest.raises(ValueError, match="reads greedily and without attention maps"):
        read_images([tmp_path / "word.png"], tmp_path, beam=2)
    (tmp_path / "step.onnx").rename(tmp_path / "encoder.onnx")
    with pytest.raises(FileNotFoundError, match="step.onnx: no such graph; `satrn export` writes it"):
        OnnxReader(tmp_path)
    (tmp_path / "step.onnx").write_bytes((tmp_path / "encoder.onnx").read_bytes())
    with pytest.raises(ValueError, match="encoder.onnx: has no alphabet inside"):
        OnnxReader(tmp_path)


# ---- commands ------------------------------------------------------------


def satrn(*words):
    return subprocess.run([sys.executable, "-m", "satrn", *map(str, words)], capture_output=True, text=True)


def test_train_then_read_from_the_command_line(tmp_path):
    out = tmp_path / "satrn.pt"
    small = "--steps 2 --train-images 16 --test-images 8 --batch-size 8 --d-model 16 --heads 2 --ffn 16 --qk-width None"
    trained = satrn("train", "--output", out, "rendered", *small.split())
    assert trained.returncode == 0, trained.stderr
    assert "accuracy" in json.loads(trained.stdout) and "loss per word" in trained.stderr
    Image.new("L", (40, 20), 200).save(tmp_path / "word.png")
    read = satrn("read", tmp_path / "word.png", "--checkpoint", out, "--attention", tmp_path / "maps.png")
    name, text, confidence = read.stdout.rstrip("\n").split("\t")
    assert name.endswith("word.png") and 0 <= float(confidence) <= 1 and (tmp_path / "maps.png").stat().st_size > 1000


def test_the_other_verbs(tmp_path, checkpoint, capsys):
    cli.Render(tmp_path / "lines", count=5, img_size=(32, 32), charset="47", word_lengths=(4, 4))()
    (tmp_path / "words.txt").write_text("ab\n\ncd\n")
    cli.Render(tmp_path / "listed", count=3, words=tmp_path / "words.txt", warp="straight")()
    assert "5 words" in capsys.readouterr().out
    cli.RotateCurve(checkpoint, tmp_path / "lines", angles=(0.0, 90.0))()
    assert capsys.readouterr().out.startswith("angle,n,accuracy\n0.0,5,")
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    cli.Aspect((tmp_path / "a.png",), checkpoint)()
    assert 0 < float(capsys.readouterr().out.split("\t")[1])
    cli.Eval(checkpoint)()
    assert "accuracy" in json.loads(capsys.readouterr().out)
    cli.Data(data_root=tmp_path)()
    assert "CT80" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="of one batch was learned in 1 steps"):
        cli.Check(Settings(**vars(RENDERED)), batch_steps=1, device="cpu")()


@pytest.mark.parametrize(
    "verb, message",
    [
        (lambda p, c: cli.Read((p / "none.png",), c), "none.png: image not found"),
        (lambda p, c: cli.Read((), c), "no image given"),
        (lambda p, c: cli.Read((p / "text.png",), c), "text.png: this is not an image"),
        (lambda p, c: cli.Read((p / "text.png",), p / "none.pt"), "none.pt: checkpoint not found"),
        (lambda p, c: cli.Read((p / "text.png",), c, p / "empty.txt"), "empty.txt: expected different characters"),
        (lambda p, c: cli.Eval(p / "text.png"), "text.png: cannot be read as a checkpoint"),
        (lambda p, c: cli.Eval(c, ("SVT",), data_root=p), "is not an LMDB"),
        (lambda p, c: cli.Eval(c, protocol="loose"), "protocol must be one of case-insensitive"),
        (lambda p, c: cli.Render(p / "y", words=p / "spaced.txt", warp="curve"), "'two words' has a space"),
        (lambda p, c: cli.Render(p / "z", charset="a日b"), "lacks '日'"),
        (lambda p, c: cli.Data("verify", p / "nothing"), "nothing: no LMDB below this folder"),
        (lambda p, c: cli.Data(tiny=p), "is not empty; name a new folder"),
        (lambda p, c: cli.RotateCurve(c, p), "is not an LMDB"),
        (lambda p, c: cli.Render(p / "x", words=p / "empty.txt"), "empty.txt: contains no words"),
        (lambda p, c: cli.Export(p / "none.pt"), "none.pt: checkpoint not found"),
    ],
)
def test_wrong_input_is_named(tmp_path, checkpoint, verb, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "spaced.txt").write_text("two words\n")
    with pytest.raises((ValueError, FileNotFoundError, BrokenFile), match=message):
        verb(tmp_path, checkpoint)()


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("run", "table-9"), 2, "satrn: unknown table 'table-9'; the tables are"),
        (("run", "--scale", "huge"), 2, "satrn: no table has a scale 'huge'"),
        (("read", "none.png", "--checkpoint", "none.pt"), 2, "satrn: none.pt: checkpoint not found"),
        (("train", "--frobnicate"), 2, "frobnicate"),
    ],
)
def test_mistakes_end_with_one_line(words, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["satrn", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code and message in capsys.readouterr().err


def test_interrupted_and_failed(monkeypatch, capsys):
    for error, code, message in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("disk full"), 1, "disk full"),
        (ValueError("bad"), 2, "bad"),
    ):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr(cli.Data, "__call__", fail)
        monkeypatch.setattr(sys, "argv", ["satrn", "data"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code and message in capsys.readouterr().err


def test_every_setting_is_documented():
    source = (Path(cli.__file__).parent / "settings.py").read_text()
    for field in fields(Settings):
        line = source.split(f"    {field.name}: ", 1)[1].split("\n")[1]
        assert line.strip().startswith('"""'), field.name


def test_checkpoint_holds_what_a_resume_needs(checkpoint):
    content = read_checkpoint(checkpoint)
    assert {"run", "state", "model", "optimizer", "rng", "precision"} == set(content)
    assert content["state"]["step"] == 40 and load_model(checkpoint, make_fabric("cpu")).cfg.charset == "47"
