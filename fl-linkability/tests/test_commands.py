"""Commands as users give them: runs, mistakes, what is missing, broken files, the wheel, the rehearsal."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shared_utils
from fl_linkability import catalogue, cli, experiments
from fl_linkability.catalogue import tables
from fl_linkability.data.femnist import write_femnist_like
from fl_linkability.data.reading import Reading
from fl_linkability.experiments import Experiment, load_settings
from fl_linkability.settings import PRESETS
from fl_linkability.tiny import write_tiny
from fl_linkability.train import make_fabric
from shared_utils.rehearsal import rehearse
from shared_utils.runlog import RunLog

FABRIC = make_fabric("cpu")
SMALL = replace(
    PRESETS["paper-embedded"], users=6, images_per_device=16, background=120, rounds=30, clients_per_round=4
)


def command(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "fl_linkability", *words], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(Path(cli.__file__).parents[2] / "tables")
    (tmp_path / "results").mkdir()
    return tmp_path


def test_every_table_at_smoke_scale_then_figures(project, capsys):
    run = cli.Run(scale="smoke", jobs=1)
    run()
    out = capsys.readouterr().out
    lines = (project / "runs" / "smoke.jsonl").read_text().splitlines()
    assert len(lines) == sum(len(t.runs("smoke")) for t in tables() if "smoke" in t.scales)
    assert all(len(line) < 20_000 for line in lines) and "Closed-world re-identification" in out
    run()
    assert (project / "runs" / "smoke.jsonl").read_text().splitlines() == lines
    cli.Run(("T7",), scale="smoke", dry_run=True)()
    assert "expected time" in capsys.readouterr().out
    embedded = [json.loads(line) for line in lines]
    by_row = {(t.id, row.name): t for t in tables() for row in t.rows if "embedded" in t.scales}
    log = RunLog(project / "results" / "embedded.jsonl")
    for record in embedded:  # stand in for recorded runs: the figures need their shape, not their size
        table = by_row[record["table"], record["row"]]
        wanted = table.runs("embedded", [record["row"]], [20])[0]
        log.append(record | {"scale": "embedded", "seed": 20, "settings_hash": wanted.key[-1]})
    cli.Tables()()
    page = (project / "results" / "RESULTS.md").read_text()
    assert "## Claims by cluster bootstrap over users" in page and "PIPA, random, MLP" in page
    drawn = {path.stem for path in (project / "results" / "figures").glob("*.png")}
    assert drawn == {"figure-12", "figure-8", "F3", "T5", "table-5", "figure-5", "figure-6"}


def test_train_then_attack_from_the_command_line(tmp_path):
    folder = str(tmp_path / "run")
    flags = ("--users", "5", "--images-per-device", "12", "--background", "100", "--rounds", "20")
    trained = command("train", "--output", folder, "paper-embedded", *flags, "--attack", "paper-knn")
    assert trained.returncode == 0, trained.stderr
    attacked = command("attack", folder, "--attack", "paper-knn", "--layers", "fc2")
    assert json.loads(attacked.stdout)["mAP_macro"] == json.loads(trained.stdout)["mAP_macro"]
    assert load_settings(Path(folder))[0].users == 5
    mistyped = command("attack", folder, "--measure", "all-pairs", "--attack", "paper-siames")
    assert mistyped.returncode == 2 and "attack must be one of" in mistyped.stderr


def test_mistakes_end_with_one_line(project, monkeypatch, capsys):
    for words, message in (
        (["run", "table-9"], "unknown table 'table-9'; the tables are"),
        (["attack", "none"], "none: no federation here (settings.json is missing)"),
        (
            ["run", "table-3", "--scale", "mnist", "--jobs", "1", "--data-root", "nowhere"],
            "MNIST (nowhere/MNIST/raw): fl-linkability data",
        ),
        (["run", "--scale", "large"], "no table has a scale 'large'"),
    ):
        monkeypatch.setattr(sys, "argv", ["fl-linkability", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr().err
        assert stop.value.code == 2 and message in told and "Traceback" not in told


def test_all_that_is_missing_is_told_before_anything_is_trained(project, monkeypatch, capsys):
    write_tiny(project / "data")
    shutil.rmtree(project / "data" / "openimages")
    monkeypatch.setattr(experiments, "execute", lambda *a, **k: pytest.fail("something was run"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(project / "none"))
    words = ["run", "table-3", "table-4", "--scale", "paper", "--jobs", "1", "--data-root", str(project / "data")]
    for more, code in ((["--dry-run"], None), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["fl-linkability", *words, *more])
        if code is None:
            cli.main()
        else:
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == code
        told = " ".join("".join(capsys.readouterr()).split())
        assert "OpenImages by author" in told and "ImageNet weights" in told and "data --download" in told
        assert "PIPA (" not in told and ("57 d" in told) == (code is None)
    assert not (project / "runs").exists()


def test_a_truncated_photo_is_one_line_or_is_left_out_and_told(tmp_path, capsys, monkeypatch):
    write_tiny(tmp_path / "data")
    broken = tmp_path / "data/csv/Jürgen 3/phone 0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    small = ["--no-pretrained", "--rounds", "1", "--clients-per-round", "4", "--side", "32", "--measure", "utility"]
    words = ["train", "--output", str(tmp_path / "out"), "--data-root", str(tmp_path / "data")]
    for verb in ([*words, "photos-head", *small], ["data", "verify", "--data-root", str(tmp_path / "data")]):
        monkeypatch.setattr(sys, "argv", ["fl-linkability", *verb])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr().err
        assert stop.value.code == 1 and "phone 0.jpg: " in told and "--skip-broken" in told and told.count("\n") == 1
    settings = replace(PRESETS["photos-head"], pretrained=False, rounds=1, clients_per_round=4, side=32)
    run = Experiment(settings, 0, Reading(tmp_path / "data", skip_broken=True), FABRIC)
    outcome = run.measure(replace(settings, measure="utility"))
    assert outcome.caveats == ["1 files skipped", "random weights in place of pretrained ones"]
    assert run.bundle.n_classes == 3 and run.bundle.users.n_devices == 21  # the rare label; a third device
    sizes = [len(run.bundle.users.x), len(run.bundle.user_test[0]), len(run.bundle.background.x)]
    assert sum(sizes) == 10 * 2 * 6 + 6 + 30 - 1


def test_some_tables_are_rehearsed():
    """`make rehearse` does all; these are decoded, trained, attacked, recorded and printed."""
    found = rehearse(Path(cli.__file__).parents[2], ["table-6", "figure-4"])
    assert [each.table for each in found] == ["figure-4", "table-6"] and all(each.passed for each in found), found


def test_an_installed_wheel_has_the_tables(tmp_path):
    """As the build hook lays it out: tables and results in the package; runs go to the working directory."""
    root, site = Path(cli.__file__).parents[2], tmp_path / "site" / "fl_linkability"
    shutil.copytree(Path(cli.__file__).parent, site, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tables", "results"):
        shutil.copytree(root / name, site / name)
    (tmp_path / "work").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(shared_utils.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "fl_linkability", "run", "table-1", "--scale", "smoke", "--jobs", "1"],
        capture_output=True, text=True, cwd=tmp_path / "work", env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "runs" / "smoke.jsonl").exists() and not (site / "runs").exists()


def test_femnist_like_writers(tmp_path, write_mnist):
    write_mnist(tmp_path)
    write_femnist_like(tmp_path, tmp_path, n_writers=6, n_images=30)
    settings = replace(PRESETS["femnist-like"], users=4, images_per_device=8, rounds=2, clients_per_round=3, hidden=64)
    run = Experiment(settings, 0, Reading(tmp_path), FABRIC)
    assert run.bundle.users.n_users == 4 and len(run.simulation.updates) == 6 and run.simulation.faults == []
    x = run.bundle.users.x[:]
    assert 0 <= x.min() and x.max() <= 1 and x.mean() < 0.6, "ink is 1, as for FEMNIST"


def test_preview(tmp_path, capsys):
    cli.Data(data_root=tmp_path, preview=tmp_path / "p.png")()
    assert "FLAIR" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 1000


def test_the_public_names_are_there():
    import fl_linkability

    assert (fl_linkability.PRIOR, fl_linkability.ANONYMOUS) == (0, 1)
    named = set(fl_linkability.__all__) - {"PRIOR", "ANONYMOUS"}
    assert all(getattr(fl_linkability, name).__name__ == name for name in named)
    modules = {path.stem for path in Path(fl_linkability.__file__).parent.iterdir()}
    assert not modules & set(fl_linkability.__all__), "a module would hide the name"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fl_linkability.nothing  # noqa: B018
