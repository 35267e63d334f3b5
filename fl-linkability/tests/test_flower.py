"""Flower in process, on Ray, and deployed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fl_linkability.store import UpdateStore

# ---- Flower ----------------------------------------------------------------------------------------------------


def test_the_server_of_flwr_run_starts_from_the_pretrained_weights(monkeypatch, tmp_path):
    from fl_linkability import flower, flower_app

    started = []
    monkeypatch.setattr(flower, "run_on_grid", lambda federation, state, grid: started.append(state))
    for epochs in (0, 3):
        settings = json.dumps({"users": 2, "rounds": 2, "clients_per_round": 2, "pretrain_epochs": epochs})
        config = {
            "preset": "paper-embedded",
            "settings": settings,
            "seed": 0,
            "data-root": "",
            "output": tmp_path / str(epochs),
        }
        flower_app.main(None, SimpleNamespace(run_config=config))
    experiment = flower_app._experiment(*(config[name] for name in ("preset", "settings", "seed", "data-root")))
    new, pretrained = started
    assert all(torch.equal(pretrained[name], value) for name, value in experiment.initial().items())
    assert not any(torch.equal(pretrained[name], value) for name, value in new.items())


def test_flower_is_quiet_towards_the_world():
    from fl_linkability import flower

    for name, value in flower.ENVIRONMENT.items():
        assert os.environ[name] == value
    assert Path(os.environ["FLWR_HOME"]) != Path.home() / ".flwr"


def test_the_grid_keeps_flower_s_contract(bundle):
    from flwr.app import Message, RecordDict

    from fl_linkability import flower
    from fl_linkability.flower_grid import InProcessGrid

    grid = InProcessGrid(flower.make_client_app(None), 3)
    assert flower.find_devices(grid, 3) == {0: 1, 1: 2, 2: 3}
    ids = list(grid.push_messages([Message(RecordDict(), 2, "query"), Message(RecordDict(), 3, "evaluate")]))
    first, second = grid.pull_messages(ids)
    assert first.content["metrics"]["partition-id"] == 1 and first.metadata.src_node_id == 2
    assert second.has_error() and "No evaluate function" in second.error.reason and list(grid.pull_messages(ids)) == []
    assert grid.create_message(RecordDict(), "query", 1, "g").metadata.group_id == "g"
    with pytest.raises(RuntimeError, match="3 of 4 nodes are connected"):
        flower.find_devices(grid, 4, wait=0.1)


RAY = """
import torch
torch.set_num_threads(1)
from fl_linkability.data.styled import make_digits_users
from fl_linkability.engines import simulate
from fl_linkability.federation import FedAvgConfig
from fl_linkability.mitigations import GaussianNoise
from fl_linkability.models import MLP
from importlib.metadata import version
import numpy as np
bundle = make_digits_users(0, n_users=2, n_per_device=12, background_size=120)
a, b = (simulate(bundle, MLP, FedAvgConfig(2, 3), GaussianNoise(0.01), e) for e in ("batched", "flower-ray"))
np.testing.assert_allclose(a.updates.delta, b.updates.delta, rtol=0, atol=1e-5)
assert b.engine == {"name": "flower-ray", "flwr": version("flwr"), "nodes": 4}, b.engine
print("equal")
"""


@pytest.mark.slow
def test_flower_on_ray_equals_batched(tmp_path):
    environment = os.environ | {"FLWR_HOME": str(tmp_path / "flwr"), "HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", RAY], capture_output=True, text=True, timeout=400, env=environment)
    assert "equal" in done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "home" / ".flwr").exists()


@pytest.mark.skipif(
    os.environ.get("FL_LINKABILITY_DEPLOYMENT") != "1",
    reason="starts a SuperLink and four SuperNodes (a minute or more): set FL_LINKABILITY_DEPLOYMENT=1",
)
def test_flwr_run_against_a_superlink(bundle, tmp_path):
    def free_port():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return str(probe.getsockname()[1])

    tools, port, home = Path(sys.executable).parent, free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1", "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    children = []

    def start(name, *words):
        log = open(tmp_path / f"{name}.log", "w")
        children.append(
            subprocess.Popen(
                [tools / words[0], *words[1:]], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        )

    try:
        start("link", "flower-superlink", "--insecure", "--port", port, "--disable-runtime-dependency-installation")
        time.sleep(10)
        for device in range(4):
            node = ("--node-config", f"partition-id={device}", "--port", free_port())
            start(f"node{device}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", *node)
        settings = json.dumps({"users": 2, "rounds": 2, "clients_per_round": 2})
        app = Path(__file__).parents[1] / "flower-app"
        words = ["run", app, "here", "--stream", "--run-config", f"settings='{settings}' output=\"{tmp_path / 'out'}\""]
        subprocess.run([tools / "flwr", *words], env=environment, check=True, capture_output=True, timeout=500)
    finally:
        for child in children:
            os.killpg(child.pid, signal.SIGTERM)
    from fl_linkability.data.reading import Reading
    from fl_linkability.experiments import Experiment, load_settings
    from fl_linkability.train import make_fabric

    here = Experiment(load_settings(tmp_path / "out")[0], 0, Reading(tmp_path), make_fabric("cpu")).simulation.updates
    there = UpdateStore.open(tmp_path / "out" / "updates")
    np.testing.assert_allclose(there.delta, here.delta, rtol=0, atol=1e-5)
    assert (there.index == here.index).all()
