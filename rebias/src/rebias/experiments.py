"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

from lightning.fabric import Fabric
from rich.progress import TaskID
from torch import nn

from rebias.baselines import HEX, JTT, LearnedMixin, LfF, RUBi
from rebias.data.dataset import Dataset, Reading
from rebias.data.inventory import needs
from rebias.methods import Method, ReBias, Vanilla
from rebias.models import BagNet18, Network, ResNet3D, ResNet18, SimpleConvNet, receptive_field
from rebias.settings import Settings
from rebias.supervised import DFR, Balanced, BiasContrastive
from rebias.tasks import TASKS, Task
from rebias.train import fit, load_checkpoint, make_fabric
from shared_utils.folders import project_folder, runs_folder
from shared_utils.logging import get_logger, progress
from shared_utils.preflight import Need
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.seeding import seed_everything
from shared_utils.tables import Table, load_tables, settings_hash

logger = get_logger("rebias")

PROJECT = project_folder(__file__)
PACKAGES = ("torchvision", "lightning", "numpy")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mnist-f": SimpleConvNet,
    "mnist-g": partial(SimpleConvNet, kernel_size=1),
    "imagenet9-f": ResNet18,
    "imagenet9-g": BagNet18,
    "kinetics10-f": ResNet3D,
    "kinetics10-g": partial(ResNet3D, temporal_kernels="11111"),
}
METHODS: dict[str, Callable[[Settings, Fabric, Network, list[Network], Dataset], Method]] = {
    "vanilla": Vanilla, "biased": Vanilla, "rebias": ReBias, "rubi": RUBi,
    "learnedmixin": LearnedMixin, "hex": HEX, "lff": LfF, "jtt": JTT,
    "balanced": Balanced, "biascon": BiasContrastive, "dfr": DFR,
}  # fmt: skip


def tables() -> list[Table]:
    """The project's table files, checked against the settings."""
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


@dataclass(frozen=True)
class Execution:
    """How runs are carried out; not part of their settings."""

    data_root: Path
    reading: Reading = Reading()
    precision: str = "auto"
    compile: bool = False

    def needs(self, settings: dict) -> Iterator[Need]:
        """Everything that a run of a table's settings reads and writes."""
        return needs(Settings(**settings), self.data_root, runs_folder(PROJECT))

    def __call__(self, settings: dict, seed: int) -> Outcome:
        """One run of a table; a killed run resumes from runs/checkpoints."""
        resolved = Settings(**settings)
        if resolved.network:
            return _describe(resolved.network)
        checkpoint = runs_folder(PROJECT) / "checkpoints" / f"{settings_hash(settings)}-{seed}.pt"
        fabric = _fabric(self.precision)
        task = TASKS[resolved.dataset](resolved, seed, self.data_root, fabric, self.reading)
        _, outcome = train_and_evaluate(task, checkpoint, checkpoint_every=100, compile=self.compile)
        checkpoint.unlink(missing_ok=True)
        return outcome


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    execution: Execution,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks for the tables; see `shared_utils.runlog.run_missing` for jobs."""
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    run_missing(
        "rebias",
        runs,
        log,
        execution,
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        needs=execution.needs,
    )
    return log


def train_and_evaluate(
    task: Task, checkpoint: Path | None, checkpoint_every: int = 500, compile: bool = False, watch: bool = False
) -> tuple[Method, Outcome]:
    """Train from scratch (or from the checkpoint) and evaluate the last epoch, never a chosen one.

    Args:
        task: the task to learn.
        checkpoint: file to resume from and to save to.
        checkpoint_every: steps between saves.
        compile: torch.compile the networks.
        watch: show the steps, and the losses and both accuracies after every epoch.
    """
    s = task.settings
    method = build_method(task, compile)
    last = s.pretrain_epochs + s.epochs

    def on_epoch(epoch: int, losses: dict[str, float]) -> dict:
        wanted = s.eval_every and (epoch % s.eval_every == 0 or epoch == last)
        point = task.point(method) if wanted else {}
        if watch:
            accuracies = task.accuracies(method)
            parts = [f"{name} {value:.3f}" for name, value in losses.items()]
            parts += [f"{name.replace('_', ' ')} {value:.1f} %" for name, value in accuracies.items()]
            logger.info("epoch %d of %d: %s", epoch, last, ", ".join(parts))
        return point

    with ExitStack() as stack:
        shown = stack.enter_context(progress()) if watch else None
        line = shown.add_task("training", total=last * (len(task.train) // s.batch_size)) if shown else TaskID(0)
        curve = fit(
            method,
            task.train,
            task.seed,
            on_epoch=on_epoch,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            before_step=lambda step: shown.update(line, completed=step) if shown else None,
        )
    metrics, details = task.evaluate(method)
    if s.eval_every:
        details["curve"] = [{name: float(f"{value:.5g}") for name, value in point.items()} for point in curve]
    dataset = {"train": task.train.record(), "test": [data.record() for data in task.tests]}
    precision = str(task.fabric._precision.precision)
    return method, Outcome(metrics, details, dataset, precision=precision, caveats=task.caveats)


def build_method(task: Task, compile: bool = False) -> Method:
    """New networks from the task's seed, for the task's method."""
    seed_everything(task.seed)
    f, gs = task.networks()
    for network in (f, *gs):
        network.to(memory_format=task.memory_format)
        if compile:
            network.compile()
    return METHODS[task.settings.method](task.settings, task.fabric, f, gs, task.train)


def evaluate_checkpoint(path: Path, data_root: Path, device: str, reading: Reading) -> tuple[dict[str, float], dict]:
    """Metrics of a checkpoint that `rebias train` wrote, and details such as groups.

    ValueError if it is damaged or from other networks.
    """
    content = load_checkpoint(path)
    settings = Settings(**content["run"]["settings"])
    task = TASKS[settings.dataset](settings, content["run"]["seed"], data_root, make_fabric(device), reading)
    method = build_method(task)
    for name, module in method.modules.items():
        try:
            module.load_state_dict(content["modules"][name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: has no weights for {name} of {settings.method} ({error})") from error
    return task.evaluate(method)


def _describe(name: str) -> Outcome:
    """Parameters and receptive field (in frames for the action networks, else in pixels)."""
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    network = NETWORKS[name]()
    field = receptive_field(network, axis=0 if name.startswith("kinetics10") else -1)
    return Outcome({"parameters": sum(p.numel() for p in network.parameters()), "receptive_field": field})


@lru_cache(maxsize=1)
def _fabric(precision: str) -> Fabric:
    return make_fabric(precision=precision)
