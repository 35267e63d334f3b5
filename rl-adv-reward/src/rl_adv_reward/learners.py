"""Learners: a Q-network (victim, critic, or the ATN through the frozen victim's head), and an ATN from a critic."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss

from rl_adv_reward.atn import ATN, AttackedQ
from rl_adv_reward.attacks import fgsm
from rl_adv_reward.dqn import dqn_targets
from rl_adv_reward.models import Victim, to_unit
from rl_adv_reward.replay import Batch
from rl_adv_reward.settings import Loop

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Learner(Protocol):
    """What the loop in train.py trains."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def act(self, x: Tensor, iteration: int) -> Tensor: ...

    def loss(self, batch: Batch) -> Tensor: ...

    def after(self, iteration: int) -> None: ...


def _adam(parameters: Iterable[nn.Parameter], loop: Loop) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=loop.lr, eps=loop.adam_eps, fused=True)


class _Values:
    """A network in training, with the interface that attacks expect of a victim."""

    def __init__(self, network: nn.Module):
        self.network = network

    def q(self, x: Tensor) -> Tensor:
        return self.network(x).float()


class QLearner:
    """Double DQN with n-step returns.

    With `AttackedQ` this is the learner frozen_q: the targets use the target ATN and the same frozen victim. With
    `hardened` above 0 the network learns on observations attacked by FGSM with that bound, against its own greedy
    action: light adversarial training for a more robust victim.
    """

    def __init__(self, q: nn.Module, loop: Loop, fabric: Fabric, hardened: float = 0.0):
        self.loop, self.fabric, self.hardened = loop, fabric, hardened
        self.q = q.to(fabric.device).to(memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.modules = {"q": self.q, "target": self.target}
        self.optimizer = _adam(self.q.parameters(), loop)

    def exploration(self, iteration: int) -> float:
        first, last, share = self.loop.explore
        return first + (last - first) * min(1.0, iteration / max(1.0, share * self.loop.iterations))

    @torch.no_grad()
    def act(self, x: Tensor, iteration: int) -> Tensor:
        with self.fabric.autocast():
            q = self.q(x)
        explored = torch.rand(len(x), device=x.device) < self.exploration(iteration)
        return torch.where(explored, torch.randint(q.shape[1], (len(x),), device=x.device), q.argmax(1))

    def loss(self, batch: Batch) -> Tensor:
        now, then = to_unit(batch.obs), to_unit(batch.next_obs)
        if self.hardened:
            now = fgsm(now, _Values(self.q), eps=self.hardened)
        with self.fabric.autocast():
            with torch.no_grad():
                online, target = self.q(then), self.target(then)
            q = self.q(now)
        y = dqn_targets(batch.returns, batch.terminated, target.float(), batch.discount, online.float())
        q = q.float().gather(1, batch.action[:, None]).squeeze(1)
        return (huber_loss(q, y, reduction="none") * batch.weight).mean()

    def after(self, iteration: int) -> None:
        if iteration % self.loop.sync_every == 0:
            self.target.load_state_dict(self.q.state_dict())


class Distiller:
    """The ATN learns to make the victim take the critic's action, on states from the critic's play, then from its own.

    Loss: cross-entropy of (Q_v(g(s)) - mean) / tau with argmax Q_A(s), weighted by how much the choice matters,
    max Q_A - mean Q_A. With temporal "frame" the victim sees, in training too, older frames as the ATN perturbed them
    one step before; only the newest frame is perturbed now (exact for stacks of two frames).
    """

    def __init__(
        self,
        atn: ATN,
        victim: Victim,
        critic: nn.Module,
        tau: float,
        own: int,
        loop: Loop,
        fabric: Fabric,
        temporal: str = "stack",
    ):
        self.fabric, self.tau, self.own, self.temporal = fabric, tau, own, temporal
        self.atn, self.victim = atn, victim
        self.q = AttackedQ(atn.to(fabric.device).to(memory_format=torch.channels_last), victim)
        self.critic = critic.to(fabric.device).requires_grad_(False).eval()
        self.modules = {"q": self.q}
        self.optimizer = _adam(self.q.parameters(), loop)

    @torch.no_grad()
    def act(self, x: Tensor, iteration: int) -> Tensor:
        with self.fabric.autocast():
            return (self.critic if iteration < self.own else self.q)(x).argmax(1)

    def loss(self, batch: Batch) -> Tensor:
        by_frame = self.temporal == "frame"
        x = to_unit(batch.next_obs if by_frame else batch.obs)
        with self.fabric.autocast():
            with torch.no_grad():
                wanted = self.critic(x)
            if by_frame:
                older, newest = self.atn.attacked(to_unit(batch.obs))[:, 1:], self.atn.attacked(x)[:, -1:]
                q = self.victim.q(torch.cat([older, newest], 1))
            else:
                q = self.q(x)
        wanted, q = wanted.float(), q.float()
        matters = (wanted.amax(1) - wanted.mean(1)) * batch.weight
        logits = (q - q.mean(1, keepdim=True)) / self.tau
        return (cross_entropy(logits, wanted.argmax(1), reduction="none") * matters).mean()

    def after(self, iteration: int) -> None:
        """Do nothing: there is no target network."""
