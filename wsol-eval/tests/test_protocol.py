"""Random search, the ledger, FSL's split, and the tables built on them."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import RECIPE, run
from wsol_eval.scenes import make_split

from wsol_eval import conformance, experiments, protocol
from wsol_eval.data import SceneSource
from wsol_eval.experiments import Settings, execute
from wsol_eval.protocol import Ledger, draw, report_once, search, search_fsl, split_fullsup
from wsol_eval.train import fit, make_fabric

TINY = {"trials": 2, "interval": 0.1, "epochs": 1, "batch_size": 50, "lr_classifier_ratio": 1.0, "fsl_epochs": 2}


@pytest.fixture(scope="module")
def fabric():
    torch.set_num_threads(1)
    return make_fabric("cpu")


@pytest.fixture(scope="module")
def scenes():
    return {name: SceneSource(make_split(name, 48, 1), name) for name in ("train", "val", "test")}


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


def test_search_chooses_on_train_fullsup_and_counts_its_uses(scenes, fabric):
    ledger, networks = Ledger(), {}

    def train(recipe, trial):
        networks[trial] = fit(recipe, scenes["train"], 0, fabric)
        return networks[trial]

    found = search(RECIPE, "scenes", 3, 0, train, scenes["val"], fabric, ledger, interval=0.1)
    assert found.best == int(np.argmax(found.values)) and len(networks) == 3
    assert ledger.counts() == {"uses_of_full_supervision": 3, "images_of_full_supervision": 48, "looks_at_test": 0}
    report, entry = report_once("cam", networks[found.best], scenes["test"], fabric, ledger, 0.1)
    assert entry["metrics"] == report.metrics() and ledger.counts()["looks_at_test"] == 1
    with pytest.raises(RuntimeError, match="a second look breaks the protocol"):
        report_once("cam", networks[0], scenes["test"], fabric, ledger, 0.1)


def test_diverged_trials_are_recorded_and_never_chosen(scenes, fabric):
    def train(recipe, trial):
        return fit(replace(recipe, lr=1e6 if trial != 1 else 0.02), scenes["train"], 0, fabric)

    found = search(RECIPE, "scenes", 3, 0, train, scenes["val"], fabric, Ledger(), interval=0.1)
    assert [value is None for value in found.values] == [True, False, True] and found.best == 1
    with pytest.raises(RuntimeError, match="all 1 trials diverged"):
        search(RECIPE, "scenes", 1, 0, train, scenes["val"], fabric, Ledger(), interval=0.1)


def test_killed_search_goes_on_with_the_same_trials(scenes, fabric, tmp_path):
    recipe = replace(RECIPE, method="cutmix")
    arguments = (recipe, "scenes", 3, 7, scenes, fabric)
    straight, entry = protocol.run_in_folder(*arguments, tmp_path / "whole", "max_box_acc_v2", 0.05)
    assert run("resumable.py", "search", tmp_path / "killed", 2).returncode == -signal.SIGKILL
    assert len(Ledger(tmp_path / "killed" / "ledger.jsonl").find("trial")) == 2
    with open(tmp_path / "killed" / "ledger.jsonl", "ab") as file:
        file.write(b'{"kind": "tri')  # the line that was being written
    resumed, again = protocol.run_in_folder(*arguments, tmp_path / "killed", "max_box_acc_v2", 0.05)
    assert resumed == straight and again["metrics"] == entry["metrics"]
    lines = [e for e in Ledger(tmp_path / "killed" / "ledger.jsonl").entries if e["kind"] == "trial"]
    assert [e["trial"] for e in lines] == [0, 1, 2]
    third = protocol.run_in_folder(*arguments, tmp_path / "killed", "max_box_acc_v2", 0.05)[1]
    assert third["metrics"] == entry["metrics"]  # from the ledger: still one look at test
    assert Ledger(tmp_path / "killed" / "ledger.jsonl").counts()["looks_at_test"] == 1


def test_fsl_holds_a_fifth_out_or_nothing(scenes, fabric, monkeypatch):
    fitted, judged = split_fullsup(40, seed=2)
    assert len(judged) == 8 and sorted([*fitted, *judged]) == list(range(40))
    seen = []
    monkeypatch.setattr(
        protocol, "fit", lambda recipe, source, *rest: seen.append(len(source)) or fit(recipe, source, *rest)
    )
    base = replace(RECIPE, method="fsl", batch_size=10)
    ledger = Ledger()
    search_fsl(base, "scenes", 2, 0, scenes["val"], fabric, ledger, interval=0.1)
    assert seen == [38, 38, 48]  # two trials on 80 %, then all of it
    assert [entry["images"] for entry in ledger.find("trial")] == [10, 10, 48]
    seen.clear()
    search_fsl(base, "scenes", 2, 0, scenes["val"], fabric, Ledger(), interval=0.1, validation="none")
    assert seen == [48, 48, 48]


def test_rows_are_views_on_the_same_reports():
    def metrics(**settings):
        return execute(TINY | settings, 3, Path("none")).metrics

    cam, fsl, center = metrics(), metrics(method="fsl"), metrics(method="center")
    assert cam["share_of_fsl_gap"] == 0 and fsl["share_of_fsl_gap"] == 1
    assert center["v2_over_center"] == 0
    best = metrics(experiment="max", parts=[{"method": "cam"}, {"method": "center"}])
    assert best["max_box_acc_v2"] == max(cam["max_box_acc_v2"], center["max_box_acc_v2"])
    mean = metrics(experiment="mean", parts=[{"method": "cam"}, {"method": "center"}])
    assert mean["pxap"] == pytest.approx((cam["pxap"] + center["pxap"]) / 2)
    trials = metrics(experiment="trials")
    assert trials["worst_trial"] <= trials["median_trial"] <= trials["best_trial"]
    assert metrics(experiment="tau", tau=0.5)["gt_known_accuracy"] <= metrics(experiment="tau")["gt_known_accuracy"]
    record = execute(TINY | {"keep_maps": True}, 3, Path("none"))
    assert json.loads(json.dumps(record.details))["ledger"]["looks_at_test"] == 1
    assert len(json.dumps(record.details)) < 20_000


def test_every_table_is_sound():
    tables = experiments.tables()
    assert {"table-8", "table-2-cub", "figure-1", "center", "section-3"} <= {table.id for table in tables}
    for table in tables:
        for scale in table.scales:
            for row in table.rows_at(scale):
                raw = table.settings(row, scale)
                parts = raw.get("parts", [{}])
                for part in parts:
                    settings = Settings.of({k: v for k, v in raw.items() if k != "parts"} | part)
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
