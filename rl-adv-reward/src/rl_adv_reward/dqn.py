"""Targets of Double DQN with n-step returns, and the exact attack on a finite MDP. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def dqn_targets(
    reward: Tensor,
    terminated: Tensor,
    q_target_next: Tensor,
    gamma: float | Tensor,
    q_online_next: Tensor | None = None,
) -> Tensor:
    """Targets y = reward + gamma * (1 - terminated) * Q_target(s', a'); a' from the online network if it is given.

    Args:
        reward: (B,) reward, or n-step return.
        terminated: (B,) bool; must not include truncations, which bootstrap.
        q_target_next: (B, A) target network at s'.
        gamma: discount, or one per sample (B,), gamma ** n.
        q_online_next: (B, A) online network at s' (Double DQN); None: the maximum of the target network.

    Returns:
        (B,) targets; the first action wins ties.

    Raises:
        TypeError: terminated is not bool.
    """
    if terminated.dtype != torch.bool:
        raise TypeError(f"terminated must be bool, got {terminated.dtype}")
    chooser = q_target_next if q_online_next is None else q_online_next
    value = q_target_next.gather(1, chooser.argmax(1, keepdim=True)).squeeze(1)
    return reward + gamma * (~terminated).to(value.dtype) * value


def window_returns(
    reward: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Discounted sum over a window of steps, which ends early at a termination or truncation.

    Args:
        reward: (n, B) rewards of n consecutive steps.
        terminated: (n, B) bool.
        truncated: (n, B) bool.
        gamma: discount per step.

    Returns:
        returns (B,); terminated (B,) bool; discount (B,) gamma ** steps; steps (B,) int64 in 1 .. n, after which the
        value of the observation must be added (of the true final one after a truncation).
    """
    ended = (terminated | truncated).to(reward.dtype)
    alive = torch.cat([torch.ones_like(ended[:1]), 1 - ended[:-1]]).cumprod(0)  # (n, B)
    powers = gamma ** torch.arange(len(reward) + 1, dtype=reward.dtype, device=reward.device)
    steps = alive.sum(0).long()
    returns = (powers[:-1, None] * reward * alive).sum(0)
    return returns, (terminated & alive.bool()).any(0), powers[steps], steps


def nstep_returns(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    bootstrap_value: Tensor,
    final_value: Tensor,
    n: int,
    gamma: float,
) -> Tensor:
    """n-step return from every step of a segment of T steps in N environments.

    Args:
        reward: (T, N).
        terminated: (T, N) bool: no bootstrap.
        truncated: (T, N) bool: bootstraps with final_value.
        bootstrap_value: (T + 1, N) value of the observation at time t.
        final_value: (T, N) value of the true final observation, read where truncated.
        n: number of steps; fewer at the end of the segment.
        gamma: discount per step.

    Returns:
        (T, N).

    Raises:
        ValueError: n below 1, or mismatched shapes.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if bootstrap_value.shape != (len(reward) + 1, *reward.shape[1:]):
        raise ValueError(f"bootstrap_value must be {(len(reward) + 1, *reward.shape[1:])}, got {bootstrap_value.shape}")
    if not reward.shape == terminated.shape == truncated.shape == final_value.shape:
        shapes = [tuple(each.shape) for each in (reward, terminated, truncated, final_value)]
        raise ValueError(f"reward, terminated, truncated and final_value must have one shape, got {shapes}")
    rows, environments = [], torch.arange(reward.shape[1])
    for t in range(len(reward)):
        window = slice(t, t + n)
        returns, dead, discount, steps = window_returns(reward[window], terminated[window], truncated[window], gamma)
        last = t + steps - 1
        cut = truncated[last, environments]
        value = torch.where(cut, final_value[last, environments], bootstrap_value[last + 1, environments])
        rows.append(returns + discount * ~dead * value)
    return torch.stack(rows)


def tabular_attack(transition: Tensor, reward: Tensor, allowed: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The exact optimum of an attacker who can make the victim take any allowed action in a finite MDP.

    If only the victim's action is allowed, this is the value without attack; if all are, the value of full control.

    Args:
        transition: (S, A, S) probabilities.
        reward: (S, A) adversarial reward.
        allowed: (S, A) bool, at least one per state.
        gamma: discount below 1.

    Returns:
        values (S,) and best actions (S,) int64, by policy iteration (the first action wins ties).

    Raises:
        ValueError: a state without an allowed action, or a discount outside [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
    if not allowed.any(1).all():
        raise ValueError(f"allowed: state {int((~allowed.any(1)).nonzero()[0])} has no allowed action")
    states = torch.arange(len(reward))
    policy = allowed.to(torch.uint8).argmax(1)
    while True:
        system = torch.eye(len(reward), dtype=reward.dtype) - gamma * transition[states, policy]
        values = torch.linalg.solve(system, reward[states, policy])
        q = (reward + gamma * transition @ values).masked_fill(~allowed, -torch.inf)
        better = q.max(1).values > q[states, policy] + 1e-10  # a tie must not make the policy cycle
        if not better.any():
            return values, policy
        policy = torch.where(better, q.argmax(1), policy)
