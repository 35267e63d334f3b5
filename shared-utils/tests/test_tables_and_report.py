"""Table files, verdicts with hand-computed intervals, and pages."""

import pytest

from shared_utils.report import comparison, duration, interval, judge, print_missing, results_page
from shared_utils.runlog import RunLog
from shared_utils.tables import load_table, load_tables

TABLE = """
title = "T"
source = "arXiv 0, Table 1"
metrics = { error = "lower" }
[scale.embedded]
seeds = [20, 21, 22]
size = 3
[scale.paper]
seeds = [20]
size = 9
[[row]]
name = "a"
published = { error = 1.5 }
run = { method = "a" }
[[row]]
name = "b"
run = { method = "b" }
[[row]]
name = "c"
run = { method = "c" }
paper = { size = 10 }
[[claim]]
text = "a beats b"
metric = "error"
better = "a"
than = "b"
[[claim]]
text = "a at most 1.5"
metric = "error"
row = "a"
at_most = 1.5
[[claim]]
text = "rises"
metric = "error"
rows = ["a", "b", "c"]
trend = "rises"
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table-1.toml").write_text(TABLE)
    return load_table(tmp_path / "table-1.toml", ["size", "method"])


def fill(table, path, errors):
    log = RunLog(path)
    for run in table.runs("embedded"):
        record = {
            "table": run.table,
            "row": run.row,
            "scale": run.scale,
            "seed": run.seed,
            "settings_hash": run.key[-1],
        }
        record |= {"metrics": {"error": errors[run.row][run.seed - 20]}, "device": "CPU", "threads": 1}
        log.append(record | {"commit": "abc", "versions": {"torch": "2"}, "clean": True})
    return log


def test_settings_are_layered(table):
    assert table.settings(table.rows[2], "paper") == {"size": 10, "method": "c"}
    assert [run.seed for run in table.runs("embedded", ["a"])] == [20, 21, 22]
    with pytest.raises(ValueError, match="unknown row 'd'; did you mean"):
        table.runs("embedded", ["d"])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("title", "titel", "unknown key 'titel'; did you mean 'title'"),
        ('method = "b"', 'metod = "b"', "unknown setting 'metod'; did you mean 'method'"),
        ("paper = {", "papr = {", "unknown key of a row 'papr'; did you mean 'paper'"),
        ("{ error = 1.5 }", "{ eror = 1.5 }", "unknown metric 'eror'; did you mean 'error'"),
        ('than = "b"', 'than = "bb"', "unknown row 'bb'; did you mean 'b'"),
        ('name = "b"', 'name = "a"', "row 'a' is listed twice"),
        ('name = "b"', "", "name is missing"),
        ('text = "rises"', "", "text is missing"),
        ("[scale.paper]", '[scale.paper]\nsettings_of = "table-2"', "unknown table in settings_of 'table-2'"),
        ("seeds = [20]", "seeds = []", "needs a list of different seeds"),
        ('trend = "rises"', 'trend = "up"', "needs better and than"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    (tmp_path / "table-1.toml").write_text(TABLE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        load_table(tmp_path / "table-1.toml", ["size", "method"])
    assert "table-1.toml" in str(error.value)


def test_a_table_without_a_title_is_named(tmp_path):
    (tmp_path / "table-1.toml").write_text('source = "x"\n')
    with pytest.raises(ValueError, match="table-1.toml: title is missing"):
        load_table(tmp_path / "table-1.toml")


def test_natural_order(tmp_path):
    for name in ("figure-10", "figure-2"):
        (tmp_path / f"{name}.toml").write_text(TABLE)
    assert [table.id for table in load_tables(tmp_path)] == ["figure-2", "figure-10"]


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.302653, sd 1
    assert mean == 2.0 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_verdicts(table, tmp_path):
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [1, 1, 1], "b": [2, 2.1, 1.9], "c": [3, 3, 3]})
    first, second, third = judge(table, "embedded", log)
    assert (first.verdict, first.n_seeds) == ("holds", 3)
    assert first.effect == pytest.approx(1.0) and first.low == pytest.approx(1 - 4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert second.verdict == "holds"
    assert (third.verdict, third.effect) == ("holds", 1.0)
    assert [v.verdict for v in judge(table, "paper", RunLog(tmp_path / "none"))] == ["not measured"] * 3


def test_verdicts_against(table, tmp_path):
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [2, 2, 2], "b": [1, 1.01, 0.99], "c": [0, 5, 1]})
    assert [v.verdict for v in judge(table, "embedded", log)] == ["fails", "fails", "undecided"]


@pytest.mark.parametrize(
    "first, second, third, effect, verdict",
    [
        (1, 1, 1, 0.0, "undecided"),  # equal values neither rise nor fall
        (1, 2, 3, 1.0, "holds"),  # one of 6 orders in each of three seeds: p = 2 / 6^3
        (3, 2, 1, -1.0, "fails"),
        (1, 3, 2, 0.5, "undecided"),  # the same order in all seeds, but no trend
    ],
)
def test_a_trend_is_judged_by_the_orders_of_the_rows(tmp_path, first, second, third, effect, verdict):
    head, claims = TABLE.split("[[claim]]", 1)
    (tmp_path / "table-1.toml").write_text(head + "[[claim]]" + claims.split("[[claim]]")[-1])
    table = load_table(tmp_path / "table-1.toml")
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [first] * 3, "b": [second] * 3, "c": [third] * 3})
    (found,) = judge(table, "embedded", log)
    assert (found.effect, found.verdict) == (pytest.approx(effect), verdict)
    if abs(effect) == 1:
        assert found.p_value == pytest.approx(2 / 6**3)


def test_every_seed_must_reach_the_bound_where_the_claim_says_so(table, tmp_path):
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [1, 1, 1], "b": [9, 9.1, 1.0], "c": [3, 3, 3]})
    (tmp_path / "table-1.toml").write_text(
        TABLE.replace('than = "b"', 'than = "b"\nevery_seed = true\nnote = "seen"', 1)
    )
    first = judge(load_table(tmp_path / "table-1.toml"), "embedded", log)[0]
    assert first.verdict == "fails" and str(first) == f"fails: {first.figures}; seen"
    assert judge(table, "embedded", log)[0].verdict == "undecided"


def test_a_published_error_stands_behind_its_figure(tmp_path):
    text = TABLE.replace(
        "published = { error = 1.5 }", "published = { error = 1.5 }\npublished_error = { error = 0.2 }"
    )
    (tmp_path / "table-1.toml").write_text(text)
    assert comparison(load_table(tmp_path / "table-1.toml"), "paper", None).published[0] == "1.500 ± 0.200"
    (tmp_path / "table-1.toml").write_text(text.replace("published_error = { error", "published_error = { eror"))
    with pytest.raises(ValueError, match="unknown published metric 'eror'"):
        load_table(tmp_path / "table-1.toml")


SHARING = """
title = "S"
source = "arXiv 0, Figure 1"
metrics = { error = "lower", extra = "higher" }
[scale.embedded]
seeds = [20]
[[row]]
name = "b"
runs_of = "table-1"
"""


def test_a_row_may_show_the_runs_of_another_table(table, tmp_path):
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [1, 1, 1], "b": [2, 2.1, 1.9], "c": [3, 3, 3]})
    (tmp_path / "figure-1.toml").write_text(SHARING)
    other = load_table(tmp_path / "figure-1.toml", ["size", "method"])
    assert [run.key for run in other.runs("embedded")] == [run.key for run in table.runs("embedded", ["b"])]
    assert comparison(other, "embedded", log).ours.tolist() == ["2.000 ± 0.248", "not measured"]
    (tmp_path / "figure-1.toml").write_text(SHARING + "run = { size = 4 }")
    with pytest.raises(ValueError, match="takes its settings from table-1"):
        load_table(tmp_path / "figure-1.toml")
    (tmp_path / "figure-1.toml").write_text(SHARING.replace('"b"', '"bb"'))
    with pytest.raises(ValueError, match="unknown row 'bb'"):
        load_table(tmp_path / "figure-1.toml")


def test_a_row_of_another_scale_is_an_error(table, tmp_path):
    (tmp_path / "table-2.toml").write_text(TABLE.replace('name = "c"', 'name = "c"\nscales = ["paper"]', 1))
    other = load_table(tmp_path / "table-2.toml")
    assert [run.row for run in other.runs("paper", ["c"])] == ["c"]
    with pytest.raises(ValueError, match="table-2: row 'c' is not at scale embedded"):
        other.runs("embedded", ["a", "c"])


def test_what_is_missing_includes_rows_of_other_tables_once_and_with_force_all(table, tmp_path, capsys):
    (tmp_path / "table-1.toml").write_text(TABLE.replace("size = 3", "size = 3\nexpected_seconds = 4"))
    only_at_paper = '[scale.paper]\nseeds = [0]\n[[row]]\nname = "d"\nscales = ["paper"]\n'
    (tmp_path / "table-9.toml").write_text(SHARING.partition("[scale")[0] + only_at_paper)
    (tmp_path / "figure-1.toml").write_text(
        SHARING + '[[row]]\nname = "d"\nruns_of = "table-9"\nscales = ["paper"]\n[scale.paper]\nseeds = [0]\n'
    )
    figure, costly, _ = load_tables(tmp_path)

    def counts(tables, log, **options):
        print_missing(tables, "embedded", [], [], log, **options)
        cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
        return [(cell.strip() for cell in row) for row in cells]

    empty = RunLog(tmp_path / "none.jsonl")
    assert [tuple(row) for row in counts([figure], empty)] == [("figure-1", "3", "12 s"), ("all", "", "12 s")]
    both = [tuple(row) for row in counts([figure, costly], empty)]
    assert both == [("figure-1", "3", "12 s"), ("table-1", "6", "24 s"), ("all", "", "36 s")]
    log = fill(costly, tmp_path / "full.jsonl", {name: [1, 1, 1] for name in "abc"})
    assert [tuple(row)[1] for row in counts([costly], log)] == ["0", ""]
    assert [tuple(row)[1] for row in counts([costly], log, force=True)] == ["9", ""]


def test_comparison_says_whether_yours_agrees(table, tmp_path):
    errors = {"a": [1, 1, 1], "b": [2, 2.1, 1.9], "c": [3, 3, 3]}
    ours = fill(table, tmp_path / "ours", errors)
    yours = fill(table, tmp_path / "yours", errors | {"b": [2.05, 2, 2], "c": [4, 4, 4]})
    frame = comparison(table, "embedded", ours, yours)
    assert frame.agreement.tolist() == ["same", "agrees", "differs"]
    assert set(comparison(table, "embedded", ours).yours) == {"not measured"}


def test_changed_settings_no_longer_count(table, tmp_path):
    log = fill(table, tmp_path / "ours", {"a": [1, 1, 1], "b": [2, 2, 2], "c": [3, 3, 3]})
    (tmp_path / "table-1.toml").write_text(TABLE.replace("size = 3", "size = 4"))
    changed = load_table(tmp_path / "table-1.toml")
    assert set(comparison(changed, "embedded", log).ours) == {"not measured"}


def test_page(table, tmp_path):
    fill(table, tmp_path / "embedded.jsonl", {"a": [1, 1, 1], "b": [2, 2.1, 1.9], "c": [3, 3, 3]})
    page = results_page("p", [table], tmp_path, "p run")
    assert "`p run table-1 --scale embedded`" in page and "2.000 ± 0.248" in page and "not measured" in page
    assert page == results_page("p", [table], tmp_path, "p run")


def test_a_stand_in_shares_no_column_with_a_published_figure_unless_both_are_named(tmp_path):
    path = tmp_path / "table-1.toml"
    path.write_text(TABLE)
    log = fill(load_table(path), tmp_path / "embedded.jsonl", {"a": [1, 1, 2], "b": [2, 2, 2], "c": [3, 3, 3]})
    assert not comparison(load_table(path), "embedded", log).published.any()
    assert "published" not in results_page("p", [load_table(path)], tmp_path, "p run").split("scale paper")[0]
    named = TABLE.replace("metrics", 'published_on = "CIFAR-100"\nmetrics', 1)
    path.write_text(named.replace("size = 3", 'size = 3\nmeasured_on = "CIFAR-10 (JPEG)"'))
    assert comparison(load_table(path), "embedded", log).published[0] == "1.500"
    page = results_page("p", [load_table(path)], tmp_path, "p run")
    assert "error: published: CIFAR-100" in page and "error: measured: CIFAR-10 (JPEG)" in page


def test_a_run_with_caveats_has_a_line_of_its_own_and_taints_the_verdict(table, tmp_path):
    log = fill(table, tmp_path / "x.jsonl", {"a": [1, 1, 1.1], "b": [2, 2, 2.1], "c": [3, 3, 3]})
    changed = [record | {"scale": "paper"} for record in log.records()]
    paper = RunLog(tmp_path / "paper.jsonl")
    for run in table.runs("paper"):
        template = next(record for record in changed if record["row"] == run.row)
        caveats = ["3 files skipped"] if run.row == "a" else []
        paper.append(template | {"seed": run.seed, "settings_hash": run.key[-1], "caveats": caveats})
    frame = comparison(table, "paper", paper).set_index("row")
    assert frame.loc["a", ["published", "ours"]].tolist() == ["1.500", "not measured"]
    assert frame.loc["a (3 files skipped)", ["published", "ours"]].tolist() == ["", "1.000"]
    assert "3 files skipped" in str(judge(table, "paper", paper)[0])


def test_many_claims_are_corrected_by_holm(tmp_path):
    """By hand: with two degrees of freedom p = 1 - t / sqrt(t^2 + 2), t = 17.32 and 4.763."""
    path = tmp_path / "table-1.toml"
    head, claim = (
        TABLE.split("[[claim]]")[0],
        '[[claim]]\ntext = "{0} beats c"\nmetric = "error"\nbetter = "{0}"\nthan = "c"\n',
    )
    path.write_text(head + claim.format("a") + claim.format("b"))
    errors = {"a": [1.9, 2, 2.1], "b": [1.5, 1.9, 2.3], "c": [3, 3, 3]}
    log = fill(load_table(path), tmp_path / "embedded.jsonl", errors)
    first, second = judge(load_table(path), "embedded", log)
    assert first.verdict == "holds" and first.p_value == pytest.approx(0.003317, abs=1e-6)
    assert second.verdict == "holds" and second.p_value == pytest.approx(0.041357, abs=1e-5)
    path.write_text(head + claim.format("a") + claim.format("b") + claim.format("b"))
    assert [v.verdict for v in judge(load_table(path), "embedded", log)] == ["holds", "undecided", "undecided"]
    assert "holds by itself, but not after Holm's correction for 3 claims" in str(
        judge(load_table(path), "embedded", log)[1]
    )


def test_an_exact_claim_needs_no_interval(tmp_path):
    path = tmp_path / "table-1.toml"
    path.write_text(TABLE.replace("at_most = 1.5", "at_most = 1.5\nexact = true"))
    table = load_table(path)
    log = fill(table, tmp_path / "embedded.jsonl", {"a": [1.5, 1.5, 1.5], "b": [2, 2, 2], "c": [3, 3, 3]})
    for seeds in (1, 3):
        shorter = RunLog(tmp_path / f"{seeds}.jsonl")
        shorter.append(*(record for record in log.records() if record["seed"] < 20 + seeds))
        assert judge(table, "embedded", shorter)[1].verdict == "holds"
    shorter.path.rename(tmp_path / "embedded.jsonl")
    assert "(3 seeds)" in results_page("p", [table], tmp_path, "p run")
    (tmp_path / "1.jsonl").rename(tmp_path / "embedded.jsonl")
    assert "(1 seed)" in results_page("p", [table], tmp_path, "p run")


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "1 s"), (8, "8 s"), (90, "1 min 30 s"), (720, "12 min"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_durations_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_a_scale_may_take_its_settings_from_another_table(tmp_path):
    (tmp_path / "table-1.toml").write_text(TABLE.replace("size = 3", "size = 3\nepochs = 5"))
    (tmp_path / "table-2.toml").write_text(TABLE.replace("size = 3", 'epochs = 7\nsettings_of = "table-1"'))
    scale = load_table(tmp_path / "table-2.toml", ["size", "epochs", "method"]).scales["embedded"]
    assert scale.settings == {"size": 3, "epochs": 7} and scale.seeds == (20, 21, 22)
    (tmp_path / "table-3.toml").write_text(
        TABLE.replace("scale.embedded", "scale.mnist").replace("size = 3", 'settings_of = "table-1"')
    )
    with pytest.raises(ValueError, match="unknown scale 'mnist'"):
        load_table(tmp_path / "table-3.toml")
