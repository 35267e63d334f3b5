"""Replaying a step, with a stand-in for CUDA's graphs; each project's test_cuda.py trains with the real ones."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from shared_utils.cuda_graph import WARMUP, StepGraph, load_optimizer, set_learning_rate


@pytest.fixture
def replays(monkeypatch):
    """CUDA's names, on a machine without it; a replay computes the step that was captured once more."""
    counted = []

    class Graph:
        def replay(self):
            counted.append(1)
            self.work()

    @contextmanager
    def capture(graph):
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    return counted


def test_every_call_is_one_step_on_its_own_inputs(replays):
    total, last = torch.zeros(2), torch.zeros(2)

    def step(x, y):
        total.add_(x * y)
        return last.copy_(x)

    graph = StepGraph(step)
    for number in range(WARMUP + 4):
        before = graph.graph
        given = torch.full((2,), float(number)), torch.full((2,), 2.0)
        if number == WARMUP:  # capturing computes nothing: take back what the stand-in's capture computes
            total.sub_(given[0] * given[1])
            graph_class = torch.cuda.CUDAGraph
            graph_class.work = lambda self: step(*graph.inputs)
        assert torch.equal(graph(*given), given[0])
        assert (before is None) == (number <= WARMUP)
    assert len(replays) == 4
    assert torch.equal(total, torch.full((2,), 2.0 * sum(range(WARMUP + 4))))
    with pytest.raises(ValueError, match="argument 2"):
        graph(torch.zeros(2))


@pytest.mark.parametrize("tensor", [False, True])
def test_learning_rates_stay_where_they_are(tensor):
    weight = torch.nn.Parameter(torch.ones(1))
    rate = torch.tensor(0.1) if tensor else 0.1
    optimizer = torch.optim.Adam([weight], lr=rate, capturable=False)
    (group,) = optimizer.param_groups
    set_learning_rate(group, 0.05)
    weight.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    fresh = torch.optim.Adam([weight], lr=torch.tensor(0.1) if tensor else 0.1, capturable=True)
    where = fresh.param_groups[0]["lr"]
    load_optimizer(fresh, state)
    (loaded,) = fresh.param_groups
    assert float(loaded["lr"]) == pytest.approx(0.05) and loaded["capturable"] is True
    assert isinstance(loaded["lr"], torch.Tensor) == tensor and (not tensor or loaded["lr"] is where)
    assert fresh.state[weight]["step"] == 1
