"""Checkpoints of a training run: written completely or not at all; a run resumes where its checkpoint was taken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared_utils.cuda_graph import load_optimizer
from shared_utils.files import whole_file

if TYPE_CHECKING:
    from hib_ndigit_mnist.train import _Run


class Progress:
    """The checkpoint file of a run: if the process is killed, either the old or the new file is there."""

    def __init__(self, path: Path | None, identity: dict[str, Any]):
        self.path, self.identity, self.saved = path, identity, 0
        self.visits: list[list[Any]] = []

    def save(self, run: _Run) -> None:
        self.saved = run.step
        if self.path is None or run.fabric.global_rank:
            return
        state = {"identity": self.identity, "step": run.step, "visits": self.visits, "history": run.history}
        state |= {"stack": run.stack.state_dict(), "optimizer": run.optimizer.state_dict()}
        save_file(self.path, state | {"generators": [g.get_state() for g in run.generators]})

    def resume(self, run: _Run) -> None:
        if self.path is None or not self.path.exists():
            return
        state = load_file(self.path)
        if state.get("identity") != self.identity:
            raise ValueError(f"{self.path}: checkpoint of another run; choose another --output, or move it away")
        run.step = self.saved = state["step"]
        self.visits = state["visits"]
        run.history = [(step, values.to(run.fabric.device)) for step, values in state["history"]]
        run.stack.load_state_dict(state["stack"])
        load_optimizer(run.optimizer, state["optimizer"])
        for generator, saved in zip(run.generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the run after the current chunk, so that a complete state can be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)


def save_file(path: Path, state: dict[str, Any]) -> None:
    """`torch.save` that writes the file completely or not at all. OSError if it cannot be written."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def check_output(path: Path) -> None:
    """ValueError if a file of this name cannot be written: raised before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file to write, got a folder")


def load_file(path: Path) -> dict[str, Any]:
    """`torch.load` with weights_only; ValueError naming the file if that fails."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({reason}); name another file, or train again"
        ) from error
