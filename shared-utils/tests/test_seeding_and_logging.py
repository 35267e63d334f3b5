"""Seeds, resumable RNG state, and silence where nobody looks."""

import io
import os
import random
import subprocess
import sys

import numpy as np
import torch

from shared_utils.logging import get_logger
from shared_utils.seeding import restore_rng_state, rng_state, seed_everything


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item(), np.random.standard_normal()


def test_same_seed_same_draws():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first


def test_state_survives_a_weights_only_file():
    seed_everything(3)
    draws()
    file = io.BytesIO()
    torch.save(rng_state(), file)
    expected = [draws() for _ in range(3)]
    file.seek(0)
    restore_rng_state(torch.load(file, weights_only=True))
    assert [draws() for _ in range(3)] == expected


def say(**environment):
    code = "from shared_utils.logging import *\nget_logger('x').info('hello')\nget_logger('x').warning('careful')\n"
    code += "with progress() as bar: bar.advance(bar.add_task('working', total=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_only_rank_0_says_info_and_no_bar_without_a_terminal():
    assert say().splitlines() == ["INFO x: hello", "WARNING x: careful"]
    assert say(RANK="1").splitlines() == ["WARNING x: careful"]


def test_the_log_goes_where_stderr_is_now(monkeypatch):
    logger = get_logger("moving")
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        logger.info("hello")
        assert sys.stderr.getvalue() == "INFO moving: hello\n"
        sys.stderr.close()
