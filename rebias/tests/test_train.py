"""Killed and continued, two processes, every task on small data of its real format, checkpoints, tables, commands."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rebias import cli, experiments
from rebias.data.dataset import Reading
from rebias.data.inventory import inventory
from rebias.evaluate import group_accuracy, group_summary, top1_accuracy, unbiased_accuracy_clusters
from rebias.experiments import Execution, build_method, evaluate_checkpoint, tables, train_and_evaluate
from rebias.settings import PRESETS, Settings
from rebias.tasks import TASKS
from rebias.train import fit, index_batches, load_checkpoint, make_fabric

FABRIC = make_fabric("cpu")

TRAINING = """
import sys, time
from dataclasses import replace
from pathlib import Path
from rebias.experiments import build_method
from rebias.settings import PRESETS
from rebias.tasks import TASKS
from rebias.train import fit, make_fabric
import torch
torch.set_num_threads(1)
settings = replace(PRESETS["digits"], epochs=3, penalty="hsic-shuffled", n_confusing=3)
task = TASKS["digits"](settings, 1, Path("."), make_fabric("cpu"))
method = build_method(task)
slow = lambda step: time.sleep(0.05) if sys.argv[2] == "slow" else None
curve = fit(method, task.train, 1, checkpoint=Path(sys.argv[1]), checkpoint_every=10, before_step=slow)
torch.save({"f": method.modules["f"].state_dict(), "curve": curve[-1]}, sys.argv[1] + ".done")
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
    time.sleep(1.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = load_checkpoint(tmp_path / "killed")["state"]["total"]
    assert 0 < reached < 3 * 37
    run_here(TRAINING, tmp_path / "killed", "fast")
    whole, killed = (torch.load(tmp_path / f"{name}.done", weights_only=True) for name in ("whole", "killed"))
    assert whole["curve"] == killed["curve"]
    assert all(torch.equal(whole["f"][name], killed["f"][name]) for name in whole["f"])


DISTRIBUTED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from rebias.experiments import build_method
from rebias.data.inventory import inventory
from rebias.evaluate import predict
from rebias.settings import PRESETS
from rebias.tasks import TASKS
from rebias.train import fit, make_fabric
torch.set_num_threads(1)
fabric = make_fabric("cpu")
trained = {}
for form in ("plain", "conditional"):
    settings = replace(PRESETS["toy"], epochs=3, n_g_nets=2, conditional=form == "conditional")
    task = TASKS["toy"](settings, 1, Path("."), fabric)
    method = build_method(task)
    fit(method, task.train, 1)
    logits, _ = predict(method.modules["f"], task.unbiased, fabric, batch_size=1000)
    weights = torch.cat([p.detach().flatten() for m in method.modules.values() for p in m.parameters()])
    trained[form] = {"weights": weights, "logits": logits}
if fabric.global_rank == 0:
    torch.save(trained, sys.argv[1])
"""


def test_two_ranks_equal_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    run_here(DISTRIBUTED, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, script, tmp_path / "two"], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for form in ("plain", "conditional"):
        torch.testing.assert_close(two[form]["weights"], one[form]["weights"], rtol=1e-3, atol=2e-5)
        assert one[form]["logits"].shape == two[form]["logits"].shape == (9000, 3)
        torch.testing.assert_close(two[form]["logits"], one[form]["logits"], rtol=1e-2, atol=1e-3)


def test_index_batches_share_a_global_batch():
    whole = index_batches(100, 8, 3, 1, 0, 1)
    halves = [index_batches(100, 8, 3, 1, rank, 2) for rank in (0, 1)]
    assert len(whole) == 12 and len(torch.cat(whole).unique()) == 96
    for batch, a, b in zip(whole, *halves, strict=True):
        assert sorted(torch.cat([a, b]).tolist()) == sorted(batch.tolist()) and len(a) == len(b) == 4
    assert not torch.equal(whole[0], index_batches(100, 8, 3, 2, 0, 1)[0])
    with pytest.raises(ValueError, match="7 training images do not fill a batch of 8"):
        index_batches(7, 8, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        index_batches(100, 8, 0, 0, 0, 3)


def small_task(**changes):
    settings = replace(PRESETS["digits"], epochs=1, eval_every=1, **changes)
    return TASKS["digits"](settings, 1, Path("."), FABRIC)


def test_a_checkpoint_of_another_run_or_damaged_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    train_and_evaluate(small_task(method="vanilla"), path)
    with pytest.raises(ValueError, match=r"checkpoint of another run \(different rho\)"):
        task = small_task(method="vanilla", rho=0.8)
        fit(build_method(task), small_task(method="vanilla").train, 1, checkpoint=path)
    with pytest.raises(ValueError, match=r"another run \(different rho, data\)"):
        train_and_evaluate(small_task(method="vanilla", rho=0.8), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")


def test_eval_repeats_what_train_printed(tmp_path):
    _, outcome = train_and_evaluate(small_task(method="rebias"), tmp_path / "c.pt")
    again, details = evaluate_checkpoint(tmp_path / "c.pt", Path("."), "cpu", Reading())
    assert details["group_matrix"] == outcome.details["group_matrix"]
    assert {name: outcome.metrics[name] for name in again} == again
    content = load_checkpoint(tmp_path / "c.pt")
    del content["modules"]["f"]["fc.bias"]
    torch.save(content, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="has no weights for f of rebias"):
        evaluate_checkpoint(tmp_path / "d.pt", Path("."), "cpu", Reading())


def test_a_full_disk_leaves_one_line_and_no_half_checkpoint(tmp_path, monkeypatch):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="c.pt: cannot be written .*failed; .* MB are free there.; make room") as error:
        train_and_evaluate(small_task(method="vanilla"), tmp_path / "c.pt")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_nan_stops_a_run_with_its_epoch():
    task = small_task(method="vanilla")
    task.train._colours[:] = float("nan")
    with pytest.raises(RuntimeError, match="epoch 1: a loss is NaN"):
        fit(build_method(task), task.train, 1)


def test_the_curve_holds_diagnostics():
    _, outcome = train_and_evaluate(small_task(method="rebias"), None)
    (point,) = outcome.details["curve"]
    wanted = {"unbiased_accuracy", "hsic", "sigma_f", "feature_norm", "aligned_cross_entropy", "f_cross_entropy"}
    assert wanted | {"conflicting_cross_entropy", "epoch", "g_hsic", "f_hsic"} <= point.keys()
    assert torch.tensor(outcome.details["group_matrix"]).shape == (10, 10)


# ---- tasks of the paper on small data of the same format --------------------------------------------------


def test_mnist_at_the_paper_s_size(tmp_path, write_mnist):
    write_mnist(tmp_path, n_train=48)
    settings = replace(PRESETS["mnist"], epochs=1, batch_size=16, rho=0.9)
    outcome = Execution(tmp_path)(vars(settings), 0)
    assert {
        "biased_accuracy",
        "unbiased_accuracy",
        "rho0_accuracy",
        "worst_group_accuracy",
        "hsic",
    } <= outcome.metrics.keys()
    assert outcome.dataset["train"]["shape"] == [48, 28, 28] and len(outcome.dataset["test"]) == 3


def test_the_test_sets_of_biased_mnist_have_their_own_rho(tmp_path, write_mnist):
    """biased: all aligned; unbiased: a tenth, as chance has it; rho0: none; whatever rho the training has."""
    write_mnist(tmp_path, n_test=200)
    task = TASKS["mnist"](replace(PRESETS["mnist"], rho=0.997), 0, tmp_path, FABRIC)
    shares = [(data.labels == data.bias).float().mean().item() for data in (task.biased, task.unbiased, task.rho0)]
    assert shares == pytest.approx([1.0, 0.1, 0.0])
    assert torch.equal(task.groups.labels[::10], task.biased.labels) and len(task.groups) == 2000


@pytest.mark.parametrize("method", ["rebias", "learnedmixin"])
def test_imagenet9_from_folders(tmp_path, monkeypatch, method, write_images):
    wnids = ["n02085620", "n01641577"]
    write_images(tmp_path / "imagenet" / "train", wnids)
    write_images(tmp_path / "imagenet" / "val", wnids, per_class=10)
    write_images(tmp_path / "imagenet-a", wnids, per_class=1)
    write_images(tmp_path / "imagenet-c" / "fog" / "3", wnids, per_class=1)
    lines = ["path,category,cluster1,cluster2"]
    lines += [f"{wnid}/ILSVRC_{i}.JPEG,x,{j},{j}" for j, wnid in enumerate(wnids) for i in range(10)]
    (tmp_path / "clusters.csv").write_text("\n".join(lines))
    from rebias.data import imagenet9

    table = imagenet9.read_clusters(tmp_path / "clusters.csv")
    monkeypatch.setattr(imagenet9, "read_clusters", lambda: table)
    settings = replace(
        PRESETS["imagenet9"], method=method, epochs=1, batch_size=4, pretrain_epochs=int(method == "learnedmixin")
    )
    outcome = Execution(tmp_path, Reading(workers=0))(vars(settings), 0)
    assert {
        "biased_accuracy",
        "unbiased_accuracy",
        "imagenet_a_accuracy",
        "imagenet_c_accuracy",
    } == outcome.metrics.keys()
    assert sum(map(sum, outcome.details["cluster_counts"])) == 20


def test_action_from_videos(tmp_path, monkeypatch, write_video):
    from rebias.data import action

    monkeypatch.setattr(action, "TEST_VIEWS", 2)
    header = "label,youtube_id,time_start,time_end\n"
    for folder, csv, videos, n in (
        ("kinetics", "train.csv", "train", 4),
        ("kinetics", "val.csv", "val", 1),
        ("mimetics", "mimetics.csv", ".", 1),
    ):
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        (root / csv).write_text(header + "".join(f"writing,v{i},0,3\n" for i in range(n)))
        for i in range(n):
            write_video(root / videos / "writing" / f"v{i}_000000_000003.mp4", frames=70)
    settings = replace(PRESETS["kinetics10"], epochs=1, batch_size=4, networks="small")
    outcome = Execution(tmp_path, Reading(workers=0))(vars(settings), 0)
    assert set(outcome.metrics) == {"biased_accuracy", "unbiased_accuracy"}
    assert outcome.dataset["test"][1]["name"] == "Mimetics-10"


# ---- metrics, tables, commands ----------------------------------------------------------------------------


def test_groups_by_hand():
    predictions, labels, bias = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    accuracy, counts = group_accuracy(predictions, labels, bias, 2, 2)
    assert counts.tolist() == [[1, 1], [0, 2]] and accuracy[0].tolist() == [1, 0] and accuracy[1, 1] == 0.5
    assert accuracy[1, 0].isnan()
    summary = group_summary(predictions, labels, bias, 2)
    assert summary == {
        "group_mean_accuracy": 50,
        "worst_group_accuracy": 0,
        "aligned_accuracy": 75,
        "conflicting_accuracy": 0,
    }
    with pytest.raises(ValueError, match="bias must lie in 0 .. 1, got 0 .. 2"):
        group_accuracy(predictions, labels, bias * 2, 2, 2)
    with pytest.raises(ValueError, match="must all be"):
        group_accuracy(predictions[:2], labels, bias, 2, 2)
    with pytest.raises(ValueError, match="clustering 0 has no cell of 10 images"):
        unbiased_accuracy_clusters(predictions, labels, bias[None])
    with pytest.raises(ValueError, match=r"clusters must be \(R, 4\)"):
        unbiased_accuracy_clusters(predictions, labels, bias)
    with pytest.raises(ValueError, match="empty set"):
        top1_accuracy(torch.zeros(0, 3), torch.zeros(0))


@pytest.mark.parametrize("table, preset", [("table-1", "mnist"), ("table-2", "imagenet9"), ("table-3", "kinetics10")])
def test_paper_scale_is_the_paper_s_preset(table, preset):
    chosen = next(each for each in tables() if each.id == table)
    row = next(row for row in chosen.rows_at("paper") if row.name.startswith("ReBias"))
    settings = Settings(**chosen.settings(row, "paper"))
    assert replace(settings, rho=PRESETS[preset].rho, eval_every=0) == PRESETS[preset]


def test_every_table_that_trains_rebias_has_the_frozen_random_g_at_every_scale():
    for table in tables():
        for scale in table.scales:
            rows = {row.name: table.settings(row, scale) for row in table.rows_at(scale)}
            trained = [name for name, s in rows.items() if s.get("method") == "rebias"]
            frozen = [name for name in trained if rows[name].get("n_g_update") == 0]
            assert bool(trained) == bool(frozen), (table.id, scale)


def test_table_1_at_paper_scale_has_both_orders():
    table = next(each for each in tables() if each.id == "table-1")
    for rho in ("0.999", "0.997", "0.995", "0.990"):
        f_first, g_first = (
            Settings(**table.settings(table.row(name), "paper"))
            for name in (f"ReBias, rho {rho}", f"ReBias, g first, rho {rho}")
        )
        assert f_first.order == "f-first" and g_first == replace(f_first, order="g-first")
        assert replace(g_first, rho=0.997, eval_every=0) == PRESETS["mnist-reference"]


def test_small_scales_are_the_small_presets():
    table = next(each for each in tables() if each.id == "table-1")
    for scale, preset in (("embedded", "digits"), ("mnist", "mnist-14")):
        settings = Settings(**table.settings(table.row("ReBias, rho 0.9"), scale))
        assert replace(settings, eval_every=0) == PRESETS[preset]


def rebias(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "rebias", *words], capture_output=True, text=True, cwd=cwd)


def test_run_twice_runs_nothing_new(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "PROJECT", tmp_path)
    (tmp_path / "tables").symlink_to(Path(cli.__file__).parents[2] / "tables")
    run = cli.Run(("figure-A1", "table-A1"), scale="smoke", jobs=1)
    run()
    lines = (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines()
    assert len(lines) == 10 and json.loads(lines[0])["dataset"]["train"]["sha256"]
    assert "531,210" in capsys.readouterr().out
    run()
    assert (tmp_path / "runs" / "smoke.jsonl").read_text().splitlines() == lines
    cli.Run(("figure-A1",), scale="smoke", dry_run=True)()
    assert "0" in capsys.readouterr().out


def test_train_then_eval_from_the_command_line(tmp_path):
    checkpoint = tmp_path / "m.pt"
    trained = rebias("train", "--output", str(checkpoint), "digits", "--epochs", "1")
    assert trained.returncode == 0, trained.stderr
    evaluated = rebias("eval", str(checkpoint))
    found = json.loads(evaluated.stdout)
    assert found["unbiased_accuracy"] == json.loads(trained.stdout)["unbiased_accuracy"]
    groups = [cell for row in found["group_matrix"] for cell in row]  # by digit and colour
    assert len(groups) == 100 and found["worst_group_accuracy"] == pytest.approx(100 * min(groups), abs=0.01)
    assert found["group_mean_accuracy"] == pytest.approx(sum(groups), abs=0.01)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("run", "table-9"), 2, "unknown table 'table-9'; the tables are"),
        (
            ("run", "table-1", "--scale", "mnist", "--jobs", "1", "--data-root", "nowhere"),
            2,
            "MNIST (nowhere/MNIST/raw/train-images-idx3-ubyte): rebias data --download",
        ),
        (("eval", "none.pt"), 2, "none.pt: checkpoint not found"),
    ],
)
def test_mistakes_end_with_one_line(words, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rebias", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == code and message in told and "Traceback" not in told


def test_data_lists_what_is_missing(tmp_path, capsys):
    cli.Data(data_root=tmp_path, preview=tmp_path / "p.png")()
    assert "MNIST" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 1000
    missing = {row[0]: row[-1] for row in inventory(tmp_path) if row[4] == "no"}
    assert missing["MNIST"] == "rebias data --download" and len(missing) == 7
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    assert "MNIST" not in {row[0] for row in inventory(tmp_path) if row[4] == "no"}
