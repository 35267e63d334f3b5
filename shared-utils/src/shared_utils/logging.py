"""Console output: log and progress on stderr, tables on stdout; only rank 0 prints."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def rank() -> int:
    """This process's rank under torch.distributed or torchrun, otherwise 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def quiet() -> bool:
    """Whether live output is off: stderr is not a terminal, CI is set, or this is not rank 0."""
    return not sys.stderr.isatty() or bool(os.environ.get("CI")) or rank() != 0


class _StderrHandler(logging.StreamHandler):
    """Writes to the current sys.stderr, because notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def get_logger(name: str) -> logging.Logger:
    """A logger on stderr: INFO on rank 0, warnings elsewhere; rich in a terminal, plain otherwise."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler: logging.Handler
        if quiet():
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        else:
            handler = RichHandler(console=Console(stderr=True), show_path=False)
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    return logger


def progress() -> Progress:
    """A progress display with count and time left, used as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet(),
    )


def console() -> Console:
    """Console for tables on stdout; wide enough for them if stdout is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)
