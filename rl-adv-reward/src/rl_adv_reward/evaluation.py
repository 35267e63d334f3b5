"""Evaluation of an attack: complete episodes, greedy, with the adversarial reward of the clean game; per 1000 steps.

Every metric covers the steps of the first `episodes` episodes, the same number from every environment, so that short
episodes are not preferred. The bound is checked on the tensor that the victim receives.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from rl_adv_reward.atn import TOLERANCE, check_bound, perturbation_size
from rl_adv_reward.attacks import Attack
from rl_adv_reward.models import Victim, to_unit
from rl_adv_reward.play import Play
from rl_adv_reward.rewards import AdversarialReward, Zone, crossing
from rl_adv_reward.settings import TEMPORAL

BINS = 20
SUMS = ("adv_return", "victim_return", "steps", "misses", "flips", "crossings", "hits", "l2", "l0")
MOST_ENVS = 64


@dataclass
class Evaluation:
    """Arrays with one value per episode, and totals."""

    episodes: dict[str, np.ndarray]
    """(E,) float64 each: adv_return, victim_return (unclipped), steps, misses, flips, crossings, hits (only for a zone
    on the enemy's line), l2, l0 (sums)"""
    linf: float
    """largest |x' - x| of any step"""
    excess: float
    """largest excess over the bound in any step; 0: within it"""
    landings: np.ndarray
    """(20,) counts along the enemy's line, from its top"""
    landing_mean: float
    """mean landing position in [0, 1]; NaN without a crossing"""
    trajectory: str
    """SHA-256 of all actions: equal for two attacks that caused the same actions"""
    distinct: int
    """number of episodes with different observations: if below all, a deterministic game was repeated"""
    frames: dict[str, np.ndarray]
    """newest clean and attacked frame of the first environment at some steps, uint8"""

    def rate(self, name: str = "adv_return") -> float:
        """Per 1000 steps, over all episodes."""
        return 1000 * float(self.episodes[name].sum() / self.episodes["steps"].sum())

    def metrics(self) -> dict[str, float]:
        """All finite metrics; the README explains each."""
        e = self.episodes
        crossings = e["crossings"].sum()
        found = {
            "adv_rate": self.rate(),
            "adv_return": float(e["adv_return"].mean()),
            "victim_return": float(e["victim_return"].mean()),
            "miss_rate": self.rate("misses"),
            "flip_rate": self.rate("flips") / 1000,
            "linf": self.linf,
            "excess": self.excess,
            "l2": self.rate("l2") / 1000,
            "l0_share": self.rate("l0") / 1000,
            "episode_steps": float(e["steps"].mean()),
        }
        if crossings:
            found["landing_mean"] = self.landing_mean
        if crossings and "hits" in e:
            found["hit_fraction"] = float(e["hits"].sum() / crossings)
        return found

    def to_json(self) -> dict:
        """Everything, without loss, in a form for JSON."""
        arrays = {"episodes": {name: each.tolist() for name, each in self.episodes.items()}}
        frames = {name: pack(each) for name, each in self.frames.items()}
        return vars(self) | arrays | {"landings": self.landings.tolist(), "frames": frames}

    @classmethod
    def from_json(cls, content: dict) -> Evaluation:
        """The inverse of `to_json`."""
        episodes = {name: np.array(each) for name, each in content["episodes"].items()}
        frames = {name: unpack(each) for name, each in content["frames"].items()}
        return cls(**content | {"episodes": episodes, "landings": np.array(content["landings"]), "frames": frames})


def pack(frames: np.ndarray) -> dict:
    """(T, H, W) uint8 as a shape and a base64 string of compressed bytes, for a run record."""
    return {"shape": list(frames.shape), "zlib": base64.b64encode(zlib.compress(frames.tobytes(), 9)).decode()}


def unpack(packed: dict) -> np.ndarray:
    """The inverse of `pack`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), np.uint8).reshape(packed["shape"])


class Frames:
    """Perturbs only the newest frame of a stack; earlier ones stay as the victim received them.

    An attack on a camera perturbs each frame once; an attack on the whole stack changes past frames at every step.
    """

    def __init__(self) -> None:
        self.shown: Tensor | None = None

    def __call__(self, x_adv: Tensor, fresh: Tensor) -> Tensor:
        """What the victim sees, from attacked stacks (N, C, H, W) and where an episode begins (N,)."""
        if self.shown is not None:
            moved = torch.cat([self.shown[:, 1:], x_adv[:, -1:]], 1)
            x_adv = torch.where(fresh.reshape(-1, 1, 1, 1), x_adv, moved)
        self.shown = x_adv
        return x_adv


@torch.no_grad()
def evaluate(
    victim: Victim,
    attack: Attack,
    goal: AdversarialReward,
    env: str,
    episodes: int,
    seed: int,
    *,
    eps: float | None = None,
    norm: str = "linf",
    temporal: str = "stack",
    policy: Callable[[Tensor], Tensor] | None = None,
    keep_frames: int = 0,
    episode_steps: int = 0,
) -> Evaluation:
    """Play complete episodes with the greedy victim under an attack.

    Args:
        victim: on the device to use.
        attack: (x, victim) -> x'.
        goal: adversarial reward, from clean observations.
        env: name of the environment.
        episodes: minimal number; the same number in each of up to 64 environments.
        seed: seed of the environments; the same seed gives the same starts to every attack.
        eps: bound to check; None: no check.
        norm: norm of the bound.
        temporal: "stack", or "frame" (see `Frames`).
        policy: acts instead of the victim: x (N, C, H, W) -> actions (N,). Only for the full-control reference.
        keep_frames: number of steps of the first environment to keep as pictures.
        episode_steps: steps after which an episode is cut off; 0: the default.

    Raises:
        RuntimeError: an observation outside the bound or [0, 1], or a victim whose weights changed.
        ValueError: an unknown norm or temporal.
    """
    if temporal not in TEMPORAL:
        raise ValueError(f"temporal must be one of {', '.join(TEMPORAL)}, got {temporal!r}")
    check_bound(eps or 0.0, norm)
    device = next((each.device for each in victim.parameters()), torch.device("cpu"))
    n = min(episodes, MOST_ENVS)
    play, weights = Play(env, n, seed, device, episode_steps), victim.weights_hash()
    tally = _Tally(n, -(-episodes // n), device)
    memory, fresh = Frames(), torch.ones(n, dtype=torch.bool, device=device)
    digest = hashlib.sha256()
    pictures: dict[str, list[np.ndarray]] = {"clean": [], "attacked": []}
    while not tally.complete:
        x = to_unit(play.obs)
        x_adv = attack(x, victim)
        if temporal == "frame":
            x_adv = memory(x_adv, fresh)
        action = victim.q(x_adv).argmax(1) if policy is None else policy(x)
        flipped = action != victim.q(x).argmax(1)
        if len(pictures["clean"]) < keep_frames:
            for name, stack in (("clean", x), ("attacked", x_adv)):
                pictures[name].append((255 * stack[0, -1]).round().to(torch.uint8).cpu().numpy())
        digest.update(action.cpu().numpy().tobytes())
        tally.see(play.obs)

        adversarial, own, _, _, valid, info = play.step(action, goal)
        position = crossing(env, play.last_obs, play.obs, info)
        size = tally.bounded(x_adv, x, eps, norm)
        tally.add(adversarial, own, flipped, position, *size, valid=valid, over=play.over)
        fresh = ~valid
    play.envs.close()
    tally.check()
    if victim.weights_hash() != weights:
        raise RuntimeError("the victim's weights changed during the evaluation")
    frames = {name: np.array(each) for name, each in pictures.items()}
    found = tally.evaluation(digest.hexdigest(), frames)
    if not isinstance(goal, Zone):
        del found.episodes["hits"]  # this goal has no zone on the enemy's line
    return found


class _Tally:
    """Sums per environment until an episode ends, on the device; only the end of an episode synchronises with it."""

    def __init__(self, num_envs: int, quota: int, device: torch.device):
        self.quota, self.device = quota, device
        self.done = np.zeros(num_envs, int)
        self.finished: list[np.ndarray] = []
        self.sums = torch.zeros(len(SUMS), num_envs, dtype=torch.float64, device=device)
        self.landings = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.landing_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.seen = [0] * num_envs  # a checksum of the running episode's frames
        self.episodes: set[int] = set()
        self.worst = torch.zeros(3, device=device)  # linf, excess over the bound, excess over [0, 1]

    @property
    def complete(self) -> bool:
        return bool((self.done >= self.quota).all())

    def see(self, obs: Tensor) -> None:
        """The newest frames (N, C, H, W) of the running episodes."""
        newest = obs[:, -1].cpu().numpy()
        self.seen = [zlib.crc32(frame.tobytes(), before) for frame, before in zip(newest, self.seen, strict=True)]

    def bounded(self, x_adv: Tensor, x: Tensor, eps: float | None, norm: str) -> tuple[Tensor, Tensor]:
        """L2 and changed share (N,) of a perturbation; keeps its worst values for `check`."""
        linf, l2, l0 = perturbation_size(x_adv, x)
        size = l2 if norm == "l2" else linf
        excess = size - (size if eps is None else eps)
        outside = (x_adv - 0.5).abs().amax() - 0.5
        self.worst = torch.maximum(self.worst, torch.stack([linf.amax(), excess.amax(), outside]))  # keeps NaN
        return l2, l0 / x[0].numel()

    def check(self) -> None:
        """RuntimeError if an observation left the bound or the valid range, or was NaN."""
        _, excess, outside = self.worst.tolist()
        if not (excess <= TOLERANCE and outside <= TOLERANCE):
            raise RuntimeError(f"the bound is violated: {excess:.3g} above eps, {outside:.3g} outside [0, 1]")

    def add(
        self,
        adversarial: Tensor,
        own: Tensor,
        flipped: Tensor,
        position: Tensor,
        l2: Tensor,
        l0: Tensor,
        *,
        valid: Tensor,
        over: Tensor,
    ) -> None:
        """Add one step (N,) to all sums, in the order of SUMS; dummies and episodes beyond the quota do not count."""
        counted = valid & torch.from_numpy(self.done < self.quota).to(self.device)
        crossed = ~position.isnan() & counted
        hit = crossed & (adversarial > 0)
        step = [adversarial, own, torch.ones_like(own), own < 0, flipped, crossed, hit, l2, l0]
        self.sums += torch.stack([value.double() for value in step]) * counted
        landed = position[crossed]
        self.landings += torch.bincount((landed * BINS).long().clamp(0, BINS - 1), minlength=BINS)
        self.landing_sum += landed.sum()
        for number in torch.nonzero(~valid).flatten().tolist():
            self.seen[number] = 0
        ended = (over & counted).cpu().numpy()
        if ended.any():
            self.episodes |= {self.seen[number] for number in np.flatnonzero(ended)}
            self.finished.append(self.sums[:, ended].cpu().numpy())
            self.sums[:, ended] = 0
            self.done += ended

    def evaluation(self, trajectory: str, frames: dict[str, np.ndarray]) -> Evaluation:
        total = int(self.landings.sum())
        mean = float(self.landing_sum) / total if total else float("nan")
        episodes = dict(zip(SUMS, np.concatenate(self.finished, 1), strict=True))
        linf, excess, _ = self.worst.tolist()  # worst starts at 0, so the excess is never negative
        landings = self.landings.cpu().numpy()
        return Evaluation(episodes, linf, excess, landings, mean, trajectory, len(self.episodes), frames)


def bootstrap_rate(
    evaluation: Evaluation, draws: int, rng: np.random.Generator, name: str = "adv_return"
) -> np.ndarray:
    """(draws,) rates per 1000 steps of resampled episodes: a ratio of sums, because episodes differ in length."""
    value, steps = evaluation.episodes[name], evaluation.episodes["steps"]
    chosen = rng.integers(len(value), size=(draws, len(value)))
    return 1000 * value[chosen].sum(1) / steps[chosen].sum(1)


def lead(attack: Evaluation, others: dict[str, Evaluation], draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """adv_rate of an attack minus the best of the others, with its 95 % bootstrap interval over episodes.

    The best is chosen again in every draw, so the interval accounts for this choice.
    """
    rng = np.random.default_rng(seed)
    best = np.max([bootstrap_rate(other, draws, rng) for other in others.values()], axis=0)
    low, high = np.quantile(bootstrap_rate(attack, draws, rng) - best, [0.025, 0.975])
    value = attack.rate() - max(other.rate() for other in others.values())
    return {"lead": value, "lead_low": float(low), "lead_high": float(high)}


def landing_shift(attack: Evaluation, nothing: Evaluation) -> dict[str, float]:
    """How far an attack moves the mean landing, and the two-sided Mann-Whitney p of the landings (in 20 bins).

    Landings within an episode are not independent: p measures separation; the test is over seeds.
    """
    samples = (np.repeat(np.arange(len(each.landings)), each.landings) for each in (attack, nothing))
    p = float(mannwhitneyu(*samples).pvalue)
    return {"landing_shift": attack.landing_mean - nothing.landing_mean, "landing_p": p}


def success_share(evaluation: Evaluation, nothing: Evaluation) -> float:
    """Share of episodes with an adversarial return above the 95th percentile of that without attack."""
    bar = np.quantile(nothing.episodes["adv_return"], 0.95)
    return float((evaluation.episodes["adv_return"] > bar).mean())
