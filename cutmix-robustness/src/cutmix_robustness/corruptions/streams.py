"""Random numbers that belong to a sample, not to a batch.

Every image has its own 64-bit seed. Its k-th number is a hash of (seed, k), the SplitMix64 finaliser of Steele, Lea and
Flood (2014), so a batch of any size is filled in one vectorised step and an image gets the same numbers whatever
batch, worker, rank or device it is processed on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:  # a 64-bit pattern as torch.int64 holds it
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _hash(state: Tensor) -> Tensor:  # int64 -> int64, in place
    shifted = torch.empty_like(state)
    for shift, multiplier in zip((30, 27, 31), (*_MULTIPLIERS, 1), strict=True):
        torch.bitwise_right_shift(state, shift, out=shifted)
        state ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # the shift of int64 drags the sign along: mask it off
        if multiplier != 1:
            state *= multiplier
    return state


class SampleStreams:
    """One stream of random numbers per image.

    Args:
        seeds: (N,) int64, one per image, on the device where the numbers are wanted.
    """

    def __init__(self, seeds: Tensor):
        self.keys = _hash(seeds.clone())[:, None]  # (N, 1)
        self.position = 0

    def _unit(self, count: int) -> Tensor:  # (N, count) float32, multiples of 2^-24 in [0, 1)
        words = (count + 1) // 2
        counter = torch.arange(self.position + 1, self.position + words + 1, device=self.keys.device)
        self.position += words
        halves = _hash(self.keys + counter * _STEP).view(torch.int32)  # (N, 2 * words)
        return (halves >> 8).float().mul_(2.0**-24).add_(0.5)[:, :count]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high): (N, *shape) float32."""
        return self._unit(math.prod(shape)).mul_(high - low).add_(low).reshape(len(self.keys), *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in 0 .. high - 1: (N, *shape) int64."""
        return self._unit(math.prod(shape)).mul_(high).long().reshape(len(self.keys), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers by the Box-Muller transform: (N, *shape) float32."""
        count = math.prod(shape)
        half = (count + 1) // 2
        u, v = self._unit(2 * half).split(half, dim=1)
        radius = (1 - u).log_().mul_(-2).sqrt_()
        angle = v * (2 * math.pi)
        return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count].reshape(len(self.keys), *shape)
