"""Runs the rows of the tables: trains a victim and an attack on it, and evaluates the attack."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_adv_reward.atn import ATN, AttackedQ
from rl_adv_reward.attacks import UNTARGETED, ATNAttack, Attack, HasValues, make_attack, none, preference
from rl_adv_reward.envs import ENVIRONMENTS, sizes
from rl_adv_reward.evaluation import Evaluation, evaluate, landing_shift, lead, pack, success_share
from rl_adv_reward.learners import Distiller, Learner, QLearner
from rl_adv_reward.models import NETWORKS, Smoothed, Victim, weights_hash
from rl_adv_reward.policies import SCRIPTED, Policy, make_policy
from rl_adv_reward.rewards import AdversarialReward, GoalZone, Zone, lose, make_reward
from rl_adv_reward.settings import Loop, Settings
from rl_adv_reward.store import exclusive, goal_code, place
from rl_adv_reward.train import fit, logger, make_fabric, own_reward
from shared_utils.files import whole_file
from shared_utils.folders import project_folder, runs_folder
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.seeding import seed_everything
from shared_utils.tables import Table, load_tables

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PROJECT = project_folder(__file__)
PACKAGES = ("gymnasium", "ale-py", "lightning", "numpy")
CURVE_EPISODES = 8
SEEDS = {"victim": 0, "critic": 1, "atn": 2, "check": 3, "evaluation": 4}


def seed_of(kind: str, seed: int) -> int:
    """A separate seed for each kind of work of each run; environments count up from it, and none share a start."""
    return (seed * len(SEEDS) + SEEDS[kind]) * 1000


def tables() -> list[Table]:
    """All table files, checked against the settings."""
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
    jobs: int = 0,
    precision: str = "auto",
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks for the tables; see `make_fabric` for precision, `run_missing` for jobs."""
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    store = runs_folder(PROJECT) / "artifacts"
    if force:
        shutil.rmtree(store, ignore_errors=True)
    work = partial(execute, store=store, precision=precision)
    run_missing("rl-adv-reward", runs, log, work, repository=PROJECT, packages=PACKAGES, force=force, jobs=jobs)
    return log


def execute(settings: dict, seed: int, *, store: Path, precision: str = "auto") -> Outcome:
    """One run of a table; the store keeps what it trains for all runs that need the same."""
    s = Settings(**settings)
    subject = Subject(s, seed, fabric(precision), store)
    found = subject.evaluate(s.attack, s.target)
    metrics = found.metrics()
    details = {
        "victim_hash": subject.victim_hash,
        "trajectory": found.trajectory,
        "episodes": len(found.episodes["steps"]),
        "distinct_episodes": found.distinct,
        "env_steps_trained": subject.trained_steps,
        "landings": found.landings.tolist(),
        "frames": {name: pack(frames) for name, frames in found.frames.items()},
    }
    if s.eps == 0:
        metrics["same_trajectory"] = float(found.trajectory == subject.evaluate("none").trajectory)
    if s.measure:
        metrics |= landing_shift(found, subject.evaluate("none"))
    if s.compare:
        metrics |= subject.compare(found)
    if subject.curve:
        details["curve"] = [{name: float(f"{value:.5g}") for name, value in point.items()} for point in subject.curve]
        rates = [point["adv_rate"] for point in subject.curve]
        fifth = max(1, len(rates) // 5)
        early, late = sum(rates[:fifth]) / fifth, sum(rates[-fifth:]) / fifth
        metrics |= {"early_rate": early, "late_rate": late, "gain": late - early}
    return Outcome(metrics, details, {"name": s.env, "episodes": s.episodes}, precision=subject.precision)


class Subject:
    """A victim and everything that is tried on it; each part is trained on first use.

    Args:
        settings: settings of the run.
        seed: seed of every training and evaluation.
        fabric: device and precision.
        store: folder of trainings, finished and unfinished.
        victim: the user's victim; None: train one.
    """

    def __init__(self, settings: Settings, seed: int, fabric: Fabric, store: Path, victim: Victim | None = None):
        self.s, self.seed, self.fabric, self.store = settings, seed, fabric, store
        self.precision = str(fabric.strategy.precision.precision)
        self.curve: list[dict] = []
        self.trained_steps = 0
        self.victim = victim.to(fabric.device) if victim else self.train_victim(seed)
        self.victim_hash = self.victim.weights_hash()
        self.defended = self.smoothed(self.victim)
        self.goal = make_reward(settings.goal, settings.env, **settings.goal_options())

    # ---- training ------------------------------------------------------------

    def train_victim(self, seed: int) -> Victim:
        """The victim of a seed, which has passed its gate. RuntimeError if it has not."""
        s, environment = self.s, ENVIRONMENTS[self.s.env]
        loop = s.loop("victim")
        seed_everything(seed_of("victim", seed))
        learner = QLearner(self.network(), loop, self.fabric, s.victim_hardened)
        short: list[float] = []

        def check(iteration: int) -> tuple[dict, bool]:
            victim = Victim(copy.deepcopy(learner.q))
            found = evaluate(
                victim,
                none,
                lose,
                s.env,
                s.victim_check_episodes,
                seed_of("check", seed),
                episode_steps=s.episode_steps,
            )
            value = found.metrics()[environment.gate]
            short.append(environment.short_of(value))
            logger.info("victim, iteration %d: %s %.2f", iteration, environment.gate, value)
            if iteration >= loop.iterations / 2 and len(short) > 1 and short[-1] > 0.9 * short[0]:
                logger.warning("the victim has hardly improved since its first check: try another seed")
            return {environment.gate: value}, iteration >= s.victim_iterations and environment.short_of(value) == 0

        every = (s.victim_check_every or s.victim_iterations) if s.victim_check_episodes else 0
        curve = self.fit("victim", seed, learner, own_reward, loop, check, every)
        if curve and environment.short_of(curve[-1][environment.gate]) > 0:
            raise RuntimeError(
                f"the victim of seed {seed} is too weak to be worth an attack after {loop.iterations} iterations: "
                f"{environment.gate} {curve[-1][environment.gate]:.2f} is not within {environment.bounds}"
            )
        return Victim(learner.q)

    def smoothed(self, victim: Victim) -> Victim:
        """The victim with its defence, or the victim itself if it has none."""
        if not self.s.smoothing:
            return victim
        module = Smoothed(victim.module, sizes(self.s.env)[0], self.s.smoothing)
        return Victim(module, scale=victim.scale, output=victim.output).to(self.fabric.device)

    def network(self) -> nn.Module:
        """A new, untrained network for a victim of this environment."""
        environment = ENVIRONMENTS[self.s.env]
        return NETWORKS[environment.network](*sizes(self.s.env), environment.background)

    @cached_property
    def critic(self) -> nn.Module:
        """Q_A: trained on the adversarial reward with full control of the actions, from the victim's weights."""
        loop = self.s.loop("critic")
        seed_everything(seed_of("critic", self.seed))
        q = self.network()
        if self.victim.output == "q":
            self.warm_start(q)
        learner = QLearner(q, loop, self.fabric)
        self.fit("critic", self.seed, learner, self.goal, loop)
        return learner.q.requires_grad_(False).eval()

    def warm_start(self, q: nn.Module) -> None:
        """Start from the victim's weights if it is the same network; otherwise keep the new weights."""
        try:
            q.load_state_dict(self.victim.module.state_dict())
        except RuntimeError:
            logger.info("the victim has another architecture: the critic starts from random weights")

    @cached_property
    def atn(self) -> ATN:
        """The trained attack; at eps = 0 it stays untrained, because training could have no effect."""
        s, background = self.s, ENVIRONMENTS[self.s.env].background
        critic = self.critic if s.learner == "critic" and s.eps > 0 else None
        seed_everything(seed_of("atn", self.seed))
        atn = ATN(sizes(s.env)[0], s.eps, s.norm, s.atn_width, background).to(self.fabric.device)
        if s.eps > 0:
            self.train_atn(atn, critic)
        return atn.requires_grad_(False).eval()

    def train_atn(self, atn: ATN, critic: nn.Module | None) -> None:
        """Train by frozen_q, or by distillation from the critic."""
        s = self.s
        if critic is None:
            if self.victim.output != "q":
                raise ValueError("learner frozen_q needs a victim with action values; this one has logits: use critic")
            loop = s.loop("frozen")
            learner: Learner = QLearner(AttackedQ(atn, self.defended), loop, self.fabric)
        else:
            loop = s.distill_loop()
            learner = Distiller(
                atn, self.defended, critic, s.distill_tau, s.distill_own, loop, self.fabric, s.distill_temporal
            )

        def check(iteration: int) -> tuple[dict, bool]:
            seed = seed_of("check", self.seed)
            found = evaluate(
                self.defended,
                ATNAttack(atn),
                self.goal,
                s.env,
                CURVE_EPISODES,
                seed,
                eps=s.eps,
                norm=s.norm,
                episode_steps=s.episode_steps,
            )
            return {"adv_rate": found.rate(), "victim_return": found.metrics()["victim_return"]}, False

        start = [{"iteration": 0} | check(0)[0]] if s.eval_every else []
        self.curve = start + self.fit("atn", self.seed, learner, self.goal, loop, check, s.eval_every)

    def fit(
        self,
        kind: str,
        seed: int,
        learner: Learner,
        goal: AdversarialReward,
        loop: Loop,
        check: Callable | None = None,
        every: int = 0,
    ) -> list[dict]:
        """Train into the store, resume from it, or reuse what is finished; one process at a time."""
        identity: dict[str, Any] = {"settings": self.s.key(kind)}
        if self.precision != "32-true":
            identity["precision"] = self.precision
        if kind != "victim":
            identity |= {"victim": self.victim_hash, "goal": goal_code(self.s.goal)}
        path, identity = place(self.store, kind, seed, identity)
        path = path.with_suffix(".pt")
        with exclusive(path):
            trained = fit(
                learner,
                goal,
                loop,
                seed_of(kind, seed),
                self.fabric,
                evaluate=check,
                evaluate_every=every,
                checkpoint=path,
                checkpoint_every=self.s.save_every,
                identity=identity,
                compile=self.fabric.device.type == "cuda",
            )
        self.trained_steps += trained.iterations * loop.num_envs
        return trained.curve

    # ---- evaluation ------------------------------------------------------------

    def use(self, atn: ATN) -> None:
        """Use this attack instead of training one. ValueError if its observations are not this environment's."""
        shape, _ = sizes(self.s.env)
        if atn.obs_shape != shape:
            raise ValueError(
                f"the attack is made for observations {atn.obs_shape}, but those of {self.s.env} are {shape}"
            )
        self.atn = atn.to(self.fabric.device)

    def evaluate(self, attack: str, target: str = "critic", keep_frames: int | None = None) -> Evaluation:
        """Evaluate complete episodes under an attack of the table, with one seed for all; rows share the results."""
        s = self.s
        if keep_frames is None:
            keep_frames = 6 if s.env == "minipong" else 2
        victim = self.smoothed(self.train_victim(self.seed + s.transfer)) if s.transfer else self.defended
        goal = make_reward(s.measure, s.env) if s.measure else self.goal
        aimed = attack == "control" or attack.startswith("targeted")
        identity = {name: getattr(s, name) for name in ("env", "episodes", "eps", "norm", "temporal", "quantize")}
        identity |= {name: getattr(s, name) for name in ("episode_steps", "pgd_steps", "timed_share")}
        identity |= {"attack": attack, "target": target if aimed else "", "frames": keep_frames}
        identity |= {"goal": s.goal, "measure": s.measure, "options": s.goal_options()}
        identity |= {"code_of_goal": goal_code(s.measure or s.goal)}
        identity |= {"victim": [victim.weights_hash(), victim.scale]}
        if attack == "atn":
            identity["weights"] = weights_hash(self.atn)
        if aimed and target == "critic":
            identity["weights"] = weights_hash(self.critic)
        path, identity = place(self.store, "evaluation", self.seed, identity)
        path = path.with_suffix(".json")
        with exclusive(path):
            if path.exists():
                return Evaluation.from_json(json.loads(path.read_text()))
            found = evaluate(
                victim,
                none if attack == "control" else self.attack(attack, target),
                goal,
                s.env,
                s.episodes,
                seed_of("evaluation", self.seed),
                eps=s.eps,
                norm=s.norm,
                temporal=s.temporal,
                policy=self.policy(target) if attack == "control" else None,
                keep_frames=keep_frames,
                episode_steps=s.episode_steps,
            )
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(found.to_json()))
        return found

    def attack(self, name: str, target: str) -> Attack:
        """An attack by name; trains what it needs."""
        s = self.s
        return make_attack(
            name,
            eps=s.eps,
            norm=s.norm,
            quantize=s.quantize,
            generator=torch.Generator(self.fabric.device).manual_seed(self.seed),
            target=self.policy(target) if name.startswith("targeted") else None,
            atn=self.atn if name == "atn" else None,
            threshold=self.timed_threshold if name == "timed" else 0.0,
            steps=s.pgd_steps,
        )

    @cached_property
    def timed_threshold(self) -> float:
        """The preference that the unattacked victim exceeds at `timed_share` of its steps."""
        seen: list[Tensor] = []

        def look(x: Tensor, victim: HasValues) -> Tensor:
            seen.append(preference(x, victim))
            return x

        seed, cut = seed_of("check", self.seed), self.s.episode_steps
        evaluate(self.defended, look, lose, self.s.env, CURVE_EPISODES, seed, episode_steps=cut)
        return float(np.quantile(torch.cat(seen).cpu().numpy(), 1 - self.s.timed_share))

    def warn_of_a_weak_victim(self) -> None:
        """Warn if the victim would not pass the gate for victims trained here."""
        environment = ENVIRONMENTS[self.s.env]
        value = self.evaluate("none").metrics()[environment.gate]
        if environment.short_of(value) > 0:
            bounds = environment.bounds
            logger.warning("a weak victim: %s %.2f is not within %s", environment.gate, value, bounds)

    def policy(self, target: str) -> Policy:
        """A target policy by name; the critic is trained here, not at the first call of the policy."""
        if target != "critic":
            zone = (self.goal.low, self.goal.high) if isinstance(self.goal, Zone | GoalZone) else None
            return make_policy(target, self.s.env, zone, sizes(self.s.env)[1])
        critic = self.critic
        return lambda x: critic(x).argmax(1)

    def unlearned_targets(self) -> list[str]:
        """All constant actions, and the script if the goal has one."""
        scripted = self.s.env in SCRIPTED and isinstance(self.goal, Zone | GoalZone)
        return [*map(str, range(sizes(self.s.env)[1])), *(["scripted"] if scripted else [])]

    def compare(self, found: Evaluation) -> dict[str, float]:
        """Lead over the best of all attacks that learn nothing, success, and the score relative to full control."""
        others = {name: self.evaluate(name) for name in UNTARGETED}
        for target in self.unlearned_targets():
            for name in ("targeted-fgsm", "targeted-pgd"):
                others[f"{name}, {target}"] = self.evaluate(name, target)
        nothing = others["none"]
        metrics = lead(found, others) | {
            "success": success_share(found, nothing),
            "best_baseline": max(other.rate() for other in others.values()),
        }
        if self.s.learner == "critic" and self.s.eps > 0:
            gain, span = found.rate() - nothing.rate(), self.evaluate("control").rate() - nothing.rate()
            metrics["above_half"] = gain - span / 2
            if span > 0:
                metrics["normalised_score"] = gain / span
        return metrics


@lru_cache(maxsize=1)
def fabric(precision: str) -> Fabric:
    """This process's device."""
    return make_fabric(precision=precision)
