"""The tables, their aggregates, and the commands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared_utils.tables import Run
from str_benchmark import cli, experiments
from str_benchmark.aggregate import failures_of_runs, mean_of_runs, runs_behind, subset_of_runs
from str_benchmark.data.inventory import inventory
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.names import EVALUATION_NAMES, IRREGULAR, REGULAR
from str_benchmark.experiments import tables
from str_benchmark.settings import PRESETS, Settings

# ---- tables --------------------------------------------------------------------------------------------


def test_scales_are_the_presets():
    by_id = {table.id: table for table in tables()}
    same = {
        ("table-8", "TPS-ResNet-BiLSTM-Attn (TRBA)", "paper"): PRESETS["paper"],
        ("training-data", "TPS-ResNet-BiLSTM-Attn (TRBA)", "paper"): PRESETS["paper"],
        ("training-data", "TPS-ResNet-BiLSTM-Attn, 20 %", "paper"): replace(PRESETS["paper"], data_fraction=0.2),
        ("table-9", "TRBA, fine-tuned", "paper"): replace(PRESETS["paper"], finetune=("validation",)),
        ("table-3", "CRNN, MJ", "paper"): replace(PRESETS["paper"], model="CRNN", train=("MJ",), ratios=(1,)),
        ("training-data", "None-VGG-None-CTC (half A, half B)", "embedded"): replace(
            PRESETS["digits"], data_fraction=0.5
        ),
        ("training-data", "None-VGG-None-CTC (A)", "embedded"): replace(PRESETS["digits"], train=("A",), ratios=(1,)),
        ("modules", "None-VGG-BiLSTM-CTC (CRNN)", "embedded"): replace(
            PRESETS["digits"], data_fraction=0.5, model="None-VGG-BiLSTM-CTC"
        ),
        ("modules", "None-VGG-None-CTC", "rendered"): PRESETS["words"],
        ("modules", "None-VGG-None-CTC", "smoke"): PRESETS["tiny"],
        ("cost", "TPS-ResNet-BiLSTM-Attn (TRBA)", "embedded"): replace(PRESETS["paper"], measure="cost"),
    }
    for (table, row, scale), expected in same.items():
        assert Settings(**by_id[table].settings(by_id[table].row(row), scale)) == expected, (table, row)
    for table in by_id.values():
        for scale in table.scales:
            for run in table.runs(scale):
                assert Settings(**run.settings).config.name in run.row or table.id not in ("table-8", "modules", "cost")
    fractions = {run.settings.get("data_fraction", 1.0) for run in by_id["table-10"].runs("paper")}
    assert fractions == {0.2, 0.4, 0.6, 0.8, 1.0} and len(by_id["table-8"].rows) == len(by_id["modules"].rows) - 1 == 24


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder with the tables."""
    root = Path(cli.__file__).parents[2]
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(root / "tables")
    return tmp_path


def test_run_twice_runs_nothing_new_and_aggregates_come_last(project, capsys, tmp_path_factory, monkeypatch):
    """As installed from a wheel: tables are in the package, run logs in the working directory."""
    (project / "__init__.py").touch()
    here = tmp_path_factory.mktemp("anywhere")
    monkeypatch.chdir(here)
    run = cli.Run(("failures", "modules", "training-data"), scale="smoke", jobs=1)
    run()
    lines = [json.loads(line) for line in (here / "runs" / "smoke.jsonl").read_text().splitlines()]
    assert [line["table"] for line in lines] == ["modules"] * 4 + ["training-data", "failures"]
    assert "two small models" in capsys.readouterr().out
    run()
    assert len((here / "runs" / "smoke.jsonl").read_text().splitlines()) == len(lines)
    cli.Run((), scale="smoke", dry_run=True)()
    assert "1" in capsys.readouterr().out
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(lines[0]["details"]["correct"].values())), np.uint8))
    assert len(bits) == 64 and bits.mean() * 100 == pytest.approx(lines[0]["metrics"]["total_accuracy"])


def test_aggregates_by_hand(project):
    from shared_utils.runlog import RunLog

    table = next(table for table in tables() if table.id == "table-8")
    log = RunLog(project / "paper.jsonl")
    shown = {"IC13_857": 40.0, "IC13_1015": 50.0, "IC15_1811": 60.0, "IC15_2077": 55.0}
    for number, run in enumerate(table.runs("paper", seeds=[1])):
        record = {"table": run.table, "row": run.row, "scale": "paper", "seed": 1, "settings_hash": run.key[-1]}
        hits = np.zeros(16, bool)
        hits[number % 12] = True
        bits = {name: np.packbits(hits).tobytes().hex() for name in EVALUATION_NAMES}  # IC13_857 is part of IC13_1015
        ruled = {"IC13_1015": {"IC13_857": [4, 3]}}
        details = {"correct": bits, "n": dict.fromkeys(bits, 16), "by_rule": ruled}
        metrics = {"irregular_accuracy": float(number)} | ({"blank_share": 80.0} if "CTC" in run.row else {})
        metrics |= shown
        log.append(record | {"metrics": metrics, "details": details, "caveats": ["small"]})

    def behind(seed, *of):
        asked = Run("table-2", "x", "paper", seed, {"of": ["table-8", *of]}, ())
        return runs_behind(tables(), [asked])

    tps = mean_of_runs(behind(1, "trans=TPS"), [log])
    assert tps.metrics == {"irregular_accuracy": np.mean(range(12, 24))} | shown  # attention has no blanks
    assert len(tps.details["of"]) == 12 and tps.caveats == ["small"]
    found = subset_of_runs(behind(1), [log], "IC13_857", "IC13_1015")
    assert found.metrics == {"part": 75, "whole": 50, "effect": 25} and found.details["by_rule"]  # the rule, not 40
    assert found.caveats == ["small", "IC13_857: 4 words are left"]
    listed = subset_of_runs(behind(1), [log], "IC15_1811", "IC15_2077")
    assert listed.metrics == {"part": 60, "whole": 55, "effect": 5} and listed.details["n"] == [16, 16]
    absent = subset_of_runs(behind(1), [log], "IC13_1015", "IC13_1095")
    assert absent.metrics == {} and absent.caveats == ["IC13_1095 was not there"]
    failures = failures_of_runs(behind(1), [log])
    assert list(failures.details["sets"]) == [*REGULAR, *IRREGULAR]  # each word once
    assert failures.metrics["missed_by_all"] == 25 and failures.details["sets"]["SVT_647"]["missed"] == [12, 13, 14, 15]
    with pytest.raises(ValueError, match="seed 2 is still missing: run table-8 at scale paper first"):
        mean_of_runs(behind(2, "trans=TPS"), [log])
    with pytest.raises(ValueError, match="expected a stage's choice such as trans=TPS"):
        behind(1, "trans=STN")
    with pytest.raises(ValueError, match="there is no table 'table-7'"):
        runs_behind(tables(), [Run("table-2", "x", "paper", 1, {"of": ["table-7"]}, ())])


# ---- commands ------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["str-benchmark", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_help_is_quick_because_torch_stays_out():
    code = "import sys, str_benchmark.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_from_a_list_of_images_to_a_reading(tmp_path, program):
    assert program("render", tmp_path / "r", "--n", 40, "--alphabet", "0123456789", "--fonts", "sans")[0] == 0
    code, _, errors = program("render", tmp_path / "r", "--n", 1, "--fonts", "sans")
    assert code == 2 and "already exists" in errors
    data = LMDBDataset(tmp_path / "r", filter="off")
    assert len(data) == 40
    lines = []
    for i in range(20):
        picture, label = data[i]
        picture.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png\t{label}")
    (tmp_path / "gt.txt").write_text("\n".join(lines))
    assert (
        program("create-lmdb", tmp_path / "gt.txt", tmp_path / "own", "--images", tmp_path)[1] == "20 words written\n"
    )
    assert "20 of 20 kept" in program("data", "inspect", tmp_path / "own")[1]
    words = ("train", "--output", tmp_path / "m.pt", "--device", "cpu", "--workers", 0, "tiny", "--max-length", 8)
    sets = ("--train", tmp_path / "own", "--ratios", 1, "--evaluate", tmp_path / "own", "--regular", tmp_path / "own")
    code, trained, errors = program(*words, *sets, "--irregular", "--no-resident", "--steps", 5)
    assert code == 0, errors
    assert json.loads(trained)["n"]["total_accuracy"] == 20
    for engine in ("torch", "onnxruntime"):
        words = tmp_path / f"{engine}.csv"
        evaluated = json.loads(program("eval", tmp_path / "m.pt", "--engine", engine, "--words", words)[1])
        assert evaluated["total_accuracy"] == json.loads(trained)["total_accuracy"] == evaluated["combined_accuracy"]
    printed = program("compare", tmp_path / "torch.csv", tmp_path / "onnxruntime.csv")[1].splitlines()
    assert len(printed) == 3 and printed[2].split()[-3:] == ["0", "0", "1"]  # nothing differs
    code, read, _ = program(
        "predict", tmp_path / "m.pt", tmp_path / "0.png", "--characters", "--sheet", tmp_path / "s.png"
    )
    assert code == 0 and read.count("\t") == 3 and (tmp_path / "s.png").stat().st_size > 1000
    assert program("export", tmp_path / "m.pt", tmp_path / "m.onnx")[0] == 0
    assert (tmp_path / "m.onnx").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("run", "table-99"), 2, "unknown table 'table-99'; the tables are cost"),
        (("run", "--scale", "mnist"), 2, "no table has a scale 'mnist'"),
        (
            ("run", "table-2", "--scale", "paper", "--data-root", "nowhere"),
            2,
            "nowhere/evaluation/CUTE80): put the released",
        ),
        (("data", "inspect", "nowhere"), 2, "neither a set"),
        (("predict", "none.pt", "x.png"), 2, "x.png: file or folder not found"),
        (("predict", "english_g2"), 2, "expected one or more files"),
        (("eval", "str.pt", "--height", "64"), 2, "name its network with --model"),
        (("run", "modules", "--scale", "smoke", "--no-such-flag"), 2, "no-such-flag"),
    ],
)
def test_mistakes_end_with_one_line(program, project, words, code, message):
    found, _, errors = program(*words)
    assert found == code and message in errors and "Traceback" not in errors


def test_the_program_as_a_process(tmp_path):
    command = [sys.executable, "-m", "str_benchmark", "eval", str(tmp_path / "none.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"str-benchmark: {tmp_path / 'none.pt'}: checkpoint not found\n"


def test_verbs_that_print(project, capsys, tmp_path):
    missing = {row[0]: row[-1] for row in inventory(tmp_path / "none")}
    assert missing["MJ"] == "put the released set there"
    cli.Data(data_root=tmp_path / "none")()
    printed = capsys.readouterr().out
    assert all(name[:6] in printed for name in missing)  # long names are wrapped
    cli.Frontier()()
    assert capsys.readouterr().out.count("True") == 10
    with pytest.raises(ValueError, match="expected nothing, inspect and sets, or verify"):
        cli.Data(("look",))()
    cli.Tables()()
    page = (project / "results" / "RESULTS.md").read_text()
    assert "Recomputed from the published figures" in page and "Not measured" in page
    assert (project / "results" / "figures" / "figure-4.png").stat().st_size > 10_000


def test_the_sheet_of_words_is_named_wherever_the_runs_are(tmp_path, monkeypatch, capsys):
    """Those of an installed package are in the working directory, not below the package."""
    from str_benchmark import cli, figures

    monkeypatch.setattr(figures, "draw_words", lambda *_: [("exit", "exlt")])
    monkeypatch.setattr(cli, "runs_folder", lambda project: tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    cli._show_words([], None)
    assert capsys.readouterr().out == "label read: exit exlt\nnext to their images: runs/words.png\n"
