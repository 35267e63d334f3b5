"""Table files, the command line, figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import cutmix_robustness
from cutmix_robustness import cli, experiments
from cutmix_robustness.experiments import tables
from cutmix_robustness.settings import PRESETS, Settings
from shared_utils.rehearsal import rehearse

PROJECT = Path(cli.__file__).parents[2]
TABLES = {table.id: table for table in tables()}


def settings_of(table, row, scale):
    return Settings(**TABLES[table].settings(TABLES[table].row(row), scale))


@pytest.mark.parametrize(
    "table, row, scale, preset",
    [
        ("table-5", "Baseline", "paper", "cifar100"),
        ("table-5", "CutMix", "paper", "cifar100-cutmix"),
        ("table-5", "Baseline", "embedded", "twowave"),
        ("table-5", "CutMix", "embedded", "twowave-cutmix"),
        ("table-5", "CutMix", "twowave", "twowave-cutmix"),
        ("table-5", "Baseline", "cifar10-jpeg", "cifar10-jpeg"),
        ("table-5", "CutMix", "cifar10-jpeg", "cifar10-jpeg-cutmix"),
        ("table-5", "Baseline", "cifar10-jpeg-short", "cifar10-jpeg-short"),
        ("table-3", "Baseline", "paper", "imagenet"),
        ("table-3", "CutMix", "paper", "imagenet-cutmix"),
        ("table-6", "ResNet-110 + CutMix", "paper", "resnet110-cutmix"),
        ("table-7", "Baseline", "paper", "cifar10"),
        ("table-7", "CutMix", "paper", "cifar10-cutmix"),
    ],
)
def test_tables_and_presets_agree(table, row, scale, preset):
    ours, theirs = settings_of(table, row, scale), PRESETS[preset]
    assert replace(ours, suites=theirs.suites) == theirs


def test_settings_printed_in_the_papers():
    baseline = settings_of("table-5", "Baseline", "paper")
    assert (baseline.epochs, baseline.batch_size, baseline.lr, baseline.milestones) == (300, 64, 0.25, (150, 225))
    assert baseline.weight_decay == 1e-4
    imagenet = settings_of("table-3", "CutMix", "paper")
    assert (imagenet.batch_size, imagenet.lr, imagenet.milestones) == (256, 0.1, (75, 150, 225)) and imagenet.prob == 1
    assert settings_of("table-3", "Cutout", "paper").cutout == 112
    assert settings_of("table-5", "Cutout + LS", "paper").label_smoothing == 0.1
    assert settings_of("table-5", "Cutout", "twowave").cutout == 8
    assert settings_of("table-R1", "CutMix + LS", "twowave").prob == 1.0
    cub = settings_of("table-9", "CUB: ResNet-50 + CutMix", "paper")
    assert (cub.epochs, cub.batch_size, cub.lr, cub.head_lr, cub.augment) == (600, 32, 0.001, 0.01, "wsol")


def test_every_row_has_valid_settings():
    for table in TABLES.values():
        for scale in table.scales:
            for run in table.runs(scale):
                Settings(**run.settings)


def test_published_figures_that_follow_from_each_other():
    rows = TABLES["table-R2"].rows
    for row in rows:
        p = row.published
        mce = (3 * p["noise_ce"] + 4 * (p["blur_ce"] + p["weather_ce"] + p["digital_ce"])) / 15
        average = sum(p[name] for name in experiments.AVERAGED) / 7
        assert mce == pytest.approx(p["mce"], abs=0.02) and average == pytest.approx(p["average_error"], abs=0.02)
    means = {row.name: row.published["ood_auroc"] for row in TABLES["table-12"].rows}
    for row in TABLES["table-A2-auroc"].rows:
        assert sum(row.published.values()) / 7 == pytest.approx(means[row.name], abs=0.11)
    for row in TABLES["table-R1"].rows:
        if row.name in means:
            detection = TABLES["table-A2-detection"].row(row.name).published
            error = 100 - sum(detection.values()) / 7
            assert error == pytest.approx(row.published["ood_detection_error"], abs=0.02)


def test_run_twice_runs_nothing_new_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(PROJECT / "tables")
    cli.Run(("table-5",), scale="smoke", rows=("Baseline",), jobs=1, precision="bf16-mixed")()
    run = cli.Run(("table-2", "table-5"), scale="smoke", rows=(), jobs=1)
    run()
    lines = (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines()
    assert [json.loads(line)["precision"] for line in lines] == ["bf16-mixed"] + 6 * ["32-true"]
    assert len(lines) == 7 and json.loads(lines[-1])["dataset"]["train"]["sha256"]
    assert "CutMix lowers the error of the baseline" in capsys.readouterr().out
    run()
    assert (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines() == lines
    cli.Run(("table-5",), scale="smoke", dry_run=True)()
    assert "0" in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    for line in lines:
        record = json.loads(line)
        for scale in ("embedded", "twowave"):
            if scale in TABLES[record["table"]].scales:
                (run, *_) = TABLES[record["table"]].runs(scale, [record["row"]])
                written = record | {"scale": scale, "settings_hash": run.key[-1], "seed": run.seed}
                with open(tmp_path / "results" / f"{scale}.jsonl", "a") as file:
                    file.write(json.dumps(written) + "\n")
    cli.Tables()()
    page = (tmp_path / "results" / "RESULTS.md").read_text()
    assert "not measured" in page and "14.470" in page and "figures/figure-5.png" in page
    drawn = {path.stem for path in (tmp_path / "results" / "figures").glob("*.png")}
    assert drawn == {"figure-2", "figure-3", "figure-5", "figure-R1", "robustness", "table-2", "corruptions"}


def test_train_then_eval_from_the_command_line(tmp_path, monkeypatch, capsys):
    def printed(*words):
        monkeypatch.setattr(sys, "argv", ["cutmix-robustness", *words])
        cli.main()
        return json.loads(capsys.readouterr().out)

    checkpoint = str(tmp_path / "m.pt")
    trained = printed(
        "train", "--output", checkpoint, "twowave-cutmix", "--epochs", "1", "--suites", "clean", "calibration", "ood"
    )
    evaluated = printed("eval", checkpoint, "--suites", "clean", "ood")
    assert evaluated["ood_auroc"] == trained["ood_auroc"] and "ece" in trained and "ece" not in evaluated


def test_a_table_is_rehearsed():
    """`make rehearse` does all; this one decodes CIFAR-100, trains, records, judges and draws."""
    (found,) = rehearse(PROJECT, ["figure-2"])
    assert found.passed, found.problem


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("run", "table-99"), 2, "unknown table 'table-99'; the tables are figure-2"),
        (("eval", "none.pt"), 2, "none.pt: checkpoint not found"),
        (("corrupt", "nowhere", "out", "--names", "fogg"), 2, "nowhere: no such folder"),
    ],
)
def test_mistakes_end_with_one_line(words, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cutmix-robustness", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "words, lines",
    [
        (("run", "table-5", "--scale", "paper", "--jobs", "1"), 7),  # CIFAR-100 and five sets of unknown inputs
        (("run", "table-A1", "--scale", "paper"), 2),
        (("train", "cifar10-jpeg"), 3),
    ],
)
def test_what_is_missing_is_listed_at_once_and_nothing_is_trained(words, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(PROJECT / "tables")
    root = ["--data-root", str(tmp_path / "nowhere")]
    words = [words[0], *root, *words[1:]] if words[0] == "train" else [*words, *root]
    monkeypatch.setattr(sys, "argv", ["cutmix-robustness", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == lines and said[0] == "cutmix-robustness: missing:"
    assert not (tmp_path / "runs").exists()


def test_captioning_is_left_out_of_a_run_of_all_tables():
    assert "table-A1" not in [table.id for table in experiments.built(TABLES.values(), "paper")]


def test_every_public_name_can_be_used():
    for name in cutmix_robustness.__all__:
        assert not isinstance(getattr(cutmix_robustness, name), ModuleType), name


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RuntimeError("epoch 1: the loss is NaN"), 1, "epoch 1: the loss is NaN"),
        (PermissionError(13, "Permission denied", "x.pt"), 1, "[Errno 13] Permission denied: 'x.pt'"),
        (KeyError("fc"), 1, "KeyError('fc')"),
    ],
)
def test_failures_end_with_one_line(error, code, message, monkeypatch, capsys):
    def fail(data_root):
        raise error

    monkeypatch.setattr("cutmix_robustness.data.inventory.inventory", fail)
    monkeypatch.setattr(sys, "argv", ["cutmix-robustness", "data"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code and capsys.readouterr().err == f"cutmix-robustness: {message}\n"


def test_data_lists_what_is_missing(tmp_path, capsys):
    cli.Data(data_root=tmp_path)()
    assert "CIFAR-100" in capsys.readouterr().out
