"""Tables, the protocol of evaluation, runs and figures."""

from typing import get_args

import pytest
import torch

from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.evaluate import Evaluation, TestSet, fit_match, shared_digit_ratio, shares_digit
from hib_ndigit_mnist.experiments import PROJECT, execute, parse, stackable, summary, tables
from hib_ndigit_mnist.figures import draw_all
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.models import MLPEncoder
from hib_ndigit_mnist.reports import REPORTS
from hib_ndigit_mnist.settings import Report
from shared_utils.runlog import RunLog

TABLES = {table.id: table for table in tables()}
SIZES = {"total_train": 1080, "total_test": 450, "min_per_number": 10}


@pytest.fixture(scope="module")
def sets():
    return ndigit_sets("digits", 1, "instance", ".", **SIZES)


def test_every_setting_of_every_table_makes_sense():
    for table in TABLES.values():
        assert table.note or table.id.startswith("figure")
        for scale in table.scales:
            for run in table.runs(scale):
                parse(run.settings)
            assert scale != "embedded" or min(table.scales[scale].seeds) >= 20
    assert {"table-1", "table-2", "table-dataset", "figure-1", "figure-3", "figure-4", "figure-5"} <= TABLES.keys()
    for name in ("table-1", "table-2"):  # no source for the paper's figures: none is claimed
        assert not any(row.published for row in TABLES[name].rows)


def test_reports_have_the_names_that_settings_allow():
    assert {*REPORTS, "dataset"} == set(get_args(Report))


def test_rows_that_share_a_model_are_one_group():
    runs = [run for table in TABLES.values() if "embedded" in table.scales for run in table.runs("embedded")]
    groups = {stackable(run) for run in runs}
    assert len(groups) < 20 < len(runs)
    one = next(run for run in runs if run.table == "table-1" and run.row == "N=1 D=2 MoG-1")
    two = next(run for run in runs if run.table == "figure-sweep")
    assert stackable(one) == stackable(two)


def test_smoke_runs_report_their_metrics_and_are_deterministic(tmp_path):
    wanted = ("table-1", "table-2", "figure-1", "figure-3", "figure-strip", "figure-sweep")
    runs = [run for name in wanted for run in TABLES[name].runs("smoke")]
    groups = {}
    for run in runs:
        groups.setdefault(stackable(run), []).append(run)
    log = RunLog(tmp_path / "results" / "embedded.jsonl")
    for members in groups.values():
        settings, seeds = [run.settings for run in members], [run.seed for run in members]
        outcomes = execute(settings, seeds, tmp_path, "cpu", tmp_path / "checkpoints")
        for run, outcome in zip(members, outcomes, strict=True):
            assert set(run.metrics) <= outcome.metrics.keys()
            assert all(isinstance(value, float) for value in outcome.metrics.values())
    again = execute(settings, seeds, tmp_path, "cpu")
    assert [each.metrics for each in again] == [each.metrics for each in outcomes]
    assert not list((tmp_path / "checkpoints").glob("*.pt")) and not log.path.exists()


def test_a_look_on_the_way_is_the_model_of_that_step(tmp_path):
    base = TABLES["table-1"].runs("smoke", ["N=1 D=2 MoG-1"])[0].settings | {"steps": 100}
    early, late = execute([base | {"at": 50}, base], [0, 0], tmp_path, "cpu")
    assert early.metrics != late.metrics


def test_evaluation_of_points_and_mixtures(sets):
    test = TestSet.of(sets["test"], images=200, pairs=600, queries=50)
    same = TestSet.of(sets["test"], images=200, pairs=600, queries=50)
    assert torch.equal(test.images["corrupt"], same.images["corrupt"])
    assert 0.2 < float(test.hidden_ink().mean()) < 0.6
    torch.manual_seed(0)
    exact = Evaluation(MLPEncoder(components=2), MatchProbability(2.0, 3.0), test)
    sampled = Evaluation(exact.encoder, MatchProbability(2.0, 3.0), test, "mc", samples=64)
    for name in ("clean", "corrupt"):
        assert (exact.pair_scores[name] - sampled.pair_scores[name]).abs().mean() < 0.03
        assert (exact.eta[name] - sampled.eta[name]).abs().mean() < 0.03
    scores = exact.verification() | exact.identification()
    assert scores["positive_rate"] == 0.5 and 0.4 < scores["ap_corrupt"] <= 1 and 0 <= scores["knn_corrupt_same"] <= 1
    error = REPORTS["estimator"](exact)[0]["rms_error"]  # of 600 pairs, and of fewer than it asks for
    few = Evaluation(exact.encoder, exact.match, TestSet.of(sets["test"], images=200, pairs=100))
    assert REPORTS["estimator"](few)[0]["rms_error"] == pytest.approx(error, rel=0.3)
    point = Evaluation(MLPEncoder(point=True), MatchProbability(2.0, 3.0), test)
    assert point.eta["clean"].std() < 1e-6 and point.tau("corrupt", "knn").tau != point.tau("corrupt", "knn").tau
    assert Evaluation(MLPEncoder(dim=3), MatchProbability(1.0, 12.0), test).options["method"] == "quadrature"
    wide = Evaluation(MLPEncoder(dim=3), MatchProbability(1.0, 40.0), test)
    assert wide.options["method"] == "mc"  # too steep a sigmoid for three dimensions


def test_classes_that_share_a_digit():
    numbers = torch.tensor([12, 13, 42, 77])
    assert shares_digit(numbers, 2).nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    centroids = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    assert shared_digit_ratio(centroids, numbers, 2) < 0.2


def test_a_and_b_are_fitted_for_the_classical_loss(sets):
    torch.manual_seed(0)
    match = fit_match(MLPEncoder(point=True), sets["train"], 0.2)
    assert match.values()[0] > 0


def test_unknown_reports_splits_and_data_are_refused(tmp_path):
    base = TABLES["table-1"].runs("smoke")[0].settings
    for options, message in (
        ({"report": "x"}, "report: expected one of verification, "),
        ({"split": "x"}, "split: expected one of train, test"),
        ({"split": "test_seen"}, "split: expected one of train, test,"),
        ({"dataset": "x"}, "dataset: expected one of mnist, digits"),
        ({"estimator": "x"}, "estimator: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            execute([base | options], [0], tmp_path, "cpu")
    with pytest.raises(FileNotFoundError, match="MNIST was not found"):
        execute([base | {"dataset": "mnist"}], [0], tmp_path, "cpu")


def test_the_readme_shows_what_is_recorded():
    assert f"\n{summary()}\n" in (PROJECT / "README.md").read_text()


def test_figures_are_drawn_from_the_committed_log(tmp_path):
    (tmp_path / "embedded.jsonl").write_bytes((PROJECT / "results" / "embedded.jsonl").read_bytes())
    drawn = draw_all([table for table in TABLES.values() if table.id in ("figure-3", "figure-5")], tmp_path)
    assert {path.name for path in drawn} == {"figure-3.png", "figure-5.png"}
    assert all(path.stat().st_size > 10_000 and path.with_suffix(".csv").exists() for path in drawn)
