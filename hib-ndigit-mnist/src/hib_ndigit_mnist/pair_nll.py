"""The soft contrastive loss of many pairs over all K x K sample pairs, forward and backward in one pass.

Equal to `soft_contrastive_loss` of the logits, and faster: pairs are the innermost dimension, no logarithm is taken
per sample pair, and the analytic gradient is made while the distances are at hand, so that autograd keeps nothing of
size K x K. Pairs are gathered from the batch here, so that an image in many pairs is sampled once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DISTANCE_EPS = 1e-12  # under the root: the gradient of the distance is finite (0) at distance zero


class _PairNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        first: Tensor,
        second: Tensor,
        sign: Tensor,
        a: Tensor,
        b: Tensor,
        log_mean: bool,
        eps: float,
    ) -> Tensor:
        # z (R, D, K), first, second, sign, a, b (P,)
        rows, dim, samples = z.shape
        left, right = (z.index_select(0, i).view(-1, dim * samples).T.contiguous() for i in (first, second))
        left, right = left.view(dim, samples, -1), right.view(dim, samples, -1)  # (D, K, P)
        squares = (left[0, :, None] - right[0, None]).square_()  # (K, K, P)
        for d in range(1, dim):
            squares.addcmul_(*[left[d, :, None] - right[d, None]] * 2)
        distance = squares.add_(eps).sqrt_()
        logits = torch.addcmul(sign * b, distance, -sign * a)  # of the truth: sigmoid is the chance to be right
        tail = logits.abs().neg_().exp_()
        wrong = torch.sigmoid(-logits)
        if log_mean:  # -log mean sigmoid(t)
            scaled = logits.clamp_max(0)
            shift = scaled.amax((0, 1))
            scaled = scaled.sub_(shift).exp_().div_(1 + tail)  # sigmoid(t) * exp(-shift)
            total = scaled.sum((0, 1))
            nll = -(total.log() + shift - 2 * math.log(samples))
            slope = scaled.div_(total).mul_(wrong)  # -d nll / dt
        else:  # -mean log sigmoid(t)
            nll = (tail.log1p_() - logits.clamp_max(0)).mean((0, 1))
            slope = wrong.div_(samples * samples)
        grad_b = -sign * slope.sum((0, 1))
        grad_a = sign * (slope * distance).sum((0, 1))
        pull = slope.div_(distance).mul_(sign * a)  # d nll / d(distance) / distance, (K, K, P)
        force = [pull * (left[d, :, None] - right[d, None]) for d in range(dim)]
        grad_left = torch.stack([f.sum(1) for f in force])
        grad_right = torch.stack([f.sum(0) for f in force]).neg_()
        ctx.save_for_backward(first, second, grad_left, grad_right, grad_a, grad_b)
        ctx.rows = rows
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        first, second, grad_left, grad_right, grad_a, grad_b = ctx.saved_tensors
        dim, samples, pairs = grad_left.shape
        grad = grad_left.new_zeros(ctx.rows, dim * samples)
        grad.index_add_(0, first, (grad_left * upstream).reshape(-1, pairs).T)
        grad.index_add_(0, second, (grad_right * upstream).reshape(-1, pairs).T)
        return grad.view(-1, dim, samples), None, None, None, grad_a * upstream, grad_b * upstream, None, None


def pair_nll(
    z: Tensor, first: Tensor, second: Tensor, match: Tensor, a: Tensor, b: Tensor, objective: str, eps: float
) -> Tensor:
    """Negative log-likelihood of pairs of one batch (equations 2, 3 and 5).

    Args:
        z: (..., B, K, D) samples, float32 or float64; leading dimensions are stacked models.
        first: (..., P) indices into the batch.
        second: (..., P) indices into the batch.
        match: (..., P) bool.
        a: (...), positive.
        b: (...).
        objective: "log_mean" -log of the mean over K x K, or "mean_log" -mean of the log.
        eps: added to the squared distance.

    Returns:
        (..., P); differentiable once, in z, a and b.
    """
    *stack, batch, samples, dim = z.shape
    flat = z.transpose(-1, -2).reshape(-1, dim, samples)  # (M B, D, K)
    offset = torch.arange(0, len(flat), batch, device=z.device).view(*stack, 1)
    sign = match.to(z.dtype) * 2 - 1
    a, b = a.view(*stack, 1).expand(first.shape), b.view(*stack, 1).expand(first.shape)
    inputs = [x.reshape(-1) for x in (first + offset, second + offset, sign, a, b)]
    nll = _PairNLL.apply(flat, *inputs, objective == "log_mean", eps)
    return nll.view(first.shape)
