"""Two gloo processes: nothing is shared unless asked, and what is shared is right."""

import subprocess
import sys
from pathlib import Path

NAMES = ("fixtures", "shards", "one_caller", "disagreement", "metric")


def test_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(Path(__file__).parent / "two_ranks.py"), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        assert done.stdout.count(f"{name}: rank") == 2
