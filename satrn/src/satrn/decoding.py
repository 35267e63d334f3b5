"""Reading: greedy and beam search over a decoder that caches keys and values and stops when every word has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from satrn.charset import END, Tokenizer
from satrn.config import SATRNConfig


class EncodedMap(Protocol):
    """Tokens [B, H'W', d] of a map of hw = (H', W')."""

    tokens: Tensor
    hw: tuple[int, int]


class StepDecoder(Protocol):
    """A decoder that reads step by step; its state has select and attention."""

    cfg: SATRNConfig

    def __call__(self, previous: Tensor, memory: Tensor, hw: tuple[int, int]) -> Tensor: ...

    def start(self, memory: Tensor, hw: tuple[int, int]) -> Any: ...

    def step(self, previous: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any]: ...


@dataclass
class Recognition:
    """The readings of a batch."""

    texts: list[str]
    """one per image"""
    char_confidence: list[list[float]]
    """probability of each character"""
    confidence: list[float]
    """exp of the mean log probability over the characters and the end token, as in the official code"""
    attention: Tensor | None = None
    """weights on the map [B, steps, H', W'], if requested"""

    @classmethod
    def from_ids(
        cls, tokenizer: Tokenizer, ids: Tensor, probabilities: Tensor, attention: Tensor | None
    ) -> Recognition:
        """From class numbers and their probabilities [B, L]."""
        texts = tokenizer.decode(ids)
        rows = probabilities.double().tolist()
        characters = [row[: len(text)] for row, text in zip(rows, texts, strict=True)]
        steps = [row[: len(text) + 1] for row, text in zip(rows, texts, strict=True)]
        means = [float(torch.tensor(row, dtype=torch.float64).log().mean().exp()) for row in steps]
        return cls(texts, characters, means, attention)


def greedy(
    decoder: StepDecoder,
    encoded: EncodedMap,
    steps: int,
    cache: bool = True,
    early_stop: bool = True,
    attention: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The likeliest character at every step.

    Args:
        decoder: with start and step (and forward, for cache=False).
        encoded: encoder's output of a batch.
        steps: maximal number of steps.
        cache: False runs the decoder on all earlier characters at every step.
        early_stop: end when every word has.
        attention: also collect the weights on the map.

    Returns:
        Class numbers and probabilities [B, L], L <= steps, and the weights [B, L, H', W'] or None. After a word's
        end come END and probability 1.
    """
    memory, hw = encoded.tokens, encoded.hw
    state: Any = decoder.start(memory, hw) if cache else None
    previous = torch.full((len(memory),), decoder.cfg.classes, device=memory.device)
    ended = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
    history, ids, probabilities, maps = [previous], [], [], []
    for _ in range(steps):
        if cache:
            logits, state = decoder.step(previous, state, attention)
        else:
            logits = decoder(torch.stack(history, dim=1), memory, hw)[:, -1]
        probability, previous = logits.float().softmax(dim=-1).max(dim=-1)
        previous = previous.masked_fill(ended, END)
        ids.append(previous)
        probabilities.append(probability.masked_fill(ended, 1.0))
        history.append(previous)
        if attention:
            maps.append(state.attention.unflatten(1, hw))
        ended = ended | (previous == END)
        if early_stop and ended.all():
            break
    return torch.stack(ids, 1), torch.stack(probabilities, 1), torch.stack(maps, 1) if attention else None


def beam_search(
    decoder: StepDecoder, encoded: EncodedMap, steps: int, width: int, early_stop: bool = True
) -> tuple[Tensor, Tensor]:
    """The word with the highest total log probability in the beam.

    Args:
        decoder: with start and step.
        encoded: encoder's output of a batch.
        steps: maximal number of steps.
        width: words kept per image.
        early_stop: end when every kept word has.

    Returns:
        Class numbers and probabilities [B, L], as `greedy`.
    """
    batch, device = len(encoded.tokens), encoded.tokens.device
    state = decoder.start(encoded.tokens, encoded.hw).select(
        torch.arange(batch, device=device).repeat_interleave(width)
    )
    previous = torch.full((batch * width,), decoder.cfg.classes, device=device)
    scores = torch.full((batch, width), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams start equal: only the first may branch
    ids = torch.empty(batch, width, 0, dtype=torch.long, device=device)
    probabilities = torch.empty(batch, width, 0, device=device)
    ended = torch.zeros(batch, width, dtype=torch.bool, device=device)
    for _ in range(steps):
        logits, state = decoder.step(previous, state)
        step = logits.float().log_softmax(dim=-1).unflatten(0, (batch, width))  # (B, width, K)
        only_end = torch.full_like(step[0, 0], -torch.inf)
        only_end[END] = 0.0
        step = torch.where(ended[..., None], only_end, step)
        scores, best = (scores[..., None] + step).flatten(1).topk(width, dim=1)  # (B, width)
        origin, token = best // step.shape[-1], best % step.shape[-1]
        gained = step.flatten(1).gather(1, best).exp()
        rows = (origin + width * torch.arange(batch, device=device)[:, None]).flatten()
        ids = torch.cat([ids.gather(1, origin[..., None].expand_as(ids)), token[..., None]], dim=2)
        old = probabilities.gather(1, origin[..., None].expand_as(probabilities))
        probabilities = torch.cat([old, gained[..., None]], dim=2)
        ended = token == END
        state, previous = state.select(rows), token.flatten()
        if early_stop and ended.all():
            break
    return ids[:, 0], probabilities[:, 0]
