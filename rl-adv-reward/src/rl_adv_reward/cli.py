"""Command line: parse, call, print, exit code. Heavy imports are inside the commands, so --help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rl_adv_reward.settings import PRESETS, Settings
from shared_utils.folders import results_folder, runs_folder

PROGRAM = "rl-adv-reward"

if TYPE_CHECKING:
    from rl_adv_reward.evaluation import Evaluation
    from rl_adv_reward.experiments import Subject
    from rl_adv_reward.models import Victim

    Preset = Settings
else:
    Preset = tyro.conf.AvoidSubcommands[tyro.extras.subcommand_type_from_defaults(PRESETS)]


@dataclass
class Run:
    """Run the missing runs of the tables (into runs/) and print published | ours | yours."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Table ids such as table-1; default: all tables with this scale."""
    scale: str = "embedded"
    """Scale to run: smoke, embedded, atari-short or paper."""
    rows: tuple[str, ...] = ()
    """Run only these rows."""
    seeds: tuple[int, ...] = ()
    """Use these seeds instead of the table's."""
    jobs: int = 0
    """Number of parallel runs, one process each; 0: one per core on a CPU, one on CUDA."""
    precision: str = "auto"
    """auto (bf16-mixed on CUDA from Ampere on, else 32-true) or a precision of Fabric. On CUDA, losses are compiled."""
    force: bool = False
    """Repeat runs that are already there."""
    dry_run: bool = False
    """Only list the missing runs and their expected cost."""

    def __call__(self) -> None:
        from rl_adv_reward import experiments
        from shared_utils.report import print_missing, print_table
        from shared_utils.runlog import RunLog

        known = {table.id: table for table in experiments.tables()}
        for name in self.tables:
            if name not in known:
                raise ValueError(f"unknown table {name!r}; the tables are {', '.join(known)}")
        chosen = [known[name] for name in self.tables] or [t for t in known.values() if self.scale in t.scales]
        if not chosen:
            raise ValueError(f"no table has the scale {self.scale!r}")
        if self.dry_run:
            runs = RunLog(runs_folder(experiments.PROJECT) / f"{self.scale}.jsonl")
            return print_missing(chosen, self.scale, self.rows, self.seeds, runs, force=self.force)
        yours = experiments.run_tables(
            chosen, self.scale, rows=self.rows, seeds=self.seeds, force=self.force, jobs=self.jobs,
            precision=self.precision,
        )  # fmt: skip
        ours = RunLog(experiments.PROJECT / "results" / f"{self.scale}.jsonl")
        for table in chosen:
            print_table(table, self.scale, ours, yours)


@dataclass
class Common:
    """Options shared by training and evaluation."""

    settings: Preset
    """A preset; flags after it change its settings, flags of this command come before it."""
    seed: int = 0
    """Seed of training and evaluation."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    store: Path = Path("runs/artifacts")
    """Folder of trainings: interrupted ones resume from there, finished ones are reused."""

    def subject(self, settings: Settings, victim: Victim | None = None) -> Subject:
        """The victim, loaded or trained, and the attacks to try on it."""
        from rl_adv_reward.experiments import Subject
        from rl_adv_reward.train import make_fabric

        return Subject(settings, self.seed, make_fabric(self.device), self.store, victim)


@dataclass
class OnVictim(Common):
    """Options shared by the commands that take a victim."""

    victim: Path | None = None
    """The victim's file; default: train a victim."""
    format: str = "ours"
    """Format of the victim's file: ours, cleanrl or sb3."""

    def subject(self, settings: Settings, victim: Victim | None = None) -> Subject:
        from rl_adv_reward.files import load_victim

        victim = load_victim(self.victim, settings.env, self.format) if self.victim else None
        return super().subject(settings, victim)


@dataclass
class Train(Common):
    """Train a victim until it passes its gate; the same command resumes an interrupted training. JSON on stdout."""

    output: Path = Path("victim.pt")
    """File of the trained victim."""

    def __call__(self) -> None:
        from rl_adv_reward.files import save_victim

        subject = self.subject(self.settings)
        save_victim(self.output, subject.victim, self.settings.env)
        metrics = subject.evaluate("none").metrics()
        print(json.dumps({name: metrics[name] for name in ("victim_return", "miss_rate", "episode_steps")}, indent=2))


@dataclass
class Attack(OnVictim):
    """Train an attack on a victim towards a goal, evaluate it, and keep it. JSON on stdout."""

    output: Path = Path("atn.pt")
    """File of the trained attack."""

    def __call__(self) -> None:
        from rl_adv_reward.files import save_atn

        subject = self.subject(replace(self.settings, attack="atn"))
        subject.warn_of_a_weak_victim()
        save_atn(self.output, subject.atn)
        print(json.dumps(subject.evaluate("atn").metrics(), indent=2))


@dataclass
class Eval(OnVictim):
    """Evaluate the attack named in the settings (--attack), or one trained by `attack`. JSON on stdout."""

    atn: Path | None = None
    """Trained attack; its own eps and norm are used."""

    def __call__(self) -> None:
        print(json.dumps(_evaluated(self, self.atn).metrics(), indent=2))


def _evaluated(command: OnVictim, atn: Path | None, keep_frames: int | None = None) -> Evaluation:
    """An attack by name or from a file, against the command's victim."""
    from rl_adv_reward.files import load_atn

    settings = command.settings
    if atn:
        network = load_atn(atn)
        settings = replace(settings, attack="atn", eps=network.eps, norm=network.norm)
    subject = command.subject(settings)
    if atn:
        subject.use(network)
    return subject.evaluate(settings.attack, settings.target, keep_frames=keep_frames)


@dataclass
class Sweep(OnVictim):
    """Train and evaluate the attack at several bounds: a table on stdout."""

    bounds: tuple[str, ...] = ("0", "1/255", "2/255", "4/255", "8/255", "16/255")
    """Values of eps, in units of [0, 1]."""

    def __call__(self) -> None:
        from rich.table import Table as Grid

        from shared_utils.logging import console

        names = ("adv_rate", "victim_return", "flip_rate", "linf")
        grid = Grid("eps", *names)
        for bound in self.bounds:
            eps = float(Fraction(bound))
            metrics = self.subject(replace(self.settings, eps=eps, attack="atn")).evaluate("atn").metrics()
            grid.add_row(bound, *(f"{metrics[name]:.3f}" for name in names))
        console().print(grid)


@dataclass
class Play(OnVictim):
    """Play a few steps under an attack and draw clean frame, perturbation and attacked frame (.gif or .png)."""

    atn: Path | None = None
    """Trained attack; default: the attack named in the settings."""
    output: Path = Path("attack.gif")
    """File to write: a GIF, or a PNG strip."""
    steps: int = 60
    """Number of steps to draw."""

    def __call__(self) -> None:
        from rl_adv_reward.figures import draw_play

        draw_play(self.output, _evaluated(self, self.atn, self.steps).frames)


@dataclass
class Data:
    """List what is needed and what is there; nothing is ever downloaded."""

    tiny: Path | None = None
    """Folder for tiny archives. It stays empty: this project reads no data, and Pong comes with ale-py."""

    def __call__(self) -> None:
        if self.tiny:
            return self.tiny.mkdir(parents=True, exist_ok=True)
        from rich.table import Table as Grid

        from rl_adv_reward.envs import inventory
        from shared_utils.logging import console

        grid = Grid("data", "scale", "size", "licence", "found", "where", "if missing")
        for row in inventory():
            grid.add_row(*row)
        console().print(grid)


@dataclass
class Tables:
    """Regenerate results/RESULTS.md and figures from the committed run logs; no training."""

    def __call__(self) -> None:
        from rl_adv_reward import experiments
        from rl_adv_reward.figures import draw_all
        from shared_utils.report import results_page

        results, all_tables = results_folder(experiments.PROJECT), experiments.tables()
        draw_all(all_tables, results)
        (results / "RESULTS.md").write_text(results_page(PROGRAM, all_tables, results, f"{PROGRAM} run"))


@dataclass
class Record:
    """Move finished runs and the benchmark from runs/ to results/ (clean tree only) and regenerate the tables."""

    def __call__(self) -> None:
        from rl_adv_reward.experiments import PROJECT
        from shared_utils.benchmark import record
        from shared_utils.logging import get_logger

        get_logger(PROGRAM).info("%d runs recorded", record(PROJECT))
        Tables()()


@dataclass
class Bench:
    """Time ALE's vector environment, DQN training, and one ATN forward pass against one FGSM."""

    repeats: int = 5
    """Measurements per contender, alternating between them."""
    threads: int = 1
    """Number of CPU threads."""

    def __call__(self) -> None:
        from rl_adv_reward.bench import run

        run(self.repeats, self.threads)


VERBS = {
    "run": Run, "train": Train, "attack": Attack, "eval": Eval, "sweep": Sweep, "play": Play,
    "data": Data, "tables": Tables, "record": Record, "bench": Bench,
}  # fmt: skip
FLAT = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


def main() -> None:
    """Entry point: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. --debug shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        verbs = {name: _call(kind) for name, kind in VERBS.items()}
        tyro.extras.subcommand_cli_from_dict(verbs, prog=PROGRAM, args=arguments, config=FLAT)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; finished and saved work is kept; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, ValueError | TypeError | FileNotFoundError)
        told = known or isinstance(error, RuntimeError | OSError)
        print(f"{PROGRAM}: {error if told else repr(error)}", file=sys.stderr)
        sys.exit(2 if known else 1)


def _call(kind: type) -> Callable[..., None]:
    def act(command: Annotated[Callable[[], None], tyro.conf.arg(name="")]) -> None:
        command()

    act.__annotations__["command"] = Annotated[kind, tyro.conf.arg(name="")]
    act.__doc__ = kind.__doc__
    return act


if __name__ == "__main__":
    main()
