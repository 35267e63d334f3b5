"""Small networks and settings that several test modules share."""

from dataclasses import replace

import pytest
import torch

from rl_adv_reward.models import Victim, mlp
from rl_adv_reward.settings import PRESETS

torch.set_num_threads(1)
SHAPE = (2, 10, 10)


def _victim(seed=0):
    torch.manual_seed(seed)
    return Victim(mlp(SHAPE, 3, 87 / 255))


def _small(**changes):
    return replace(PRESETS["smoke"], **changes)


@pytest.fixture
def victim():
    return _victim()


@pytest.fixture
def make_victim():
    return _victim


@pytest.fixture
def small():
    return _small
