"""Small files in the formats of the real data sets."""

import math
from functools import partial

import pytest
import torch

from rebias.data import tiny


def _closed_form(network):
    """The weights that the fixtures of the released networks were made with; float64, in eval mode."""
    state = network.state_dict()
    for j, (name, value) in enumerate(state.items()):
        k = torch.arange(value.numel(), dtype=torch.float64)
        if value.ndim > 1:
            new = torch.sin(0.37 * k + j) / math.sqrt(value[0].numel())
        elif name.endswith("running_var"):
            new = 1 + 0.1 * torch.cos(0.3 * k)
        elif name.endswith("weight"):
            new = 1 + 0.1 * torch.cos(0.3 * k + j)
        elif value.ndim == 1:
            new = 0.1 * torch.cos(0.11 * k + j)
        else:
            continue
        state[name] = new.view(value.shape)
    network.double().load_state_dict(state)
    return network.eval()


@pytest.fixture
def closed_form():
    return _closed_form


@pytest.fixture
def write_mnist():
    return partial(tiny.write_mnist, n_train=40, n_test=20)


@pytest.fixture
def write_images():
    return partial(tiny.write_images, per_class=2)


@pytest.fixture
def write_video():
    return tiny.write_video
