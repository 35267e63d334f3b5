"""Killed and continued, two processes, accumulation, checkpoints, losses, schedules, evaluation."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from satrn import experiments
from satrn.charset import IGNORED
from satrn.data.inventory import NAMES, TEST_SIZES
from satrn.data.streams import RenderedWords
from satrn.data.words_lmdb import LmdbWords
from satrn.evaluate import comparable, correct, evaluate_rotation, mcnemar
from satrn.experiments import execute, overfit_one_batch, train_and_evaluate
from satrn.measure import evaluate_checkpoint, load_model
from satrn.pretrained import read_checkpoint
from satrn.settings import RENDERED, Settings
from satrn.train import build_model, ctc_loss, fit, learning_rate, make_fabric, report_point, text_loss

FABRIC = make_fabric("cpu")
NOWHERE = Path("nowhere")

TRAINING = """
import sys, time
from dataclasses import replace
from pathlib import Path
import torch
from satrn.data.streams import RenderedWords
from satrn.settings import RENDERED
from satrn.train import build_model, fit, make_fabric
torch.set_num_threads(1)
fabric = make_fabric("cpu")
settings = replace(RENDERED, d_model=16, heads=2, ffn=16, enc_layers=1, qk_width=None, img_size=(16, 16), dropout=0.2,
                   train_images=50, steps=60, batch_size=8, font_pixels=8.0, ctc_weight=0.1)
data = RenderedWords(settings, 50, 1, fabric.device)
model = build_model(settings, 1, fabric)
slow = lambda step: time.sleep(0.05) if sys.argv[2] == "slow" else None
curve = fit(model, data, settings, 1, fabric, checkpoint=Path(sys.argv[1]), checkpoint_every=7, before_step=slow)
torch.save({"model": model.state_dict(), "curve": curve}, sys.argv[1] + ".done")
"""


def run_here(script, *words):
    """Run a script in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *map(str, words)])
        exec(script, {"__name__": "__main__"})


def test_sigkill_and_continue_is_bit_equal(tmp_path):
    run_here(TRAINING, tmp_path / "whole", "fast")
    child = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path / "killed"), "slow"])
    while not (tmp_path / "killed").exists():
        time.sleep(0.02)
        assert child.poll() is None
    time.sleep(0.9)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < read_checkpoint(tmp_path / "killed")["state"]["step"] < 60
    run_here(TRAINING, tmp_path / "killed", "fast")
    whole, killed = (torch.load(tmp_path / f"{name}.done", weights_only=True) for name in ("whole", "killed"))
    assert whole["curve"] == killed["curve"] and len(whole["curve"]) == 10
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])


DISTRIBUTED = """
import sys
from dataclasses import replace
import torch
from satrn.data.words_lmdb import LmdbMixture
from satrn.settings import Settings
from satrn.train import build_model, fit, make_fabric
torch.set_num_threads(1)
fabric = make_fabric("cpu")
settings = Settings(d_model=16, heads=2, ffn=16, enc_layers=1, dec_layers=1, img_size=(16, 24), charset="abc123",
                    dropout=0.0, max_length=6, batch_size=8, steps=5, accumulate=2 // fabric.world_size,
                    train_sets=("MJ",), mix=(1.0,))
data = LmdbMixture([sys.argv[2]], settings, workers=0)
model = build_model(settings, 1, fabric)
curve = fit(model, data, settings, 1, fabric)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
spread = (fabric.all_gather(weights).view(fabric.world_size, -1) - weights).abs().max()
if fabric.global_rank == 0:
    torch.save({"weights": weights, "spread": spread}, sys.argv[1])
"""


def test_two_ranks_equal_two_accumulated_parts(tmp_path, write_words):
    """Batch norm sees half a batch in both; rotations are drawn for the whole batch."""
    write_words(tmp_path / "MJ")
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    run_here(DISTRIBUTED, tmp_path / "one", tmp_path / "MJ")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, tmp_path / "two", tmp_path / "MJ"], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert two["spread"] == 0
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-3, atol=2e-5)


def test_checkpoints_that_are_refused(tmp_path, checkpoint, small_settings):
    other = replace(small_settings, lr=1e-4)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(checkpoint.read_bytes())
    with pytest.raises(ValueError, match=r"another run \(different lr\); give another --output"):
        train_and_evaluate(other, 3, NOWHERE, FABRIC, copy)
    with pytest.raises(ValueError, match=r"another run \(different seed, data\)"):
        train_and_evaluate(small_settings, 4, NOWHERE, FABRIC, copy)
    content = read_checkpoint(checkpoint)
    content["run"]["settings"]["ffn"] = 32
    torch.save(content, copy)
    with pytest.raises(ValueError, match="the weights do not fit the stored settings"):
        load_model(copy, FABRIC)
    copy.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(copy)
    with pytest.raises(FileNotFoundError, match="none.pt: checkpoint not found"):
        read_checkpoint(tmp_path / "none.pt")


def test_a_finished_run_is_not_trained_again(tmp_path, checkpoint, small_settings):
    def never(step):
        raise AssertionError("trained again")

    model = build_model(small_settings, 3, FABRIC)
    data = RenderedWords(small_settings, small_settings.train_images, 10_003, FABRIC.device)
    curve = fit(model, data, small_settings, 3, FABRIC, checkpoint=checkpoint, before_step=never)
    assert len(curve) == 10 and curve[-1]["loss"] < curve[0]["loss"]


def test_a_batch_that_cannot_be_shared_and_a_loss_that_is_nan(small_settings):
    data = RenderedWords(small_settings, 64, 1, FABRIC.device)
    model = build_model(small_settings, 1, FABRIC)
    with torch.no_grad():
        model.decoder.trg_word_emb.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 4: the loss is NaN or infinite"):
        fit(model, data, small_settings, 1, FABRIC)
    with pytest.raises(ValueError, match="accumulate must divide batch_size"):
        replace(small_settings, accumulate=3)


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4), torch.tensor([[2, 3, 0], [1, 0, IGNORED]])
    steps = logits.log_softmax(-1)
    wanted = -(steps[0, 0, 2] + steps[0, 1, 3] + steps[0, 2, 0] + steps[1, 0, 1] + steps[1, 1, 0]) / 2
    torch.testing.assert_close(text_loss(logits, targets), wanted)
    columns = torch.randn(1, 2, 4)
    p = columns.softmax(-1)[0]
    paths = p[0, 2] * p[1, 2] + p[0, 2] * p[1, 0] + p[0, 0] * p[1, 2]  # "aa", "a-", "-a" all read a
    torch.testing.assert_close(ctc_loss(columns, torch.tensor([[2, 0, IGNORED]])), -paths.log())
    assert ctc_loss(columns, torch.tensor([[2, 3, 2]])) == 0  # three characters do not fit two columns


def test_schedules():
    triangle = Settings()
    assert [learning_rate(triangle, round(250000 * x)) for x in (0, 0.45, 0.9, 1)] == pytest.approx(
        [3e-5, 3e-4, 3e-5, 3e-7]
    )
    cycle = [learning_rate(RENDERED, step) for step in range(RENDERED.steps)]
    assert max(cycle) == cycle[RENDERED.steps // 10] == RENDERED.lr and cycle[-1] < 1e-7 and cycle[0] < RENDERED.lr / 20


def test_the_plateau_is_named(monkeypatch):
    lines = []
    monkeypatch.setattr("satrn.train.logger.info", lambda text, *values: lines.append(text % values))
    report = report_point(Settings(steps=100))
    for loss in (20.0, 19.0, 1.0):
        report({"step": 50, "loss": loss})
    assert len(lines) == 4 and "plateau" in lines[2]


def test_fine_tuning_starts_where_it_is_told_to(checkpoint, small_settings, tmp_path):
    barely = replace(small_settings, steps=1, lr=1e-9, charset="4x7", word_lengths=(2, 2))
    model, _ = train_and_evaluate(barely, 3, NOWHERE, FABRIC, start=checkpoint)
    old = load_model(checkpoint, FABRIC).decoder.trg_word_emb.weight  # end, unknown, 4, 7, start
    torch.testing.assert_close(model.decoder.trg_word_emb.weight[[0, 1, 2, 4, 5]], old, rtol=0, atol=1e-6)
    fresh, _ = train_and_evaluate(barely, 3, NOWHERE, FABRIC, tmp_path / "fresh.pt")
    with pytest.raises(ValueError, match="checkpoint of another run .different start"):
        train_and_evaluate(barely, 3, NOWHERE, FABRIC, tmp_path / "fresh.pt", start=checkpoint)
    assert not torch.allclose(fresh.decoder.trg_word_emb.weight[[0, 1, 2, 4, 5]], old, atol=1e-3)


def test_one_batch_is_learned_by_heart():
    s = replace(RENDERED, dec_layers=1, enc_layers=1, d_model=32, ffn=32, qk_width=None, max_length=4)
    assert overfit_one_batch(s, FABRIC, steps=150) == 100


# ---- evaluation ------------------------------------------------------------


def test_words_are_compared_as_the_field_does():
    readings = ("It's", "ITS", "its", "a-1", "A1")
    assert [comparable(each) for each in readings] == ["its", "its", "its", "a1", "a1"]
    assert [comparable(each, "case-sensitive") for each in readings] == ["Its", "ITS", "its", "a1", "A1"]
    assert [comparable(each, "exact") for each in readings] == list(readings)
    with pytest.raises(ValueError, match="protocol must be one of case-insensitive, case-sensitive, exact, got '36'"):
        comparable("a", "36")
    with pytest.raises(ValueError, match="the same words, got 1 and 2"):
        mcnemar(np.array([True]), np.array([True, False]))
    assert mcnemar(np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 1], bool)) == {
        "only_first": 2, "only_second": 1, "p": 1.0,
    }  # fmt: skip


class _Oracle(torch.nn.Module):
    """Reads "a" from a dark picture, "b" from a light one."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.weight = cfg, torch.nn.Parameter(torch.zeros(1))

    def generate(self, images):
        from satrn.decoding import Recognition

        texts = ["a" if image.mean() < 0 else "b" for image in images]
        return Recognition(texts, [], [1.0] * len(texts))


def test_accuracy_counts_every_word_once(tiny):
    class Words:
        def batches(self, size):
            for first in range(0, 5, size):
                part = [10, 10, 240, 240, 10][first : first + size]
                pictures = torch.tensor(part, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 24)
                yield pictures, ["a", "b", "b", "B!", "a"][first : first + size]

    model = _Oracle(tiny())
    assert correct(model, Words(), batch_size=2).tolist() == [True, False, True, True, True]
    frame = evaluate_rotation(model, Words(), (0, 90))
    assert frame.to_dict("list") == {"angle": [0, 90], "n": [5, 5], "accuracy": [0.8, 0.8]}

    model.generate = lambda images: SimpleNamespace(texts=["?"] * len(images))  # "?" and "!!" have nothing to compare
    words = SimpleNamespace(batches=lambda size: [(torch.zeros(2, 1, 16, 24, dtype=torch.uint8), ["!!", "a"])])
    assert correct(model, words).tolist() == [False, False]
    assert correct(model, words, protocol="exact").tolist() == [False, False]

    class Nothing:
        def batches(self, size):
            return iter(())

    with pytest.raises(ValueError, match="cannot evaluate an empty data set"):
        correct(model, Nothing())


def test_paper_scale_on_small_lmdbs(tmp_path, write_words, monkeypatch):
    """The paper's whole path: two training sets, augmentation, seven test sets, rotated copies, resume folder."""
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    for name in ("MJ", "ST"):
        write_words(tmp_path / "training" / name)
    for name in TEST_SIZES:
        write_words(tmp_path / "evaluation" / NAMES.get(name, (name,))[0], count=4)
    s = dict(
        d_model=16, heads=2, ffn=16, enc_layers=1, dec_layers=1, max_length=6, batch_size=4, steps=2, img_size=(16, 16),
        test_angles=(0, 90), recompute=True,
    )  # fmt: skip
    outcome = execute(s, 0, data_root=tmp_path)
    sets = set(TEST_SIZES)
    assert sets | {"accuracy", "irregular_mean", "rotated_0", "rotated_90", "parameters_m", "flops_b"} == set(
        outcome.metrics
    )
    assert outcome.dataset["train"]["sets"][1]["name"] == "ST" and len(outcome.dataset["test"]) == 7
    assert "4 of the paper's 3,000 words of IIIT5K" in outcome.caveats and outcome.precision == "32-true"
    assert outcome.details["words"]["all"] == 28
    assert not list((tmp_path / "runs" / "checkpoints").iterdir())
    with pytest.raises(FileNotFoundError, match="is not an LMDB"):
        execute(s | {"test_sets": ["MULTI_LINE"]}, 0, data_root=tmp_path)


@pytest.mark.parametrize("warp", ["rotate", "multi_line", "upright_or_vertical"])
def test_rendered_runs_report_what_their_tables_show(small_settings, warp):
    s = replace(small_settings, warp=warp, steps=2, control=warp != "upright_or_vertical", word_lengths=(2, 2))
    _, outcome = train_and_evaluate(s, 1, NOWHERE, FABRIC)
    if s.control:
        assert outcome.metrics["gain"] == outcome.metrics["accuracy"] - outcome.metrics["control_accuracy"]
        assert len(outcome.details["sheet"]) == 8 and set(outcome.details["mcnemar"]) >= {"p"}
    extra = {"rotate": "accuracy", "multi_line": "one_jump", "upright_or_vertical": "ratio_auc"}[warp]
    assert math.isfinite(outcome.metrics[extra])
    assert ("accuracy_by_angle" in outcome.details) == (warp == "rotate")


def test_eval_repeats_what_training_measured(checkpoint, small_settings, tmp_path, write_words):
    _, outcome = train_and_evaluate(small_settings, 3, NOWHERE, FABRIC, checkpoint)
    assert evaluate_checkpoint(checkpoint, NOWHERE, "cpu") == (outcome.metrics, {})
    words = write_words(tmp_path / "evaluation" / "own", charset="47")
    metrics, counts = evaluate_checkpoint(checkpoint, tmp_path, "cpu", ("own",))  # a rendered one's, on real words
    read = correct(load_model(checkpoint, FABRIC), LmdbWords(tmp_path / "evaluation" / "own", (16, 16)))
    assert metrics["own"] == metrics["accuracy"] == 100 * read.mean() and counts == {"own": len(words), "all": 12}
