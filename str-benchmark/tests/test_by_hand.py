"""Few readings with the scores that a pencil gives, what a training writes and when, and how a device is chosen."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from str_benchmark import evaluation, scoring, train
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.names import IRREGULAR, REGULAR
from str_benchmark.evaluation import Reading, evaluate, latency_ms, per_word
from str_benchmark.models import build_model
from str_benchmark.settings import PRESETS, TINY
from str_benchmark.train import LOG_EVERY, fit, load_checkpoint, make_fabric, make_optimizer

FABRIC = make_fabric("cpu")


# ---- scores ----------------------------------------------------------------------------------------------


def reading(n, blank_share=None, broken=()):
    words = [f"store/image-{i:09d}" for i in range(n)]
    labels = [f"w{i}" for i in range(n)]
    return Reading(words, labels, labels, labels, [0.98768 - i / 100 for i in range(n)], list(broken), blank_share)


COUNTS = {  # words, read, broken, labels without a test character
    "IIIT_3000": (10, 9, 0, 0), "SVT_647": (8, 6, 2, 0), "IC03_860": (4, 3, 0, 0), "IC03_867": (6, 5, 0, 1),
    "IC13_1015": (4, 4, 0, 0), "IC15_2077": (20, 8, 0, 0), "SVTP_645": (2, 1, 0, 0), "CUTE_288": (2, 0, 0, 0),
}  # fmt: skip
NED = dict(zip(COUNTS, (0.9, 0.8, 0.7, 0.6, 1.0, 0.5, 0.4, 0.1), strict=True))


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """The outcome of readings that were counted by hand."""

    def run(names, shares):
        hits = {name: np.arange(COUNTS[name][0]) < COUNTS[name][1] for name in names}
        readings = {name: reading(COUNTS[name][0], share) for name, share in zip(names, shares, strict=True)}
        rows = [
            (name, n, read, read / n, 0.1234, 0.98766, NED[name], broken, empty)
            for name, (n, read, broken, empty) in COUNTS.items()
            if name in names
        ]
        columns = ["set", "n", "correct", "accuracy", "low", "high", "ned", "broken", "empty_labels"]
        given = {}

        def stand_in(model, sets, **options):
            given.update(options, model=model, sets=sets)
            return pd.DataFrame(rows, columns=columns), hits, readings

        monkeypatch.setattr(scoring, "evaluate", stand_in)
        monkeypatch.setattr(scoring, "for_inference", lambda model, engine: ("fast", engine))
        monkeypatch.setattr(scoring, "latency_ms", lambda model: 12.5 if model == ("fast", "onnx") else 0)
        monkeypatch.setattr(scoring, "count_parameters", lambda model: 2_500_000)
        part = SimpleNamespace(indices=np.arange(3), size=100, total=7)
        monkeypatch.setattr(scoring, "Parts", lambda parts: type("P", (), {"parts": [part], "__len__": lambda s: 3})())
        settings = replace(PRESETS["paper"], pad=True, test_charset="36")
        sets = {name: [] for name in names}
        outcome = scoring.score("model", settings, sets, True, engine="onnx", words=tmp_path / "words.csv")
        assert given == {
            "model": ("fast", "onnx"), "sets": sets, "test_charset": settings.test_characters, "pad": True,
            "skip_broken": True,
        }  # fmt: skip
        return outcome

    return run


def test_the_metrics_of_the_paper_s_sets(scored, tmp_path):
    outcome = scored(tuple(COUNTS), [None] * len(COUNTS))
    accuracies = {name: 100 * read / n for name, (n, read, *_) in COUNTS.items()}

    def share(names):
        return 100 * sum(COUNTS[name][1] for name in names) / sum(COUNTS[name][0] for name in names)

    ned = sum(NED[name] * n for name, (n, *_) in COUNTS.items()) / sum(n for n, *_ in COUNTS.values())
    expected = accuracies | {
        "total_accuracy": share(REGULAR + IRREGULAR),
        "regular_accuracy": share(REGULAR),
        "irregular_accuracy": share(IRREGULAR),
        "in_distribution": share(("IIIT_3000", "SVT_647", "IC13_1015", "IC15_2077")),
        "out_distribution": share(("IC03_867", "SVTP_645", "CUTE_288")),
        "combined_accuracy": share(set(COUNTS) - {"IC03_860"}),  # its words are among the 867
        "ned": 100 * ned,
        "time_ms": 12.5,
        "params_M": 2.5,
    }
    assert outcome.metrics == {name: pytest.approx(value) for name, value in expected.items()}
    assert outcome.metrics["params_M"] == 2.5
    details = outcome.details
    assert details["n"] == {name: n for name, (n, *_) in COUNTS.items()} | {
        "total_accuracy": 52, "regular_accuracy": 28, "irregular_accuracy": 24, "in_distribution": 42,
        "out_distribution": 10, "combined_accuracy": 52,
    }  # fmt: skip
    assert details["intervals"]["SVT_647"] == [12.34, 98.77] and details["empty_labels"] == {"IC03_867": 1}
    assert details["correct"]["IIIT_3000"] == "ff80" and details["correct"]["SVTP_645"] == "80"
    assert details["read"]["CUTE_288"] == [("w0", 0.988), ("w1", 0.978)] and len(details["read"]["IIIT_3000"]) == 4
    assert set(details) == {"n", "read", "correct", "intervals", "by_rule", "empty_labels"}
    assert outcome.dataset["evaluation"][0].keys() == {"name", "total", "used", "sha256"}
    assert [each["name"] for each in outcome.dataset["evaluation"]] == list(COUNTS)
    assert outcome.caveats[0] == "2 broken images of SVT_647 skipped"
    assert outcome.caveats[1].startswith("other sets than the paper's: IIIT_3000 10 of 3,000, SVT_647 10 of 647, ")
    table = pd.read_csv(tmp_path / "words.csv")
    assert len(table) == 56 and table.confidence[0] == 0.9877 and table.correct.sum() == 36


def test_groups_of_which_a_set_is_missing_have_no_metric(scored):
    outcome = scored(("IIIT_3000", "SVT_647"), [0.5, 0.8])
    assert set(outcome.metrics) == {
        "IIIT_3000", "SVT_647", "combined_accuracy", "ned", "time_ms", "params_M", "blank_share",
    }  # fmt: skip
    assert outcome.metrics["blank_share"] == pytest.approx(100 * (0.5 * 10 + 0.8 * 8) / 18)
    assert outcome.details["n"] == {"IIIT_3000": 10, "SVT_647": 8, "combined_accuracy": 18}


def test_a_checksum_names_the_samples_and_the_file():
    def part(indices, size):
        return SimpleNamespace(indices=np.array(indices), size=size, total=9)

    def described(*parts):
        return scoring.described("x", type("P", (), {"parts": list(parts), "__len__": lambda self: 5})())

    first = described(part([0, 1], 100), part([2], 7))
    assert first == {"name": "x", "total": 18, "used": 5, "sha256": first["sha256"]} and len(first["sha256"]) == 16
    others = [described(part([0, 2], 100), part([2], 7)), described(part([0, 1], 101), part([2], 7))]
    assert len({each["sha256"] for each in [first, *others]}) == 3


def test_a_row_for_each_word():
    found = per_word({"a": np.array([True, False])}, {"a": reading(2)})
    assert found.to_dict("list") == {
        "set": ["a", "a"], "word": ["store/image-000000000", "store/image-000000001"], "label": ["w0", "w1"],
        "read": ["w0", "w1"], "confidence": [0.9877, 0.9777], "correct": [True, False],
    }  # fmt: skip


def test_the_time_of_an_image_is_the_median_of_warm_repeats(monkeypatch):
    """Two warm-up calls of 100 ms, then 1, 2 and 9 ms, and the mode is put back."""
    model = build_model("None-VGG-None-CTC", output_channel=16).train()
    ends = np.cumsum([0, 0.1, 0, 0.1, 0, 0.001, 0, 0.002, 0, 0.009])
    monkeypatch.setattr("str_benchmark.evaluation.time.perf_counter", iter(ends.tolist()).__next__)
    modes = []
    model.Prediction.register_forward_hook(lambda module, given, out: modes.append((module.training, len(out))))
    assert latency_ms(model, repeats=3, warmup=2) == pytest.approx(2)
    assert modes == [(False, 1)] * 5 and model.training


def test_scores_of_two_sets_and_their_warnings(tmp_path, word_lmdb, caplog, monkeypatch):
    """Of five words the model reads "ab" everywhere: one right, one nearly, one without a test character."""
    data = LMDBDataset(word_lmdb(tmp_path / "w", ["ab", "AB", "abcd", "!!", "x"]), "36", filter="off")
    model = build_model("None-VGG-None-CTC", output_channel=16)
    monkeypatch.setattr(
        "str_benchmark.evaluation.read_pixels",
        lambda model, pixels: (
            ["ab"] * len(pixels),
            [0.5] * len(pixels),
            torch.tensor([[[9.0, 0], [0, 9]]] * len(pixels)),
        ),
    )
    frame, correct, readings = evaluate(model, {"IC13_857": [data]}, batch_size=2)
    row = frame.iloc[0]
    assert (row.set, row.n, row.correct, row.accuracy, row.empty_labels, row.broken) == ("IC13_857", 5, 2, 0.4, 1, 0)
    assert row.ned == pytest.approx((1 + 1 + 0.5 + 0 + 0) / 5) and row.low < 0.4 < row.high
    assert correct["IC13_857"].tolist() == [True, True, False, False, False]
    assert readings["IC13_857"].blank_share == 0.5 and readings["IC13_857"].confidences == [0.5] * 5
    said = caplog.text
    assert "IC13_857: 1 labels have no test character; they count as not read" in said
    assert "IC13_857 has 5 words, expected 857: this is another set of the same name" in said and "plateau" not in said


def test_words_are_compared_on_the_characters_asked_for_and_images_are_stretched(
    tmp_path, word_lmdb, monkeypatch, caplog
):
    """24 of 25 columns are blank, which is warned of."""
    data, pads, grouped = LMDBDataset(word_lmdb(tmp_path / "w", ["aB"]), "62", filter="off"), [], evaluation.grouped
    probs = torch.zeros(1, 25, 3)
    probs[0, 7, 2] = 1
    monkeypatch.setattr(evaluation, "grouped", lambda *each: pads.append(each[2]) or grouped(*each))
    monkeypatch.setattr(evaluation, "read_pixels", lambda model, pixels: (["aB"], [0.5], probs))
    model = build_model("None-VGG-None-CTC", charset="62", output_channel=16)
    frame, _, _ = evaluate(model, {"x": [data]})
    assert (frame.ned[0], frame.accuracy[0]) == (1, 1) and pads == [False]
    assert "x: 96.0 % of the columns are blank: CTC has not left its plateau" in caplog.text
    assert evaluate(model, {"x": [data]}, test_charset="36", pad=True)[0].ned[0] == 1 and pads == [False, True]


def test_two_ranks_share_a_set_and_get_all_of_it(tmp_path, word_lmdb, monkeypatch):
    """This is rank 1, which reads the second and the fourth word; the other rank's readings are given."""
    data, model = LMDBDataset(word_lmdb(tmp_path / "w", list("abcd")), "36", filter="off"), build_model(TINY.config)
    monkeypatch.setattr(evaluation, "read_pixels", lambda model, pixels: (["x", "y"], [0.1, 0.2], torch.zeros(2, 4, 3)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather_object(everyone, mine):
        everyone[:] = [[([0, 2], ["p", "q"], ["a", "c"], [0.3, 0.4], [0.5, 0.5], ["broken"])], mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    found = evaluation.read(model, [data])
    assert (found.texts, found.labels, found.written) == (list("pxqy"), list("abcd"), list("abcd"))
    assert found.confidences == [0.3, 0.1, 0.4, 0.2] and found.broken == ["broken"] and found.blank_share == 0.75


def test_only_ctc_has_blanks(tmp_path, word_lmdb):
    data = LMDBDataset(word_lmdb(tmp_path / "w", ["ab"]), "36", filter="off")
    for name, has in (("None-VGG-None-CTC", True), ("None-VGG-None-Attn", False)):
        model = build_model(name, output_channel=16, hidden_size=16)
        assert (evaluation.read(model, [data]).blank_share is not None) == has


# ---- training --------------------------------------------------------------------------------------------


class Batches:
    """The same two words at every step."""

    broken = 0

    def __init__(self, model):
        self.images = torch.rand(2, 1, *model.config.img_size, generator=torch.Generator().manual_seed(0))
        self.ids, self.lengths = model.tokenizer.encode(["12", "3"])
        self.sampler = SimpleNamespace(state_dict=lambda: {"seed": 1, "step": -1}, load_state_dict=lambda state: None)

    def batches(self, start, steps):
        for _ in range(start, steps):
            yield self.images, self.ids, self.lengths


def test_a_training_saves_every_so_many_steps_and_at_its_end(monkeypatch, tmp_path):
    model, path, saved, begun, save = build_model(TINY.config), tmp_path / "c.pt", [], [], train._save

    def spy(path, run, state, model, data, fabric, optimizer=None):
        saved.append((path.name, state["step"], optimizer is not None))
        save(path, run, state, model, data, fabric, optimizer)

    monkeypatch.setattr(train, "_save", spy)
    options = {"run": {"settings": {}}, "steps": 5, "checkpoint_every": 2, "before_step": begun.append}
    curve = fit(model, Batches(model), TINY, FABRIC, checkpoint=path, **options)
    assert saved == [("c.pt", 2, True), ("c.pt", 4, True), ("c.pt", 5, False)] and begun == [0, 1, 2, 3, 4]
    content = load_checkpoint(path)
    assert content["state"]["step"] == 5 and content["state"]["best"] is None and content["state"]["broken"] == 0
    assert "optimizer" not in content and content["state"]["curve"] == curve
    fit(build_model(TINY.config), Batches(model), TINY, FABRIC, **options)
    assert len(saved) == 3


def test_a_position_counts_the_steps_taken_and_not_the_batches_drawn(tmp_path):
    model, path = build_model(TINY.config), tmp_path / "c.pt"

    class Stop(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stop

    data = Batches(model)
    data.broken = 4
    options = {"run": {"settings": {}}, "steps": 5, "checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(Stop):
        fit(model, data, TINY, FABRIC, before_step=stop, **options)
    content = load_checkpoint(path)
    assert content["sampler"] == {"seed": 1, "step": 3} and content["scaler"] == {} and "rng" in content
    again, restored, begun = Batches(model), [], []
    again.sampler.load_state_dict = restored.append
    fit(build_model(TINY.config), again, TINY, FABRIC, before_step=begun.append, **options)
    assert restored == [{"seed": 1, "step": 3}] and begun == [3, 4] and again.broken == 4


def test_the_curve_has_a_point_where_it_is_due():
    """Validation after steps 3 and 6 and at the end; a mean loss since the last point."""
    model = build_model(TINY.config)
    settings, losses, plain = replace(TINY, val_every=3), [], train.loss_of

    def loss_of(*each):
        losses.append(plain(*each))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_of", loss_of)
        options = {"run": {"settings": {}}, "steps": 7}
        curve = fit(model, Batches(model), settings, FABRIC, validate=lambda model: 0.25, **options)
    values = [loss.item() for loss in losses]
    assert [point["step"] for point in curve] == [3, 6, 7] and all(point["accuracy"] == 0.25 for point in curve)
    means = [sum(values[:3]) / 3, sum(values[3:6]) / 3, values[6]]
    assert [point["loss"] for point in curve] == pytest.approx(means, rel=1e-5)
    assert LOG_EVERY == 250
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 2)
        curve = fit(build_model(TINY.config), Batches(model), settings, FABRIC, run={"settings": {}}, steps=5)
    assert [(point["step"], "accuracy" in point) for point in curve] == [(2, False), (4, False), (5, False)]


def test_optimizers():
    model = build_model(TINY.config)
    (group,) = make_optimizer(replace(TINY, optimizer="adadelta", lr=0.7), model).param_groups
    assert (group["lr"], group["rho"], group["eps"], group["weight_decay"]) == (0.7, 0.95, 1e-8, 0)
    optimizer = make_optimizer(replace(TINY, optimizer="adamw", lr=0.3), model)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and (group["lr"], group["weight_decay"]) == (0.3, 0)
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.fixture
def made(monkeypatch):
    """The options with which a Fabric was made."""
    options = {}
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "Fabric", lambda **given: options.update(given) or type("F", (), {"launch": int})())
    return options


@pytest.mark.parametrize("capability, precision", [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), (None, "32-true")])
def test_device_and_precision_follow_the_machine(monkeypatch, made, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    make_fabric()
    assert (made["accelerator"], made["precision"]) == ("cuda" if capability else "cpu", precision)
    make_fabric("cpu", "bf16-mixed")
    assert (made["accelerator"], made["precision"]) == ("cpu", "bf16-mixed")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (1, 1, "auto")),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (2, 4, "ddp")),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, (4, 2, "ddp")),
        ({"SLURM_NTASKS": "4"}, (4, 1, "ddp")),
    ],
)
def test_processes_and_nodes(monkeypatch, made, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make_fabric("cpu")
    assert (made["devices"], made["num_nodes"], made["strategy"]) == expected and isinstance(made["num_nodes"], int)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    content = {"run": {"settings": Path("/")}, "model": {}, "state": {"step": 0}}  # unpickling calls a constructor
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: cannot be read as a training checkpoint .*eights only load failed"):
        load_checkpoint(tmp_path / "c.pt")
