"""MMOCR's checkpoints as its runner writes them: logits of its own modules, dictionaries, every verb, refusals.

Their weights come from a closed form, so that golden/ needs the logits only.
"""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from satrn import cli
from satrn.config import SATRNConfig
from satrn.data.streams import normalise
from satrn.experiments import train_and_evaluate
from satrn.models import SATRN
from satrn.pretrained import DICTIONARIES, load_mmocr_checkpoint, load_pretrained, read_dictionary
from satrn.settings import Settings
from satrn.train import make_fabric

# width, encoder and decoder layers, characters, version
SIZES = {
    "small": (256, 6, 6, 90, "1.x"),
    "full": (512, 12, 6, 91, "1.x"),
    "small-0.x": (256, 6, 6, 36, "0.x"),
}


def fill(name, shape):
    """A parameter by its name and shape; variances are positive."""
    n = int(np.prod(shape))
    values = torch.sin(torch.arange(n, dtype=torch.float64) * 1.618 + sum(map(ord, name)) % 97).float().view(shape)
    if name.endswith("running_var"):
        return values.abs() + 0.5
    if "norm" in name or ".bn." in name:
        return 1 + 0.2 * values if name.endswith("weight") else 0.1 * values
    return values * (2 / max(n // shape[0], 1)) ** 0.5 if values.ndim > 1 else 0.1 * values


def image():
    """One RGB image uint8 [1, 3, 32, 100] whose planes differ."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(100.0), indexing="ij")
    planes = [(x * 2.5) % 256, (y * 8 + x) % 256, (x * y) % 256]
    return torch.stack(planes)[None].to(torch.uint8)


def state_dict(d, enc_layers, dec_layers, characters, version, heads=8, ffn=None):
    """MMOCR's names and shapes: gates are 1x1 convolutions, tables are stored, 0.x cannot predict padding."""
    cfg = SATRNConfig(
        variant="mmocr", d_model=d, heads=heads, ffn=ffn or 4 * d, enc_layers=enc_layers, dec_layers=dec_layers,
        in_channels=3, charset="a",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in SATRN(cfg).state_dict().items()}
    weights = {}
    for ours, shape in shapes.items():
        name = ours.replace("_scale.3.", "_scale.2.")
        if "_scale." in name and name.endswith("weight"):
            shape = (*shape, 1, 1)
        if name.startswith(("decoder.trg_word_emb", "decoder.classifier")):
            shape = (characters + (2 if version == "0.x" and "classifier" in name else 3), *shape[1:])
        counter = name.endswith("num_batches_tracked")
        weights[name] = torch.tensor(7) if counter else fill(name, shape)
    weights["encoder.position_enc.h_position_encoder"] = torch.zeros(1, d, 100, 1)
    weights["encoder.position_enc.w_position_encoder"] = torch.zeros(1, d, 1, 100)
    weights["decoder.position_enc.position_table"] = torch.zeros(1, 200, d)
    return weights


def write_file(path, weights, config=""):
    """With the runner's log, whose classes are of a package that is not installed here."""
    name = "mmengine.logging.history_buffer"
    parents = {part: types.ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    parents[name].HistoryBuffer = type("HistoryBuffer", (), {"__module__": name})
    sys.modules.update(parents)
    try:
        log = parents[name].HistoryBuffer()
        log._max_length, log._log_history = 1000000, np.arange(3.0)
        torch.save(
            {
                "meta": {"cfg": config, "epoch": 5, "seed": None, "experiment_name": "satrn"},
                "state_dict": weights,
                "message_hub": {"log_scalars": {"train/loss": log}, "runtime_info": {"epoch": np.float64(5)}},
            },
            path,
        )
    finally:
        for part in parents:
            del sys.modules[part]


def small_file(path, characters=5, version="1.x", config="", drop=()):
    """A tiny checkpoint; returns its weights."""
    weights = state_dict(16, 2, 2, characters, version, heads=2, ffn=16)
    weights = {k: v for k, v in weights.items() if k not in drop}
    write_file(path, weights, config)
    return weights


CONFIG = "dictionary = dict(type='Dictionary', dict_file='/a/dicts/{}', with_padding=True)\nencoder = dict(n_head={})"


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_mmocr_s_modules(tmp_path, golden, size):
    """MMOCR's own files, executed on these weights: BGR planes, its preprocessing, its classes in our order."""
    write_file(tmp_path / "m.pth", state_dict(*SIZES[size]))
    model = load_mmocr_checkpoint(tmp_path / "m.pth")
    assert len(model.cfg.charset) == SIZES[size][3] and "mmengine" not in sys.modules
    with torch.no_grad():
        encoded = model.encode(normalise(image(), model.cfg))
        logits = model.decode(encoded, torch.tensor([[2 + 10, 2 + 35, 2 + 2, 0, 0]]))
    wanted = torch.from_numpy(np.load(golden / "mmocr_logits.npz")[size])
    torch.testing.assert_close(logits[0], wanted, rtol=1e-4, atol=1e-4)


def test_colour_planes_are_blue_green_red_for_mmocr():
    rgb = image()
    ours, theirs = (normalise(rgb, Settings(in_channels=3, variant=kind)) for kind in ("paper", "mmocr"))
    torch.testing.assert_close(theirs, normalise(rgb.flip(1), Settings(in_channels=3)))
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("version, characters", [("1.x", 36), ("1.x", 37), ("0.x", 90), ("0.x", 91)])
def test_version_and_dictionary_are_read_off_the_shapes(tmp_path, version, characters):
    weights = small_file(tmp_path / "m.pth", characters, version)
    model = load_mmocr_checkpoint(tmp_path / "m.pth", heads=2)
    assert model.cfg.charset == DICTIONARIES[characters] and model.cfg.enc_layers == 2 and model.cfg.ffn == 16
    end, unknown = (characters + 1, characters) if version == "0.x" else (characters, characters + 2)
    embedding, bias = weights["decoder.trg_word_emb.weight"], weights["decoder.classifier.bias"]
    assert torch.equal(model.decoder.trg_word_emb.weight[[0, 1, 2, -1]], embedding[[end, unknown, 0, end]])
    assert torch.equal(model.decoder.classifier.bias[:3], bias[[end, unknown, 0]])


def test_a_checkpoint_is_refused_where_its_dictionary_is_in_doubt(tmp_path):
    path, korean = tmp_path / "m.pth", "".join(map(chr, range(0xAC00, 0xAC00 + 50)))
    small_file(path, 50)
    with pytest.raises(ValueError, match="50 characters, which no English dictionary of MMOCR has; name the"):
        load_pretrained(path)
    assert load_pretrained(path, dictionary=korean).cfg.charset == korean
    with pytest.raises(ValueError, match="the dictionary has 49 characters, expected 50"):
        load_pretrained(path, dictionary=korean[1:])
    small_file(path, 90, config=CONFIG.format("own.txt", 2))
    with pytest.raises(ValueError, match="90 characters, own.txt; name the dictionary that it was trained with"):
        load_pretrained(path)
    small_file(path, 90, config=CONFIG.format("english_digits_symbols.txt", 2))
    assert load_pretrained(path).cfg.heads == 2  # as the stored configuration says
    weights = state_dict(16, 1, 1, 90, "1.x", heads=2, ffn=16)
    weights["decoder.classifier.weight"] = weights["decoder.classifier.weight"][:-2]  # a start class of its own
    write_file(path, weights)
    with pytest.raises(ValueError, match="93 embeddings and 91 classes, expected the characters and 3 special classes"):
        load_pretrained(path)


def test_dictionary_files(tmp_path):
    (tmp_path / "d.txt").write_bytes("0\r\n é\na\n \n".replace(" é", "é").encode())
    assert read_dictionary(tmp_path / "d.txt") == "0éa "  # a space is a character
    for text, message in (("a\nbc\n", "line 2: expected one character, got 'bc'"), ("a\na\n", "expected different")):
        (tmp_path / "d.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_dictionary(tmp_path / "d.txt")


def test_what_is_no_mmocr_checkpoint(tmp_path):
    path = tmp_path / "m.pth"
    small_file(path, 36, drop=["encoder.layer_norm.weight"])
    with pytest.raises(ValueError, match="not weights of MMOCR's SATRN.*encoder.layer_norm.weight"):
        load_mmocr_checkpoint(path, heads=2)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="m.pth: cannot be read"):
        load_mmocr_checkpoint(path)
    for content, message in (
        ([1, 2], "has no weights"),
        ({"state_dict": {"a": torch.zeros(1)}}, "has no weights of"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_pretrained(path)
    with pytest.raises(FileNotFoundError):
        load_mmocr_checkpoint(tmp_path / "none.pth")


def test_every_verb_takes_an_mmocr_checkpoint(tmp_path, write_words, capsys):
    path, config = tmp_path / "m.pth", CONFIG.format("lower_english_digits.txt", 2)
    small_file(path, 36, config=config)
    Image.new("RGB", (100, 32), (200, 30, 30)).save(tmp_path / "word.png")
    cli.Read((tmp_path / "word.png",), path)()
    assert capsys.readouterr().out.startswith(str(tmp_path / "word.png") + "\t")
    write_words(tmp_path / "evaluation" / "own", charset="ab1")
    write_words(tmp_path / "training" / "own", charset="ab1")
    cli.Eval(path, ("own",), data_root=tmp_path)()
    assert json.loads(capsys.readouterr().out)["words"] == {"own": 12, "all": 12}
    cli.McNemar(path, path, ("own",), data_root=tmp_path)()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "set,words,first,second,only_first,only_second,p" and lines[2].startswith("all,12,")
    assert lines[2].endswith(",0,0,1")
    s = Settings(
        train_sets=("own",), mix=(1.0,), test_sets=("own",), charset="1ab", img_size=(32, 40), batch_size=4, steps=1,
        lr=1e-9, dropout=0.0,
    )  # fmt: skip
    model, outcome = train_and_evaluate(s, 0, tmp_path, make_fabric("cpu"), start=path)
    assert model.cfg.variant == "mmocr" and model.cfg.img_size == (32, 40) and model.cfg.charset == "1ab"
    old = load_pretrained(path).decoder.trg_word_emb.weight  # end, unknown, 0-9a-z, start
    torch.testing.assert_close(
        model.decoder.trg_word_emb.weight, old[[0, 1, 2 + 1, 2 + 10, 2 + 11, -1]], rtol=0, atol=1e-6
    )
    assert list(outcome.weights) == ["m.pth"] and len(outcome.weights["m.pth"]) == 64


def test_export_takes_an_mmocr_checkpoint(tmp_path, monkeypatch):
    small_file(tmp_path / "m.pth", 36, config=CONFIG.format("lower_english_digits.txt", 2))
    taken = []
    monkeypatch.setattr("satrn.export.export_onnx", lambda model, folder: taken.append(model.cfg.variant) or ())
    cli.Export(tmp_path / "m.pth", tmp_path / "onnx")()
    assert taken == ["mmocr"]
