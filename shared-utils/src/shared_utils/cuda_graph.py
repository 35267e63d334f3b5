"""A training step as one CUDA graph: kernel launches dominate the step of a small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP = 3  # eager steps before the capture


class StepGraph:
    """Replays a step, which is a function of tensors, with a single launch.

    The first calls run eagerly, on the side stream that capturing requires; they are normal steps. What the step reads
    besides its inputs (weights, optimizer state, the learning rate as a tensor) must stay at its address. The step may
    not wait for a value or draw from its own generator.

    Args:
        step: takes CUDA tensors, of the same shapes in every call; returns any structure of tensors without gradient.
    """

    def __init__(self, step: Callable[..., Any]):
        self.step, self.calls = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Result of the step; the next call overwrites it."""
        if self.calls < WARMUP:
            self.calls += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return outputs
        if self.graph is None:
            self.inputs = [each.clone() for each in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.step(*self.inputs)
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self.outputs


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of an optimizer's group; in place if it is a tensor, as a graph needs it."""
    group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` that keeps learning rates at their addresses, and the settings that a graph needs."""
    needed = ("lr", "capturable")
    kept: list[dict[str, Any]] = [{name: g[name] for name in needed if name in g} for g in optimizer.param_groups]
    rates = [float(group["lr"]) for group in state["param_groups"]]
    optimizer.load_state_dict(state)
    for group, own, rate in zip(optimizer.param_groups, kept, rates, strict=True):
        group.update(own)
        set_learning_rate(group, rate)
