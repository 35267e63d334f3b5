"""The paper's learned attacks (section 5.2): an MLP that names the sender, a Siamese network that compares two updates.

They run on the CPU in float32: their inputs are a few hundred numbers per update.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_linkability.splits import balanced_pairs

Pairs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mlp_probabilities(
    x: np.ndarray, labels: np.ndarray, n_users: int, seed: int, epochs: int = 100, batch_size: int = 32
) -> Callable[[np.ndarray], np.ndarray]:
    """The paper's MLP: FC-128, ReLU, dropout 0.2, softmax over users; SGD 0.01, momentum 0.9, decay 1e-6 per step.

    The paper does not give epochs and batch size.

    Args:
        x: (n, d) features of updates whose sender is known.
        labels: (n,) sender, 0 .. n_users - 1.
        n_users: classes.
        seed: of weights, order and dropout.
        epochs: passes over x.
        batch_size: updates per step.

    Returns:
        a function from features (m, d) to probabilities (m, n_users), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    w1, b1 = _layer(x.shape[1], 128, generator)
    w2, b2 = _layer(128, n_users, generator)
    params = [w1, b1, w2, b2]
    velocity = [torch.zeros_like(p) for p in params]
    inputs, one_hot = torch.from_numpy(x).float(), F.one_hot(torch.from_numpy(labels).long(), n_users).float()
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        keep = (torch.rand(len(inputs), 128, generator=generator) >= 0.2) / 0.8
        for xb, yb, kept in zip(
            *(part.split(batch_size) for part in (inputs[order], one_hot[order], keep)), strict=True
        ):
            hidden = torch.addmm(b1, xb, w1).relu_().mul_(kept)
            # gradient of two layers, written out: a third of autograd's time at this size
            error = torch.addmm(b2, hidden, w2).softmax(1).sub_(yb).div_(len(xb))
            inner = (error @ w2.T).mul_(kept).mul_(hidden > 0)
            grads = [xb.T @ inner, inner.sum(0), hidden.T @ error, error.sum(0)]
            torch._foreach_mul_(velocity, 0.9)
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(params, velocity, alpha=-0.01 / (1 + 1e-6 * step))
            step += 1

    def probabilities(features: np.ndarray) -> np.ndarray:
        hidden = torch.addmm(b1, torch.from_numpy(features).float(), w1).relu()
        return torch.addmm(b2, hidden, w2).softmax(1).double().numpy()

    return probabilities


def _layer(inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keras's default: Glorot uniform weights (inputs, outputs), zero bias."""
    bound = (6 / (inputs + outputs)) ** 0.5
    weight = (2 * torch.rand(inputs, outputs, generator=generator) - 1) * bound
    return weight, torch.zeros(outputs)


def product_of_probabilities(probabilities: Callable[[np.ndarray], np.ndarray]) -> Pairs:
    """The paper's matching by the re-identification MLP: max over users of P_i(u) P_j(u), for pairs of rows."""

    def score(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (probabilities(a) * probabilities(b)).max(1)

    return score


def siamese(x: np.ndarray, users: np.ndarray, seed: int, steps: int = 800, batch_size: int = 64) -> Pairs:
    """The paper's Siamese network: FC-128, ReLU, dropout 0.1, FC-128, ReLU; L1 distance, FC-1, BCE, RMSProp 1e-3.

    Args:
        x: (n, d) updates whose sender is known.
        users: (n,) sender.
        seed: of weights, pairs and dropout.
        steps: of training; the paper gives neither this nor batch_size. Half of a batch are same-user pairs.
        batch_size: pairs per step.

    Returns:
        a function from features of pairs, (m, d) and (m, d), to the probability that one user sent both, (m,).

    Raises:
        ValueError: no user has two updates, so there are no same-user pairs.
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    branch = nn.Sequential(
        nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU()
    )  # fmt: skip
    head = nn.Linear(128, 1)
    optimizer = torch.optim.RMSprop([*branch.parameters(), *head.parameters()], lr=1e-3)
    inputs, rng = torch.from_numpy(x).float(), np.random.default_rng(seed)
    targets = (torch.arange(batch_size) < batch_size // 2).float()
    a, b = balanced_pairs(users, users, steps * batch_size // 2, rng, one_set=True)
    half = batch_size // 2
    for step in range(steps):
        same, other = slice(step * half, (step + 1) * half), slice(step * half, step * half + batch_size - half)
        rows_a, rows_b = (torch.from_numpy(np.concatenate([side[0][same], side[1][other]])) for side in (a, b))
        optimizer.zero_grad()
        distance = (branch(inputs[rows_a]) - branch(inputs[rows_b])).abs()
        F.binary_cross_entropy_with_logits(head(distance).squeeze(1), targets).backward()
        optimizer.step()
    branch.eval()
    torch.random.set_rng_state(torch_state)

    @torch.no_grad()
    def score(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distance = (branch(torch.from_numpy(a).float()) - branch(torch.from_numpy(b).float())).abs()
        return head(distance).squeeze(1).sigmoid().double().numpy()

    return score
