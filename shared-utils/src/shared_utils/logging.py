"""Console output: log and progress on stderr, tables on stdout; only rank 0 speaks."""

import logging
import os
import sys

import torch.distributed as dist
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_stderr = Console(stderr=True)  # one for log and bars, so that lines appear above a running bar


def rank() -> int:
    """This process's rank: from torch.distributed once initialised, else from torchrun's or Slurm's variables, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    found = (os.environ.get(name, "") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((int(value) for value in found if value.isdigit()), 0)


def interactive() -> bool:
    """Whether live output makes sense: stderr is a terminal and CI is not set."""
    return sys.stderr.isatty() and not os.environ.get("CI")


class _PlainHandler(logging.StreamHandler):
    stream = property(lambda self: sys.stderr, lambda self, stream: None)  # tests and notebooks replace sys.stderr


def get_logger(name: str) -> logging.Logger:
    """A logger on stderr: INFO and up on rank 0, warnings elsewhere; rich in a terminal, plain lines otherwise."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        rich = interactive()
        handler = RichHandler(console=_stderr, show_path=False) if rich else _PlainHandler()
        if not rich:
            handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        handler.addFilter(lambda message: message.levelno >= logging.WARNING or rank() == 0)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    return logger


def progress() -> Progress:
    """A context manager: bars with count and time left, silent on other ranks, without a terminal and under CI."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, *times, console=_stderr, disable=rank() != 0 or not interactive())


def console() -> Console:
    """Console for tables on stdout; wide enough for them where stdout is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)
