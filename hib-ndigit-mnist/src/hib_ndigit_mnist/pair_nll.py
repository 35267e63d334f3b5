"""The soft contrastive loss of many pairs over all K x K sample pairs, forward and backward in one pass.

Equal to `soft_contrastive_loss` of the logits, but faster: pairs are the innermost dimension, there is no logarithm
per sample pair, and the analytic gradient is computed while the distances are available, so autograd stores nothing of
size K x K. `pair_nll` takes a list of pairs; `all_pairs_nll` takes every pair of a batch once, tile by tile. In more
than a few dimensions, distances and gradients are matrix products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DISTANCE_EPS = 1e-12  # under the square root: the gradient of the distance is finite (0) at distance zero
BY_DIFFERENCES = 4  # up to this many dimensions, differences are faster than matrix products, and exact near zero
TILE = 1 << 17  # distances at once in `all_pairs_nll`


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """(m, D), (n, D) -> (m, n). A matrix product in many dimensions: centre the vectors to limit cancellation."""
    if left.shape[1] > BY_DIFFERENCES:
        lengths = left.square().sum(1), right.square().sum(1)
        return torch.addmm(lengths[1][None], left, right.T, alpha=-2).add_(lengths[0][:, None]).clamp_min_(0)
    squares = (left[:, :1] - right[:, 0]).square_()
    for d in range(1, left.shape[1]):
        squares.addcmul_(*[left[:, d : d + 1] - right[:, d]] * 2)
    return squares


class _Scores(NamedTuple):
    """Scores of pairs, with K x K sample pairs along two axes of (K, .., K, ..); derivatives per sample pair."""

    nll: Tensor  # (.., ..) without the two axes
    slope: Tensor  # -d nll / d logit, logit = sign * (b - a * distance)
    distance: Tensor


def _score(
    squares: Tensor, sign: Tensor, a: Tensor, b: Tensor, log_mean: bool, eps: float, axes: tuple[int, int]
) -> _Scores:
    """Squared distances (overwritten) -> likelihoods and slopes; sign, a and b broadcast against them."""
    count = squares.shape[axes[0]] * squares.shape[axes[1]]
    distance = squares.add_(eps).sqrt_()
    logits = torch.addcmul(
        sign * b, distance, -sign * a
    )  # of the true label: their sigmoid is the probability of being right
    tail = logits.abs().neg_().exp_()
    wrong = torch.sigmoid(-logits)
    if log_mean:  # -log mean sigmoid(t)
        scaled = logits.clamp_max(0)
        shift = scaled.amax(axes, keepdim=True)
        scaled = scaled.sub_(shift).exp_().div_(1 + tail)  # sigmoid(t) * exp(-shift)
        total = scaled.sum(axes, keepdim=True)
        nll = -(total.log() + shift - math.log(count))
        return _Scores(nll.squeeze(axes), scaled.div_(total).mul_(wrong), distance)
    nll = (tail.log1p_() - logits.clamp_max(0)).mean(axes)  # -mean log sigmoid(t)
    return _Scores(nll, wrong.div_(count), distance)


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
        if dim <= BY_DIFFERENCES:
            left, right = (z.index_select(0, i).view(-1, dim * samples).T.contiguous() for i in (first, second))
            left, right = left.view(dim, samples, -1), right.view(dim, samples, -1)  # (D, K, P)
            squares = (left[0, :, None] - right[0, None]).square_()  # (K, K, P)
            for d in range(1, dim):
                squares.addcmul_(*[left[d, :, None] - right[d, None]] * 2)
        else:
            z = z - z.mean((0, 2), keepdim=True)  # shorter vectors: less cancellation below
            left, right = z.index_select(0, first), z.index_select(0, second)  # (P, D, K)
            lengths = [side.square().sum(1) for side in (left, right)]  # (P, K)
            products = torch.bmm(left.transpose(1, 2), right)
            squares = lengths[0][:, :, None] + lengths[1][:, None] - 2 * products
            squares = squares.permute(1, 2, 0).contiguous().clamp_min_(0)
        nll, slope, distance = _score(squares, sign, a, b, log_mean, eps, (0, 1))
        grad_b = -sign * slope.sum((0, 1))
        grad_a = sign * (slope * distance).sum((0, 1))
        pull = slope.div_(distance).mul_(sign * a)  # d nll / d(distance) / distance, (K, K, P)
        if dim <= BY_DIFFERENCES:
            force = [pull * (left[d, :, None] - right[d, None]) for d in range(dim)]
            grad_left = torch.stack([f.sum(1) for f in force]).permute(2, 0, 1)  # (P, D, K)
            grad_right = torch.stack([f.sum(0) for f in force]).neg_().permute(2, 0, 1)
        else:
            pull = pull.permute(2, 0, 1).contiguous()  # (P, K, K)
            grad_left = left * pull.sum(2)[:, None] - torch.bmm(right, pull.transpose(1, 2))
            grad_right = right * pull.sum(1)[:, None] - torch.bmm(left, pull)
        ctx.save_for_backward(first, second, grad_left, grad_right, grad_a, grad_b)
        ctx.rows = rows
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        first, second, grad_left, grad_right, grad_a, grad_b = ctx.saved_tensors
        grad = grad_left.new_zeros(ctx.rows, *grad_left.shape[1:])
        grad.index_add_(0, first, grad_left * upstream[:, None, None])
        grad.index_add_(0, second, grad_right * upstream[:, None, None])
        return grad, None, None, None, grad_a * upstream, grad_b * upstream, None, None


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


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, match: Tensor, a: Tensor, b: Tensor, log_mean: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # z (K, B, D), match (B, B)
        samples, batch, dim = z.shape
        z = z - z.mean((0, 1))  # shorter vectors: less cancellation below
        grad = torch.zeros_like(z)
        once = torch.ones_like(match).triu_(1)
        kinds = [once & match, once & ~match]
        weight = torch.stack([kind / (2 * kind.sum()) for kind in kinds]).sum(0).to(z.dtype)  # (B, B)
        sign = match.to(z.dtype) * 2 - 1
        totals, grad_a, grad_b = z.new_zeros(2), z.new_zeros(()), z.new_zeros(())
        start = 0
        while start < batch - 1:  # images start .. stop - 1, each with all images after `start`
            width = batch - 1 - start
            stop = start + max(1, min(width, TILE // (samples * samples * width)))
            part = slice(start, stop), slice(start + 1, batch)
            left, right = (z[:, p].reshape(-1, dim) for p in part)
            squares = squared_distances(left, right)
            signs, weights = (x[part][None, :, None] for x in (sign, weight))  # (1, rows, 1, width)
            tile = squares.view(samples, stop - start, samples, width)
            nll, slope, distance = _score(tile, signs, a, b, log_mean, eps, (0, 2))
            totals += torch.stack([nll[kind[part]].sum() for kind in kinds])
            slope.mul_(signs * weights)
            grad_b -= slope.sum()
            grad_a += torch.dot(slope.view(-1), distance.view(-1))
            pull = slope.div_(distance).mul_(a).view(len(left), len(right))
            grad[:, part[0]] += torch.addmm(left * pull.sum(1)[:, None], pull, right, alpha=-1).view_as(z[:, part[0]])
            grad[:, part[1]] += torch.addmm(right * pull.sum(0)[:, None], pull.T, left, alpha=-1).view_as(z[:, part[1]])
            start = stop
        ctx.save_for_backward(grad, grad_a, grad_b)
        positive, negative = totals / torch.stack([kind.sum() for kind in kinds])
        ctx.mark_non_differentiable(positive, negative)
        return (positive + negative) / 2, positive, negative

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_a, grad_b = (each * upstream for each in ctx.saved_tensors)
        return grad, None, grad_a, grad_b, None, None


def all_pairs_nll(
    z: Tensor, labels: Tensor, a: Tensor, b: Tensor, objective: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean negative log-likelihood of all pairs i < j of a batch, matching and other pairs with half the weight each.

    Args:
        z: (B, K, D) samples, float32 or float64.
        labels: (B,), with a matching and a non-matching pair.
        a: scalar, positive.
        b: scalar.
        objective: as in `pair_nll`.
        eps: added to the squared distance.

    Returns:
        Scalars: the balanced mean, differentiable once in z, a and b; and the means of its two halves, detached.
    """
    match = labels[:, None] == labels
    return _AllPairs.apply(z.transpose(0, 1).contiguous(), match, a, b, objective == "log_mean", eps)
