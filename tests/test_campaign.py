"""The campaign on a small workspace whose runs take half a second and save their state when they are interrupted."""

import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import campaign  # noqa: E402
from shared_utils.tables import load_tables  # noqa: E402

TABLE = """
title = "t"
source = "none"
metrics = { value = "higher" }
[scale.paper]
seeds = [20, 21, 22]
steps = 10
[[row]]
name = "a"
[[row]]
name = "b"
"""

# Ten steps a run; the number of steps done is kept at an interrupt, and the metric is in how many pieces it was run.
PROGRAM = """
import json, os, signal, sys, time
from itertools import takewhile
from pathlib import Path
if Path("broken").exists():
    sys.exit("no such data set")
if Path("killed").exists():
    os.kill(os.getpid(), signal.SIGKILL)  # as when the memory is full
rows = sys.argv[sys.argv.index("--rows") + 1:] if "--rows" in sys.argv else ["a", "b"]
seeds = [int(each) for each in takewhile(str.isdigit, sys.argv[sys.argv.index("--seeds") + 1:])]
log = Path("runs/paper.jsonl")
done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
for record in json.loads(Path("plan.json").read_text()):
    if record["row"] not in rows or record["seed"] not in seeds or record in [{**each, "metrics": 0} for each in done]:
        continue
    state = Path(f"runs/{record['row']}-{record['seed']}.json")
    steps, pieces = json.loads(state.read_text()) if state.exists() else (0, 0)
    try:
        while steps < 10:
            time.sleep(float(Path("pace").read_text()))
            steps += 1
    except KeyboardInterrupt:
        state.write_text(json.dumps([steps, pieces + 1]))
        sys.exit(130)
    with open(log, "a") as file:
        file.write(json.dumps(record | {"metrics": {"value": pieces + 1}}) + "\\n")
"""


@pytest.fixture
def root(tmp_path):
    package = tmp_path / "one" / "src" / "one"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    (tmp_path / "one" / "tables").mkdir()
    (tmp_path / "one" / "tables" / "table-1.toml").write_text(TABLE)
    (tmp_path / "one" / "pace").write_text("0.01")
    (table,) = load_tables(tmp_path / "one" / "tables")
    names = ("table", "row", "scale", "seed", "settings_hash")
    plan = [dict(zip(names, run.key, strict=True)) | {"metrics": 0} for run in table.runs("paper")]
    (tmp_path / "one" / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "workspace.toml").write_text('[[project]]\nname = "one"\npackage = "one"\nstatus = "built"\n')
    return tmp_path


def entries(root, **given):
    body = {"project": "one", "tables": ["table-1"], "scale": "paper", "minutes": 0.02, "why": '"it tells"'} | given
    (root / "campaign.toml").write_text(
        "[[entry]]\n"
        + "\n".join(f"{key} = {value if key == 'why' else json.dumps(value)}" for key, value in body.items())
    )
    return campaign.read_entries(root / "campaign.toml", root)


def found(root):
    log = root / "one" / "runs" / "paper.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_runs_what_is_missing_and_shows_it(root, capsys):
    rows_of_one = entries(root, rows=["a"], seeds=[20])
    assert campaign.campaign(rows_of_one, 60) == 0
    assert [(each["row"], each["seed"]) for each in found(root)] == [("a", 20)]
    assert campaign.campaign(entries(root, together=2), 60) == 0
    assert sorted((each["row"], each["seed"]) for each in found(root)) == [(r, s) for r in "ab" for s in (20, 21, 22)]
    assert "table-1" in capsys.readouterr().out
    assert campaign.campaign(entries(root), 60) == 0 and len(found(root)) == 6
    assert "seed" not in capsys.readouterr().out


def test_one_unit_may_have_all_seeds(root, capsys):
    (entry,) = entries(root, jobs=2)
    assert entry.units == [[20, 21, 22]]
    assert campaign.campaign([entry], 60) == 0 and len(found(root)) == 6
    assert "seed 20 21 22: 6 runs in" in capsys.readouterr().out


def test_entries_run_side_by_side_as_far_as_their_shares_allow(root):
    (root / "one" / "pace").write_text("0.1")  # a second a run
    lists = [entries(root, rows=["a"], seeds=[seed], together=together)[0] for seed, together in ((20, 2), (21, 2))]
    started = time.monotonic()
    campaign.campaign(lists, 60)
    assert time.monotonic() - started < 2
    assert [each["seed"] for each in found(root)] == [20, 21]
    alone = [entries(root, rows=["b"], seeds=[seed], together=together)[0] for seed, together in ((20, 2), (21, 1))]
    started = time.monotonic()
    campaign.campaign(alone, 60)
    assert time.monotonic() - started > 2


def test_what_is_recorded_is_not_run_again(root):
    campaign.campaign(entries(root, seeds=[20]), 60)
    (root / "one" / "results").mkdir()
    (root / "one" / "runs" / "paper.jsonl").rename(root / "one" / "results" / "paper.jsonl")
    campaign.campaign(entries(root, seeds=[20]), 60)
    assert not found(root)


def test_starts_nothing_that_does_not_fit(root, capsys):
    assert campaign.campaign(entries(root, minutes=5), 10) == 0
    assert not found(root) and "left for a longer campaign (5 min" in capsys.readouterr().out


def test_stops_at_the_limit_and_goes_on_next_time(root, capsys):
    (root / "one" / "pace").write_text("0.6")  # six seconds a run, where 0.6 were listed
    started = time.monotonic()
    assert campaign.campaign(entries(root, seeds=[20], rows=["a"]), 2) == 0
    assert time.monotonic() - started < 8
    assert not found(root) and "interrupted at the limit" in capsys.readouterr().out
    (root / "one" / "pace").write_text("0.01")
    assert campaign.campaign(entries(root, seeds=[20], rows=["a"]), 60) == 0
    assert [each["metrics"]["value"] for each in found(root)] == [2]


def test_a_unit_that_fails_is_told_and_the_rest_goes_on(root, capsys):
    (root / "one" / "broken").touch()
    assert campaign.campaign(entries(root), 60) == 1
    assert capsys.readouterr().err.count("no such data set") >= 3


def test_a_unit_that_somebody_else_kills_has_failed(root, capsys):
    (root / "one" / "killed").touch()
    assert campaign.campaign(entries(root, seeds=[20]), 60) == 1
    out, err = capsys.readouterr()
    assert "exit code -9" in err and "interrupted" not in out


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("project", "two", "campaign.toml, entry 1: no built project 'two'; built: one"),
        ("scale", "papers", "has no table-1 at scale papers; tables at this scale: none"),
        ("tables", ["table-9"], "has no table-9 at scale paper; tables at this scale: table-1"),
        ("hours", 1, "'hours'"),
        ("rows", ["c"], "'c'"),
    ],
)
def test_a_list_with_a_mistake_is_refused(root, key, value, told):
    with pytest.raises(ValueError, match=told):
        entries(root, **{key: value})


def test_a_list_that_lacks_something_is_refused(root):
    (root / "mine.toml").write_text('[[entry]]\nproject = "one"\ntables = ["table-1"]\nscale = "paper"\nwhy = "x"\n')
    with pytest.raises(ValueError, match="mine.toml, entry 1: minutes is missing"):
        campaign.read_entries(root / "mine.toml", root)
    (root / "mine.toml").write_text('[[entrys]]\nproject = "one"\n')
    with pytest.raises(ValueError, match=r"mine.toml: expected \[\[entry\]\] and nothing else, got entrys"):
        campaign.read_entries(root / "mine.toml", root)


def test_the_list_of_this_workspace_names_what_exists():
    assert all(
        entry.why and entry.missing(entry.units[0]) is not None
        for entry in campaign.read_entries(campaign.ROOT / "campaign.toml")
    )
