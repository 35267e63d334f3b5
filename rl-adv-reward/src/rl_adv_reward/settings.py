"""All settings of a run, and their values by environment and scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Annotated

import tyro

Fractional = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|A/B",
        instance_from_str=lambda words: float(Fraction(words[0])),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [str(value)],
    ),
]
LEARNERS = ("frozen_q", "critic")
TEMPORAL = ("stack", "frame")
ATTACKS = (
    "none", "random-uniform", "random-sign", "fgsm", "pgd", "mad", "timed", "targeted-fgsm", "targeted-pgd", "atn",
    "control",
)  # fmt: skip

COUNTS = (
    "episodes", "num_envs", "batch_size", "updates",
    "victim_iterations", "victim_longest", "frozen_iterations", "critic_iterations", "distill_iterations",
)  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """One training loop: acting in many environments, a replay on the device, updates."""

    env: str
    """environment: minipong, pong or breakout"""
    iterations: int
    """number of iterations; each steps all environments once"""
    num_envs: int
    """number of environments stepped together"""
    batch_size: int
    """transitions per update"""
    updates: int
    """updates per iteration"""
    capacity: int
    """capacity of the replay, in transitions"""
    starts: int
    """iterations before the first update"""
    lr: float
    """learning rate of Adam"""
    adam_eps: float
    """epsilon of Adam"""
    gamma: float
    """discount per step"""
    n_step: int
    """steps in a return before the bootstrap"""
    sync_every: int
    """iterations between copies to the target network"""
    episode_steps: int
    """steps after which an episode is cut off; 0: the environment's default"""
    explore: tuple[float, float, float]
    """exploration: first value, last value, and the share of the iterations over which it falls"""

    def longer(self, times: int) -> Loop:
        """This many times the iterations, with unchanged exploration during the original ones."""
        first, last, share = self.explore
        return replace(self, iterations=times * self.iterations, explore=(first, last, share / times))


@dataclass(frozen=True)
class Settings:
    """One run: a victim, an attack on it towards a goal, its evaluation. The defaults are Atari Pong at paper scale."""

    env: str = "pong"
    """environment: minipong, pong or breakout"""
    goal: str = "aim_top"
    """adversarial reward: aim_top, aim_bottom, park, centre_goal, centre_line, zone, ..., or module:function"""
    miss_penalty: float = -1.0
    """subtracted from the adversarial reward per miss; -1: the goal's own (1, and 0 for centre_line_paper)"""
    bonus: float = 0.1
    """adversarial reward per step in a paddle zone"""
    low: float = -1.0
    """lower end of the zone, as a share of the field; -1: the goal's own"""
    high: float = -1.0
    """upper end of the zone; -1: the goal's own"""
    attack: str = "atn"
    """none, random-uniform, random-sign, fgsm, pgd, mad, timed, targeted-fgsm, targeted-pgd, atn; control: the target
    policy itself acts (full control)"""
    target: str = "critic"
    """target policy of the targeted attacks and of control: critic, scripted (hand-written) or an action's number"""
    learner: str = "critic"
    """how the ATN is trained: frozen_q (through the victim's head) or critic (distilled)"""
    eps: Fractional = 8 / 255
    """bound, in units of [0, 1], also as a fraction: 8/255"""
    norm: str = "linf"
    """norm of the bound: linf or l2"""
    quantize: bool = False
    """restrict perturbed observations to 8-bit values"""
    temporal: str = "stack"
    """what a step perturbs: the whole stack again, or only the newest frame, leaving earlier ones unchanged"""
    smoothing: Fractional = 0.0
    """the victim's values are means over noisy copies of its input, with this standard deviation"""
    measure: str = ""
    """goal that the evaluation measures, if different from the training goal"""
    transfer: int = 0
    """evaluate on the victim of seed + transfer (the attack is trained on the victim of the run's seed)"""
    compare: bool = False
    """also evaluate all attacks that do not learn and (critic) full control: lead, success, normalised score"""
    episodes: int = 30
    """number of episodes per evaluation"""
    episode_steps: int = 0
    """steps after which an episode is cut off, also in training; 0: the default (300 in MiniPong, 27,000 in Atari)"""
    pgd_steps: int = 10
    """number of gradients that PGD and MAD take per step of the game"""
    eval_every: int = 1000
    """iterations between points of the attack's training curve; 0: none"""
    save_every: int = 10_000
    """iterations between saves; each holds the replay"""
    num_envs: int = 64
    """number of environments stepped together in training"""
    batch_size: int = 256
    """transitions per update"""
    updates: int = 1
    """updates per iteration"""
    capacity: int = 200_000
    """capacity of the replay, in transitions"""
    starts: int = 200
    """iterations before the first update"""
    sync_every: int = 500
    """iterations between copies to the target network"""
    victim_iterations: int = 40_000
    """iterations of the victim's training; each steps all environments once"""
    victim_longest: int = 3
    """maximal training of a victim that does not pass its gate, as a multiple of victim_iterations"""
    victim_lr: float = 2.5e-4
    """learning rate of the victim"""
    victim_gamma: float = 0.99
    """discount of the victim"""
    victim_n_step: int = 3
    """steps in a return of the victim"""
    victim_hardened: Fractional = 0.0
    """light adversarial training: the victim learns on observations attacked by FGSM with this bound"""
    victim_explore: tuple[float, float, float] = (1.0, 0.01, 0.1)
    """exploration of the victim: first value, last value, share of the iterations over which it falls"""
    victim_check_every: int = 1000
    """iterations between checks of the gate; from victim_iterations on, a pass ends the training; 0: check only then"""
    victim_check_episodes: int = 20
    """number of episodes per check"""
    frozen_iterations: int = 16_000
    """iterations of frozen_q"""
    frozen_lr: float = 1e-4
    """learning rate of frozen_q"""
    frozen_gamma: float = 0.99
    """discount of the adversarial reward for frozen_q; 0 is the myopic ablation"""
    frozen_n_step: int = 3
    """steps in a return of frozen_q"""
    frozen_explore: tuple[float, float, float] = (0.2, 0.02, 0.5)
    """exploration of frozen_q: first value, last value, share of the iterations over which it falls"""
    critic_iterations: int = 16_000
    """iterations of the critic"""
    critic_lr: float = 1e-4
    """learning rate of the critic"""
    critic_gamma: float = 0.99
    """discount of the adversarial reward for the critic; 0 is the myopic ablation"""
    critic_n_step: int = 3
    """steps in a return of the critic"""
    critic_explore: tuple[float, float, float] = (0.2, 0.02, 0.5)
    """exploration of the critic: first value, last value, share of the iterations over which it falls"""
    distill_iterations: int = 4000
    """iterations of the ATN's distillation from the critic"""
    distill_own: int = 1000
    """how many of these the critic plays, before the attacked victim takes over"""
    distill_lr: float = 1e-4
    """learning rate of the distillation"""
    distill_batch: int = 256
    """states per distillation update"""
    distill_tau: float = 0.05
    """temperature of the victim's values in the distillation"""
    distill_temporal: str = "stack"
    """what the ATN is trained to perturb: see `temporal`"""
    atn_width: int = 32
    """width of the ATN"""
    adam_eps: float = 1.5e-4
    """epsilon of Adam"""
    timed_share: float = 0.25
    """share of the steps (those with the clearest preference) at which the strategically timed attack strikes"""

    def __post_init__(self) -> None:
        for name in ("victim_explore", "frozen_explore", "critic_explore"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        choices_of = {"attack": ATTACKS, "learner": LEARNERS, "temporal": TEMPORAL, "distill_temporal": TEMPORAL}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temporal == "frame" and self.norm == "l2":
            raise ValueError("temporal 'frame' needs norm 'linf': in L2, separately attacked frames add up")
        for name in ("victim_gamma", "frozen_gamma", "critic_gamma"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def goal_options(self) -> dict[str, float]:
        """The options of the goal that this run overrides."""
        options = {name: getattr(self, name) for name in ("low", "high") if getattr(self, name) >= 0}
        if self.goal in ("park", "paddle_zone"):
            options["bonus"] = self.bonus
        if self.miss_penalty >= 0:
            options["miss_penalty"] = self.miss_penalty
        return options

    def loop(self, kind: str) -> Loop:
        """How the victim, frozen_q ("frozen") or the critic is trained."""
        own = ("iterations", "lr", "gamma", "n_step", "explore")
        longest = self.victim_longest if kind == "victim" else 1
        shared = (
            "env", "num_envs", "batch_size", "updates", "capacity", "starts", "sync_every", "adam_eps", "episode_steps",
        )  # fmt: skip
        return Loop(
            **{name: getattr(self, name) for name in shared},
            **{name: getattr(self, f"{kind}_{name}") for name in own},
        ).longer(longest)

    def distill_loop(self) -> Loop:
        """How the ATN is distilled from the critic; no exploration, no target network."""
        return replace(
            self.loop("critic"),
            iterations=self.distill_iterations,
            lr=self.distill_lr,
            batch_size=self.distill_batch,
            n_step=1,
            explore=(0.0, 0.0, 1.0),
        )

    def key(self, kind: str) -> dict:
        """The settings that a training ("victim", "critic" or "atn") depends on: runs with the same values share it."""
        evaluation = {"attack", "target", "quantize", "temporal", "measure", "transfer", "compare", "episodes"}
        evaluation |= {"timed_share", "save_every", "pgd_steps"}
        bound = {"eps", "norm", "learner", "atn_width", "eval_every", "smoothing"}
        goal = {"goal", "miss_penalty", "bonus", "low", "high"}
        parts = {"victim": ("victim_",), "critic": ("victim_", "critic_")}
        parts["atn"] = ("victim_", "frozen_") if self.learner == "frozen_q" else ("victim_", "critic_", "distill_")
        left_out = {"victim": evaluation | bound | goal, "critic": evaluation | bound, "atn": evaluation}[kind]
        others = tuple(part for part in ("victim_", "frozen_", "critic_", "distill_") if part not in parts[kind])
        return {
            name: value for name, value in asdict(self).items() if name not in left_out and not name.startswith(others)
        }


_MINIPONG = Settings(
    env="minipong",
    eps=0.05,
    episodes=32,
    num_envs=64,
    batch_size=128,
    capacity=60_000,
    starts=20,
    sync_every=200,
    victim_iterations=1500,
    victim_lr=1e-3,
    victim_gamma=0.95,
    victim_n_step=1,
    victim_explore=(1.0, 0.02, 0.4),
    victim_check_every=0,
    victim_check_episodes=32,
    eval_every=200,
    save_every=1000,
    frozen_iterations=800,
    frozen_lr=1e-3,
    frozen_gamma=0.95,
    frozen_n_step=1,
    frozen_explore=(0.3, 0.02, 0.6),
    critic_iterations=2000,
    critic_lr=5e-4,
    critic_gamma=0.97,
    critic_n_step=5,
    critic_explore=(0.5, 0.05, 0.5),
    distill_iterations=600,
    distill_own=200,
    distill_lr=1e-3,
    distill_batch=128,
    adam_eps=1e-8,
)
_SMOKE = replace(
    _MINIPONG,
    episodes=4,
    episode_steps=100,
    num_envs=4,
    batch_size=8,
    capacity=400,
    victim_iterations=30,
    victim_check_episodes=0,
    eval_every=10,
    frozen_iterations=30,
    critic_iterations=30,
    critic_n_step=1,
    distill_iterations=30,
    distill_own=10,
)
PRESETS = {
    "minipong": _MINIPONG,
    "smoke": _SMOKE,
    "pong-short": replace(
        Settings(),
        victim_iterations=20_000,
        frozen_iterations=8000,
        critic_iterations=8000,
        distill_iterations=2000,
        save_every=1000,
    ),
    "pong": Settings(),
    "breakout": replace(Settings(), env="breakout", goal="park", learner="frozen_q", victim_iterations=80_000),
}
