"""Random search, the ledger, FSL's split, and the tables built on them."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import RECIPE, run

from wsol_eval import conformance, experiments, protocol
from wsol_eval.cutouts import make_split
from wsol_eval.experiments import Settings, execute
from wsol_eval.intervals import bootstrap
from wsol_eval.protocol import Ledger, draw, report_once, search, search_fsl, split_fullsup
from wsol_eval.recipe import OnData
from wsol_eval.sources import MemorySource
from wsol_eval.train import fit, make_fabric

TINY = {"trials": 2, "interval": 0.1, "epochs": 1, "batch_size": 50, "lr_classifier_ratio": 1.0, "fsl_epochs": 2}


@pytest.fixture(scope="module")
def fabric():
    torch.set_num_threads(1)
    return make_fabric("cpu")


@pytest.fixture(scope="module")
def digits():
    return {name: MemorySource(make_split(name, 48, 1), name) for name in ("train", "val", "test")}


def test_trials_are_drawn_within_the_papers_ranges():
    for trial in range(200):
        drawn = {method: draw("paper", method, 3, trial) for method in ("cam", "has", "acol", "spg", "adl", "cutmix")}
        assert len({(d["lr"], d["feature_map"]) for d in drawn.values()}) == 1  # shared by all methods
        assert 1e-5 <= drawn["cam"]["lr"] <= 1 and drawn["cam"]["feature_map"] in (14, 28)
        assert 0 <= drawn["has"]["has_drop_rate"] <= 1 <= drawn["has"]["has_grid_size"] <= 224
        assert 0 <= drawn["acol"]["acol_threshold"] <= 1 and drawn["cutmix"]["cutmix_beta"] >= 0
        assert all(0 <= low <= high <= 1 for high, low in drawn["spg"]["spg"])
        assert 0 <= drawn["adl"]["adl_drop_rate"] <= 1 and 0 <= drawn["adl"]["adl_threshold"] <= 1
    assert draw("paper", "adl", 3, 5) == draw("paper", "adl", 3, 5) != draw("paper", "adl", 4, 5)


def test_search_chooses_on_train_fullsup_and_counts_its_uses(digits, fabric):
    ledger, networks = Ledger(), {}

    def train(recipe, trial):
        networks[trial] = fit(recipe, digits["train"], 0, fabric)
        return networks[trial]

    found = search(RECIPE, "photographs", 3, 0, train, digits["val"], fabric, ledger, interval=0.1)
    assert found.best == int(np.argmax(found.values)) and len(networks) == 3
    assert ledger.counts() == {"uses_of_full_supervision": 3, "images_of_full_supervision": 48, "looks_at_test": 0}
    report, entry = report_once("cam", networks[found.best], digits["test"], fabric, ledger, 0.1)
    assert entry["metrics"] == report.metrics() | report.intervals() and ledger.counts()["looks_at_test"] == 1
    measured = {
        "max_box_acc_v2": (report.all, "v2"),
        "max_box_acc": (report.largest, "0.5"),
        "pxap": (report.pixels, "pxap"),
    }
    for name, (result, key) in measured.items():
        assert entry["metrics"][f"{name}_low"] == bootstrap(result)[key].low < bootstrap(result)[key].high
    with pytest.raises(RuntimeError, match="a second look breaks the protocol"):
        report_once("cam", networks[0], digits["test"], fabric, ledger, 0.1)


def test_diverged_trials_are_recorded_and_never_chosen(digits, fabric):
    def train(recipe, trial):
        return fit(replace(recipe, lr=1e6 if trial != 1 else 0.02), digits["train"], 0, fabric)

    found = search(RECIPE, "photographs", 3, 0, train, digits["val"], fabric, Ledger(), interval=0.1)
    assert [value is None for value in found.values] == [True, False, True] and found.best == 1
    with pytest.raises(RuntimeError, match=r"every trial diverged \(1 of 1\)"):
        search(RECIPE, "photographs", 1, 0, train, digits["val"], fabric, Ledger(), interval=0.1)


def test_killed_search_goes_on_with_the_same_trials(digits, fabric, tmp_path):
    recipe = replace(RECIPE, method="cutmix")
    arguments = (recipe, "photographs", 3, 7, digits, fabric)
    straight, entry, _ = protocol.run_in_folder(*arguments, tmp_path / "whole", "max_box_acc_v2", 0.05)
    assert run("resumable.py", "search", tmp_path / "killed", 3).returncode == -signal.SIGKILL
    assert [e["kind"] for e in written(tmp_path / "killed")] == ["protocol", "trial", "trial"]
    with open(tmp_path / "killed" / "ledger.jsonl", "ab") as file:
        file.write(b'{"kind": "tri')  # the line that was being written
    resumed, again, _ = protocol.run_in_folder(*arguments, tmp_path / "killed", "max_box_acc_v2", 0.05)
    assert resumed == straight and again["metrics"] == entry["metrics"]
    assert [e["trial"] for e in written(tmp_path / "killed") if e["kind"] == "trial"] == [0, 1, 2]
    _, third, ledger = protocol.run_in_folder(*arguments, tmp_path / "killed", "max_box_acc_v2", 0.05)
    assert third["metrics"] == entry["metrics"] and ledger.counts()["looks_at_test"] == 1  # from the ledger


def written(folder):
    """Whole lines of a ledger."""
    lines = (folder / "ledger.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def test_a_folder_used_again_answers_for_its_own_data_and_schedule(digits, fabric, tmp_path):
    base = replace(RECIPE, epochs=1)
    options = ("photographs", 1, 0, digits, fabric, tmp_path, "auto", 0.1)
    first = protocol.run_in_folder(base, *options)
    others = dict(digits, test=MemorySource(make_split("test", 48, 9), "test"))
    longer = protocol.run_in_folder(RECIPE, *options)
    elsewhere = protocol.run_in_folder(base, *options[:3], others, *options[4:])
    again = protocol.run_in_folder(base, *options)
    assert len({each[2].key for each in (first, longer, elsewhere)}) == 3 and again[1] == first[1]
    fresh = protocol.run_in_folder(base, *options[:3], others, fabric, tmp_path / "fresh", "auto", 0.1)
    assert elsewhere[1]["metrics"] == fresh[1]["metrics"] != first[1]["metrics"]


def test_search_on_the_proxy_is_retrained_on_everything(digits, fabric, tmp_path, monkeypatch):
    seen, judged, evaluate = [], [], protocol.evaluate

    def judge(network, source, *options, **more):
        judged.append(source)
        return evaluate(network, source, *options, **more)

    monkeypatch.setattr(protocol, "evaluate", judge)
    monkeypatch.setattr(protocol, "fit", lambda r, source, *o, **n: seen.append(len(source)) or fit(r, source, *o, **n))
    sources = dict(digits, proxy=digits["train"].subset(np.arange(16)))
    protocol.run_in_folder(replace(RECIPE, epochs=1), "photographs", 2, 0, sources, fabric, tmp_path, "auto", 0.1)
    assert seen == [16, 16, 48]
    assert judged == [digits["val"], digits["val"], digits["test"]]  # train-fullsup chooses, test is looked at once


def test_criterion_follows_the_data(digits):
    assert protocol.criterion_of("auto", digits["val"]) == "max_box_acc_v2"
    masked = MemorySource(digits["val"].images)
    masked.has_boxes = False
    assert protocol.criterion_of("auto", masked) == "pxap"
    with pytest.raises(ValueError, match="this data set allows pxap, got 'max_box_acc_v2'"):
        protocol.criterion_of("max_box_acc_v2", masked)


def test_fsl_holds_a_fifth_out_or_nothing(digits, fabric, monkeypatch):
    fitted, judged = split_fullsup(40, seed=2)
    assert len(judged) == 8 and sorted([*fitted, *judged]) == list(range(40))
    seen = []
    monkeypatch.setattr(
        protocol, "fit", lambda recipe, source, *rest, **more: seen.append(len(source)) or fit(recipe, source, *rest)
    )
    base = replace(RECIPE, method="fsl", batch_size=10)
    ledger = Ledger()
    search_fsl(base, "photographs", 2, 0, digits["val"], fabric, ledger, interval=0.1)
    assert seen == [38, 38, 48]  # two trials on 80 %, then all of it
    assert [entry["images"] for entry in ledger.find("trial")] == [10, 10, 48]
    seen.clear()
    search_fsl(base, "photographs", 2, 0, digits["val"], fabric, Ledger(), interval=0.1, validation="none")
    assert seen == [48, 48, 48]


def test_rows_are_views_on_the_same_reports():
    def metrics(**settings):
        return execute(TINY | settings, OnData(seed=3)).metrics

    cam, fsl, center = metrics(), metrics(method="fsl"), metrics(method="center")
    assert fsl["max_box_acc_v2"] != cam["max_box_acc_v2"]
    assert center["v2_over_center"] == 0
    best = metrics(experiment="max", parts=[{"method": "cam"}, {"method": "center"}])
    assert best["max_box_acc_v2"] == max(cam["max_box_acc_v2"], center["max_box_acc_v2"])
    parts = [{"experiment": "tau", "method": method} for method in ("cam", "center", "spg")]
    best, each = metrics(experiment="max", parts=parts), [metrics(**part) for part in parts]
    assert [best["gt_known_accuracy"], best["tau"]] == max([e["gt_known_accuracy"], e["tau"]] for e in each)
    assert best["tau"] < max(e["tau"] for e in each)
    mean = metrics(experiment="mean", parts=[{"method": "cam"}, {"method": "center"}])
    assert mean["pxap"] == pytest.approx((cam["pxap"] + center["pxap"]) / 2)
    trials = metrics(experiment="trials")
    assert trials["worst_trial"] <= trials["median_trial"] <= trials["best_trial"]
    assert metrics(experiment="tau", tau=0.5)["gt_known_accuracy"] <= metrics(experiment="tau")["gt_known_accuracy"]
    record = execute(TINY | {"keep_maps": True}, OnData(seed=3))
    assert json.loads(json.dumps(record.details))["ledger"]["looks_at_test"] == 1
    assert len(json.dumps(record.details)) < 20_000


def leaves(raw):
    """Settings of a row, or of all its parts."""
    if "parts" not in raw:
        return [Settings.of(raw)]
    whole = {name: value for name, value in raw.items() if name not in ("experiment", "parts")}
    return [settings for part in raw["parts"] for settings in leaves(whole | part)]


def test_best_wsol_is_the_best_of_the_methods_means():
    """The paper's own cells: 61.1 of CAM and ADL, though ACoL on ResNet50 and ADL on VGG16 are far above."""
    for name in ("table-8-cub", "table-8-imagenet", "table-8-openimages", "table-2-cub", "table-2-openimages"):
        table = next(table for table in experiments.tables() if table.id == name)
        metric = next(iter(table.metrics))
        means = [table.row(f"{m}, mean") for m in ("CAM", "HaS", "ACoL", "SPG", "ADL", "CutMix")]
        best = table.row("Best WSOL, mean")
        assert best.published[metric] == max(row.published[metric] for row in means)
        assert best.run["experiment"] == "max" and len(best.run["parts"]) == 6
        for part, row in zip(best.run["parts"], means, strict=True):
            assert part["experiment"] == "mean" and part["parts"] == row.run["parts"]


def test_no_claim_contradicts_the_papers_own_figures():
    for table in experiments.tables():
        for claim in table.claims:
            told = {row.name: row.published.get(claim.metric) for row in table.rows}
            if table.id == "center" or None in [told[name] for name in claim.named_rows]:
                continue
            if claim.better:
                assert told[claim.better] - told[claim.than] > claim.margin, (table.id, claim.text)
            elif claim.minus and claim.at_most is not None:
                assert told[claim.row] - told[claim.minus] <= claim.at_most, (table.id, claim.text)


def test_every_table_is_sound():
    tables = experiments.tables()
    assert {"table-8", "table-2-cub", "figure-1", "center", "section-3"} <= {table.id for table in tables}
    for table in tables:
        for scale in table.scales:
            for row in table.rows_at(scale):
                for settings in leaves(table.settings(row, scale)):
                    assert settings.recipe().method in ("cam", "has", "acol", "spg", "adl", "cutmix", "fsl", "center")
        if "embedded" in table.scales:
            assert min(table.scales["embedded"].seeds) >= 20
    cub = next(table for table in tables if table.id == "table-8-cub")
    published = {row.name: row.published.get("max_box_acc_v2") for row in cub.rows}
    assert published["CAM, VGG16"] == 63.7 and published["FSL baseline, mean"] == 80.2


def test_conformance_names_what_differs(tmp_path):
    assert conformance.check(conformance.ours()) == []
    wrong = conformance.expected() | {"pxap": 23.0}
    del wrong["mean_all"]
    problems = conformance.check(wrong)
    assert len(problems) == 2 and any("pxap: expected 23.4842" in line for line in problems)
    conformance.write(tmp_path)
    assert len(list((tmp_path / "boxes").glob("*.npy"))) == 28
    assert set(json.loads((tmp_path / "answers.json").read_text())) == set(conformance.expected())
