"""Killed and continued, two ranks, the loss, the paper's scale on small data of its format, evaluation and reading."""

import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from shared_utils.images import BrokenFile
from str_benchmark import experiments
from str_benchmark.checkpoints import load_any, load_trained
from str_benchmark.data.lmdb_store import LMDBDataset, write_lmdb
from str_benchmark.evaluation import evaluate, latency_ms, per_word, read
from str_benchmark.experiments import Machine, Source, execute, train_and_evaluate
from str_benchmark.models import build_model
from str_benchmark.reading import find_images, predict
from str_benchmark.settings import PRESETS, TINY
from str_benchmark.train import learning_rate, load_checkpoint, loss_of, make_fabric

FABRIC = make_fabric("cpu")
PAPER_SMALL = replace(
    PRESETS["paper"], model="None-VGG-None-CTC", output_channel=16, hidden_size=16, batch_size=4, steps=4, val_every=2
)

TRAINING = """
import sys, time
from dataclasses import replace
from pathlib import Path
import torch
from str_benchmark import experiments, train
from str_benchmark.settings import TINY
torch.set_num_threads(1)
experiments.PROJECT = Path(sys.argv[1]).parent
if sys.argv[2] == "slow":
    plain = train.loss_of
    train.loss_of = lambda *a: (time.sleep(0.2), plain(*a))[1]
settings = replace(TINY, model="TPS-VGG-BiLSTM-Attn", steps=40, resident=sys.argv[3] == "resident",
                   train=("tiny", "test-tiny"), ratios=(0.75, 0.25), validation=("test-tiny-curve",), val_every=10)
model, outcome = experiments.train_and_evaluate(
    settings, 1, experiments.Source(Path("."), workers=0 if settings.resident else 1), train.make_fabric("cpu"),
    Path(sys.argv[1]), checkpoint_every=7)
torch.save({"model": model.state_dict(), "curve": outcome.details["curve"]}, sys.argv[1] + ".done")
"""


@pytest.mark.parametrize("form", ["resident", "workers"])
def test_sigkill_and_continue_is_bit_equal(tmp_path, form, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    project = experiments.PROJECT

    def here(name):
        monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / name), "fast", form])
        monkeypatch.setattr(experiments, "PROJECT", project)
        runpy.run_path(str(script))
        return torch.load(tmp_path / f"{name}.done", weights_only=True)

    child = subprocess.Popen([sys.executable, script, tmp_path / "killed", "slow", form])
    whole = here("whole")
    while not (tmp_path / "killed").exists():
        time.sleep(0.02)
        assert child.poll() is None
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = load_checkpoint(tmp_path / "killed")
    assert 0 < reached["state"]["step"] < 40 and reached["sampler"]["step"] == reached["state"]["step"]
    killed = here("killed")
    assert whole["curve"] == killed["curve"]
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
from dataclasses import replace
from str_benchmark import experiments
from str_benchmark.data.mixture import BalancedBatchSampler, TrainingData
from str_benchmark.evaluation import read
from str_benchmark.models import build_model
from str_benchmark.settings import TINY
from str_benchmark.train import fit, make_fabric
torch.set_num_threads(1)
fabric = make_fabric("cpu")
experiments.PROJECT = Path(sys.argv[1]).parent
s = replace(TINY, model="None-VGG-None-Attn", optimizer="adadelta", schedule="constant", lr=1.0, steps=3)
torch.manual_seed(0)
model = build_model(s.config)
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval(); module.train = lambda mode=True: None  # no statistics of a batch: ranks would differ by them
source = experiments.Source(Path("."))
sets = source.for_training(s.train, s, None)
sampler = BalancedBatchSampler(sets, [1], s.batch_size, 1, fabric.global_rank, fabric.world_size)
data = TrainingData(sets, sampler, model.tokenizer, s.max_length, s.config.img_size, fabric.device, resident=True)
fit(model, data, s, fabric, run={"settings": {}})
reading = read(model, source.for_evaluation(("test-tiny",), s)["test-tiny"], batch_size=5)
if fabric.global_rank == 0:
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save({"weights": weights, "texts": reading.texts, "labels": reading.labels}, sys.argv[1])
"""


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    monkeypatch.setattr(experiments, "PROJECT", experiments.PROJECT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    runpy.run_path(str(script))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, tmp_path / "two"], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    assert len(two["labels"]) == 32 and two["labels"] == one["labels"] and two["texts"] == one["texts"]


# ---- loss and schedule ---------------------------------------------------------------------------------


def test_the_attention_loss_ignores_padding_and_counts_the_end():
    model = build_model("None-VGG-None-Attn", output_channel=16, hidden_size=16).eval()
    images = torch.rand(2, 1, 32, 100)
    ids, lengths = model.tokenizer.encode(["hello", "a1"], 25)
    logits = model(images, ids[:, :-1])  # all 26 steps, as the reference
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    torch.testing.assert_close(loss_of(model, "Attn", images, ids, lengths, FABRIC), expected)


def test_the_ctc_loss_divides_by_the_label_s_length():
    model = build_model("None-VGG-None-CTC", output_channel=16).eval()
    images = torch.rand(2, 1, 32, 100)
    ids, lengths = model.tokenizer.encode(["hello", "a1"], 25)
    log_probs = model(images).log_softmax(2).transpose(0, 1)
    each = F.ctc_loss(log_probs, ids, torch.tensor([24, 24]), lengths, reduction="none")
    expected = (each / torch.tensor([5.0, 2.0])).mean()
    torch.testing.assert_close(loss_of(model, "CTC", images, ids, lengths, FABRIC), expected)


def test_schedules():
    s = replace(TINY, steps=100, lr=0.5)
    rates = [learning_rate(s, step, 100) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 0.5 and rates[0] == pytest.approx(0.05) and rates[-1] < 0.001
    assert [learning_rate(s, step, 25) for step in (0, 1)] == [0.25, 0.5]  # a tenth of 25 steps are two
    assert learning_rate(PRESETS["paper"], 7, 100) == 1.0


def test_nan_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    with pytest.raises(RuntimeError, match="step 6: the loss is NaN or infinite"):
        train_and_evaluate(replace(TINY, lr=1e30), 0, Source(tmp_path), FABRIC, None)


# ---- checkpoints ---------------------------------------------------------------------------------------


def test_checkpoints_of_another_run_or_damaged_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    path, source = tmp_path / "c.pt", Source(tmp_path)
    _, outcome = train_and_evaluate(TINY, 0, source, FABRIC, path)
    model, settings = load_trained(path, "cpu")
    assert settings == TINY
    again = experiments.evaluate_checkpoint(model, settings, source)
    assert {**again.metrics, "time_ms": 0} == {**outcome.metrics, "time_ms": 0}
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different lr, seed\)"):
        train_and_evaluate(replace(TINY, lr=0.1), 1, source, FABRIC, path)
    content = load_checkpoint(path)
    del content["model"]["Prediction.bias"]
    torch.save(content, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="has no weights for None-VGG-None-CTC"):
        load_trained(tmp_path / "d.pt", "cpu")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a training checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")


# ---- the paper's scale on small LMDBs of its layout ------------------------------------------------------


def test_paper_scale_with_validation_and_fine_tuning(tmp_path, monkeypatch, released_layout):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    root = released_layout(tmp_path / "data")
    s = replace(PAPER_SMALL, finetune=("validation",), finetune_epochs=2)
    outcome = execute(vars(s), 0, machine=Machine(root))
    named = {"IIIT_3000", "IC15_2077", "COCO_Text", "total_accuracy", "in_distribution", "out_distribution", "time_ms"}
    assert named <= outcome.metrics.keys()
    assert outcome.details["n"]["total_accuracy"] == 7 * 6 and outcome.details["n"]["in_distribution"] == 4 * 6
    assert [point["step"] for point in outcome.details["curve"]] == [2, 4, 3]
    assert [("accuracy" in point) for point in outcome.details["curve"]] == [True, True, False]
    assert [part["total"] for part in outcome.dataset["train"]] == [6, 6]
    assert outcome.caveats[0].startswith("other sets than the paper's: IIIT_3000 6 of 3,000")
    base, tuned = sorted((tmp_path / "runs" / "checkpoints").glob("*.pt"), key=lambda path: "-finetuned" in path.name)
    assert load_trained(tuned, "cpu")[1] == s and "optimizer" not in load_checkpoint(tuned)
    before = base.read_bytes()
    plain = {name: value for name, value in vars(s).items() if not name.startswith("finetune")}
    monkeypatch.setattr("str_benchmark.train.loss_of", None)  # the finished base is not trained again
    again = execute(plain, 0, machine=Machine(root))
    assert [point["step"] for point in again.details["curve"]] == [2, 4] and base.read_bytes() == before
    assert load_trained(base, "cpu")[1].finetune == ()


def test_a_public_checkpoint_is_evaluated_by_name(tmp_path, released_layout):
    root = released_layout(tmp_path)
    torch.save(
        {f"module.{k}": v for k, v in build_model("None-RCNN-None-CTC").state_dict().items()}, tmp_path / "m.pth"
    )
    model, settings = load_any(tmp_path / "m.pth", {"model": "None-RCNN-None-CTC"}, "cpu")
    outcome = experiments.evaluate_checkpoint(model, settings, Source(root), ("CUTE_288", "SVTP_645"))
    assert outcome.details["n"] == {"CUTE_288": 6, "SVTP_645": 6, "combined_accuracy": 12}
    assert "total_accuracy" not in outcome.metrics


def test_a_missing_set_shows_before_training(tmp_path, released_layout):
    import shutil

    root = released_layout(tmp_path)
    shutil.rmtree(root / "evaluation" / "COCO-Text")  # optional
    shutil.rmtree(root / "evaluation" / "SVTP")
    with pytest.raises(FileNotFoundError, match="SVTP"):
        train_and_evaluate(PAPER_SMALL, 0, Source(root), FABRIC, None)


def test_a_filter_that_leaves_nothing_says_why(tmp_path, word_lmdb):
    path = word_lmdb(tmp_path / "w", ["über", "straße"])
    with pytest.raises(
        ValueError, match="no sample is left for training: 0 of 2 kept; 2 with unknown characters: 'über'"
    ):
        Source(tmp_path).for_training((str(path),), PAPER_SMALL, None)


def test_half_precision_keeps_the_decisions_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    fabric = make_fabric("cpu", "bf16-mixed")
    for name in ("TPS-VGG-BiLSTM-Attn", "TPS-RCNN-None-CTC"):
        model, outcome = train_and_evaluate(replace(TINY, model=name), 0, Source(tmp_path), fabric, None)
        assert outcome.details["curve"][-1]["loss"] < 20 and next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            grid = model.Transformation.GridGenerator(torch.zeros(1, 10, 2, dtype=torch.bfloat16))
        assert grid.dtype == torch.float32


# ---- evaluation ----------------------------------------------------------------------------------------


def test_evaluation_counts_every_word_once_and_broken_ones_apart(tmp_path, word_lmdb, caplog):
    labels = ["It's", "!!", "abc", "DEF"]
    data = LMDBDataset(word_lmdb(tmp_path / "w", labels), "36", filter="off")
    assert len(data) == 4
    model = build_model("None-VGG-None-CTC", output_channel=16)
    with torch.no_grad():
        model.Prediction.weight.zero_()
        model.Prediction.bias[0] = 9  # says nothing, always
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frame, correct, readings = evaluate(model, {"IC13_857": [data]}, batch_size=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # batch norm's too
    row = frame.iloc[0]
    assert (row.n, row.correct, row.ned, row.empty_labels, row.broken) == (4, 0, 0, 1, 0)
    assert not correct["IC13_857"].any()  # an empty reading does not meet an empty label
    assert readings["IC13_857"].labels == ["its", "", "abc", "def"] and readings["IC13_857"].blank_share == 1
    assert model.training  # put back
    table = per_word(correct, readings)
    assert list(table.columns) == ["set", "word", "label", "read", "confidence", "correct"]
    assert table.label.tolist() == labels and table.word[3] == "w/image-000000004"
    with pytest.raises(ValueError, match="one or more, got none"):
        evaluate(model, {})
    write_lmdb([(b"broken", "abc"), (Image.new("L", (9, 9)), "x")], tmp_path / "b")
    broken = LMDBDataset(tmp_path / "b", filter="off")
    with pytest.raises(BrokenFile, match="image-000000001: this is not an image"):
        read(model, [broken])
    frame, _, _ = evaluate(model, {"b": [broken]}, skip_broken=True)
    assert (frame.n[0], frame.broken[0]) == (1, 1)


def test_reading_one_s_own_images(tmp_path):
    model = build_model("None-VGG-None-CTC", charset="0123456789", output_channel=16, img_size=(32, 64)).eval()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    files = find_images([tmp_path, tmp_path / "0.png"])
    assert len(files) == 4
    found = predict(model, files, batch_size=3)
    assert found[0].text == found[3].text and all(len(each.characters) == len(each.text) for each in found)
    beam = predict(model, files[:1], beam=5)[0]
    assert len(beam.beams) == 5 and beam.text == beam.beams[0][0] and beam.confidence <= 1
    with pytest.raises(ValueError, match="beam search is for CTC models"):
        predict(build_model("None-VGG-None-Attn", output_channel=16), files, beam=2)
    with pytest.raises(FileNotFoundError, match="file or folder not found"):
        find_images([tmp_path / "none"])
    (tmp_path / "x.png").write_text("broken")
    with pytest.raises(BrokenFile, match="x.png: this is not an image"):
        predict(model, find_images([tmp_path]))
    assert len(predict(model, find_images([tmp_path]), skip_broken=True)) == 3
    broken = [path for path in find_images([tmp_path]) if path not in files]
    with pytest.raises(BrokenFile, match=f"none of the {len(broken)} images can be read"):
        predict(model, broken, skip_broken=True)
    assert latency_ms(model, repeats=1, warmup=0) > 0
