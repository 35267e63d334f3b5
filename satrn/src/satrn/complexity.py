"""Parameters and FLOPs of a network by the rule that reproduces the paper's figures (tables 2 and 3b, figures 5 and 8).

FLOPs are 2 x multiply-adds of convolutions, dense layers and LSTMs for one image and `max_length` decoding steps,
without the two attention-matrix products. The Transformer decoder recomputes keys and values of the encoder's tokens
at every step unless they are cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from satrn.config import SATRNConfig
from satrn.decoding import StepDecoder
from satrn.models import SATRN


@dataclass(frozen=True)
class Costs:
    """Cost of one network; FLOPs are those of reading one image."""

    parameters: int
    flops: int
    """with keys and values of the map recomputed at every step, as in the official code (and in the printed figures)"""
    flops_kept: int
    """with keys and values of the map computed once, as in `generate`"""


@lru_cache(maxsize=32)
def costs(cfg: SATRNConfig) -> Costs:
    """Count a network without computing anything (on torch's meta device). SAR's keys are always cached."""
    with torch.device("meta"):
        model = SATRN(cfg).eval()
        image = torch.empty(1, cfg.in_channels, *cfg.img_size)
        previous = torch.zeros(1, dtype=torch.long)
    decoder: StepDecoder = model.decoder
    with torch.no_grad():
        with _multiply_adds(model) as encoding:
            encoded = model.encode(image)
        with _multiply_adds(model) as starting:
            state = decoder.start(encoded.tokens, encoded.hw)
        with _multiply_adds(model) as stepping:
            decoder.step(previous, state)
    tied_output = cfg.classes * cfg.d_model if model.decoder.classifier is None else 0
    once = sum(encoding) + sum(starting) + cfg.max_length * (sum(stepping) + tied_output)
    again = (cfg.max_length - 1) * sum(starting) if cfg.decoder == "satrn" else 0
    return Costs(sum(p.numel() for p in model.parameters()), 2 * (once + again), 2 * once)


@contextmanager
def _multiply_adds(model: nn.Module) -> Iterator[list[int]]:
    """A list that receives the multiply-adds of every call of a counted module."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            counts.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            counts.append(output.numel() * module.in_features)
        elif isinstance(module, nn.LSTM | nn.LSTMCell):
            weights = sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight"))
            counts.append(inputs[0].shape[:-1].numel() * weights)

    handles = [module.register_forward_hook(count) for module in model.modules()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
