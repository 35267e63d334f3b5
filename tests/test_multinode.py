"""Every training project's processes find each other under torchrun and under Slurm, on two nodes of one process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# One process and one process group for all projects, since importing torch and Fabric is what takes the time.
PROGRAM = """
import importlib, sys
import torch
import torch.distributed as dist

for package in sys.argv[1:]:
    fabric = importlib.import_module(f"{package}.train").make_fabric("cpu")
    total = fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum")
    shape = f"{fabric.world_size} processes, {fabric.strategy.num_nodes} nodes"
    if fabric.global_rank == 1:
        print(package, shape, f"sum {total:.0f}", flush=True)
dist.destroy_process_group()
"""
PACKAGES = [
    name
    for name in (
        "cutmix_robustness",
        "wsol_eval",
        "str_benchmark",
        "satrn",
        "rebias",
        "hib_ndigit_mnist",
        "fl_linkability",
    )
]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(rank: int, port: str) -> tuple[list[str], dict[str, str]]:
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
    command = ["-m", "torch.distributed.run", *options, "--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, *command], {}


def srun(rank: int, port: str) -> tuple[list[str], dict[str, str]]:
    """What srun sets in the two tasks of `srun --nodes 2 --ntasks-per-node 1`."""
    slurm = {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}
    slurm |= {
        "PROCID": str(rank),
        "LOCALID": "0",
        "NODEID": str(rank),
        "STEP_NODELIST": "127.0.0.1",
        "NODELIST": "127.0.0.1",
    }
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [sys.executable], {f"SLURM_{name}": value for name, value in slurm.items()} | places


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_two_nodes_of_one_process_each_train_together(launcher, tmp_path):
    script = tmp_path / "join.py"
    script.write_text(PROGRAM)
    port = free_port()
    nodes = []
    for rank in range(2):
        command, settings = launcher(rank, port)
        environment = os.environ | settings | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(tmp_path / f"node{rank}.log", "w") as log:
            nodes.append(
                subprocess.Popen(
                    [*command, str(script), *PACKAGES], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + 600
    while any(node.poll() is None for node in nodes) and not any(node.poll() for node in nodes):
        time.sleep(0.2)
        if time.monotonic() > deadline:
            break
    for node in nodes:  # where one failed the other would wait for it
        node.kill()
    codes = [node.wait() for node in nodes]
    said = "".join((tmp_path / f"node{rank}.log").read_text() for rank in range(2))
    assert codes == [0, 0], said
    for package in PACKAGES:
        assert f"{package} 2 processes, 2 nodes sum 3" in said, said
