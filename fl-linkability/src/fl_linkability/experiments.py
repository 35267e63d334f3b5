"""From the settings of a table's row to the outcome of a run; runs that share a federation simulate it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor, nn

from fl_linkability import catalogue, mitigations, studies
from fl_linkability.data.bundle import ANONYMOUS, Background, FederatedBundle, Rows
from fl_linkability.data.load import load_bundle
from fl_linkability.data.reading import Reading
from fl_linkability.data.texts import word_vectors
from fl_linkability.engines import SimulationResult, simulate
from fl_linkability.evaluate import WORDS_TRIED, Adversary, macro_ap, mean_utility, utility
from fl_linkability.federation import FedAvgConfig
from fl_linkability.mitigations import Mitigation
from fl_linkability.models import build_model
from fl_linkability.needs import caveats, weights
from fl_linkability.settings import BACKGROUND_KINDS, DATA_SETTINGS, Settings
from fl_linkability.store import UpdateStore
from fl_linkability.train import (
    LocalSGD,
    State,
    as_input,
    batch_table,
    make_fabric,
    train_batched,
    trained_state,
    unflatten,
)
from shared_utils.files import whole_file
from shared_utils.folders import runs_folder
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Run, Table, settings_hash

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from shared_utils.preflight import Need

PACKAGES = ("numpy", "scikit-learn", "lightning", *(["flwr"] if find_spec("flwr") else []))
BACKGROUND_EPOCHS = 20
BATCHES_READ = 1000  # at a time, in centralised training


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    reading: Reading,
    *,
    needs: Callable[[dict], Iterable[Need]] | None = None,
    precision: str = "auto",
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
    jobs: int = 0,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks for the tables; see `shared_utils.runlog.run_missing` for jobs."""
    log = RunLog(runs_folder(catalogue.PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    run_missing(
        "fl-linkability",
        runs,
        log,
        partial(execute, reading=reading, precision=precision),
        repository=catalogue.PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        group=_federation_of,
        needs=needs,
    )
    return log


def _federation_of(run: Run) -> tuple:
    settings = Settings(**run.settings)
    return json.dumps(settings.federation(), sort_keys=True), run.seed


def execute(
    settings: Sequence[dict], seeds: Sequence[int], *, reading: Reading, precision: str = "auto"
) -> list[Outcome]:
    """All runs that share a federation (and so a seed); an interrupted one resumes from runs/checkpoints."""
    resolved = [Settings(**each) for each in settings]
    run = Experiment(resolved[0], seeds[0], reading, _fabric(precision))
    checkpoints = (
        runs_folder(catalogue.PROJECT) / "checkpoints" / f"{settings_hash(resolved[0].federation())}-{seeds[0]}"
    )
    run.folder = checkpoints if resolved[0].model != "mlp" else None  # runs of seconds start from scratch
    outcomes = [run.measure(each) for each in resolved]
    if run.folder:
        shutil.rmtree(run.folder, ignore_errors=True)
    return outcomes


@dataclass
class Experiment:
    """One federation and everything that is measured on it.

    Args:
        settings: of the federation; what is measured may differ from run to run.
        seed: of data, weights and order.
        reading: where data sets are, and how they are read.
        fabric: device, precision and ranks.
        folder: for updates and checkpoint on disk.
    """

    settings: Settings
    seed: int
    reading: Reading
    fabric: Fabric
    folder: Path | None = None
    on_round: Callable[[int], None] = lambda finished: None

    @cached_property
    def bundle(self) -> FederatedBundle:
        """The data."""
        data = replace(Settings(), **{name: getattr(self.settings, name) for name in DATA_SETTINGS})
        return _bundle(data, self.seed, self.reading, self.fabric)

    @cached_property
    def mitigation(self) -> Mitigation:
        """The mitigation that the settings name."""
        return make_mitigation(self.settings, self.bundle, self.seed)

    @cached_property
    def simulation(self) -> SimulationResult:
        """The federation, run once."""
        s = self.settings
        config = FedAvgConfig(s.rounds, s.clients_per_round, self.local(s.local_epochs), self.seed)
        return simulate(
            self.bundle,
            self.model,
            config,
            self.mitigation,
            s.engine,
            initial=self.initial(),
            evaluate=partial(utility, self.bundle),
            folder=self.folder,
            fabric=self.fabric,
            clients_at_once=s.clients_at_once,
            keep=s.keep,
            on_round=self.on_round,
        )

    @cached_property
    def _image_scores(self) -> tuple[np.ndarray, np.ndarray]:
        return studies.image_scores(self.bundle, self.seed)

    def model(self) -> nn.Module:
        """A fresh network; its weights depend only on the seed."""
        torch.manual_seed(self.seed)
        return build_model(self.settings, self.bundle).to(self.fabric.device)

    def local(self, epochs: int) -> LocalSGD:
        """A client's local training, for this number of epochs."""
        s = self.settings
        return LocalSGD(epochs, s.batch_size, s.lr, s.momentum, s.weight_decay)

    def measure(self, settings: Settings) -> Outcome:
        """What the settings measure on the federation. ValueError if they belong to another one."""
        if settings.federation() != self.settings.federation():
            raise ValueError("these settings belong to another federation")
        details: dict
        if settings.measure == "describe":
            metrics, details = describe(self), {}
        elif settings.measure == "images":
            metrics, details = studies.image_sets(*self._image_scores, settings.set_size, self.seed)
        elif settings.measure == "utility" and settings.learner != "federated":
            metrics, details = LEARNERS[settings.learner](self)
        else:
            metrics, details = self._attack(settings)
        return Outcome(
            {name: float(value) for name, value in metrics.items()}, details, self.bundle.record(),
            weights(settings), str(self.fabric.strategy.precision.precision), caveats(settings, self.bundle),
        )  # fmt: skip

    def _attack(self, settings: Settings) -> tuple[dict, dict]:
        found = self.simulation
        if found.updates is None:
            raise RuntimeError("the updates are only on rank 0")
        metrics, users = mean_utility(found.utility)
        details: dict = {"users": {}}
        if settings.measure != "utility":
            adversary = Adversary(found.updates, self.bundle.users.n_users, self.seed, settings)
            more, details = MEASURES[settings.measure](adversary)
            metrics |= more
        details.setdefault("users", {}).update(users)
        noise = self.mitigation.noise_std * np.sqrt(found.dimension) / found.raw_norm
        metrics |= {"noise_relative": noise, "updates": len(found.updates)}
        answers = self._most_answers(found.updates)
        metrics["epsilon"] = self.mitigation.epsilon_of(answers)
        metrics["model_epsilon"] = self.mitigation.model_epsilon_of(answers)
        metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
        return metrics, details | {"engine": found.engine, "faults": found.faults[:20], "n_faults": len(found.faults)}

    def _most_answers(self, updates: UpdateStore) -> int:
        """How often the busiest anonymous device answered in the whole run."""
        device = updates.column("device")[updates.column("role") == ANONYMOUS]
        return int(np.bincount(device).max())

    def central(self, data: tuple[Tensor | Rows, Tensor], epochs: int) -> Iterator[State]:
        """The same network and steps without a federation: its weights after each epoch over all data.

        BATCHES_READ batches are read at a time; momentum is reset at each such part.
        """
        model = self.model()
        state, device = trained_state(model), self.fabric.device
        x, y = data
        if len(x) == 0:
            raise ValueError(f"{self.bundle.name}: no images to train on: the background is empty")
        rng = np.random.default_rng([self.seed, 11])
        size = self.settings.batch_size * BATCHES_READ
        for _ in range(epochs):
            for part in np.array_split(order := rng.permutation(len(x)), range(size, len(order), size)):
                rows, weights = batch_table([np.arange(len(part))[None]], [0], self.settings.batch_size)
                xs, ys, rows, weights = (each.to(device) for each in (x[part], y[part], rows, weights))
                delta, _ = train_batched(model, state, xs, ys, rows, weights, self.local(1), self.fabric.autocast)
                change = unflatten(delta[0], state)
                state = {name: value + change[name] for name, value in state.items()}
            yield state

    def initial(self) -> State:
        """Weights before the first round: new ones, or those pretrained on the background."""
        if not self.settings.pretrain_epochs:
            return trained_state(self.model())
        background = self.bundle.background
        *_, state = self.central((background.x, background.y), self.settings.pretrain_epochs)
        return state


# ---- the user's own federation ----------------------------------------------------------------------------


def save_settings(folder: Path, settings: Settings, seed: int) -> None:
    """Save the settings next to the updates, for `attack_folder`."""
    with whole_file(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps({"settings": asdict(settings), "seed": seed}, indent=1))


def load_settings(folder: Path) -> tuple[Settings, int]:
    """What `save_settings` wrote. FileNotFoundError if there is no such file."""
    path = folder / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no federation here (settings.json is missing)")
    content = json.loads(path.read_text())
    return Settings(**content["settings"]), content["seed"]


def attack_folder(folder: Path, settings: Settings, seed: int) -> dict[str, float]:
    """Metrics of an attack on the updates in a folder. ValueError if the measure needs more than updates."""
    if settings.measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {settings.measure!r}")
    store = UpdateStore.open(folder / "updates")
    users = int(store.column("user").max()) + 1
    return MEASURES[settings.measure](Adversary(store, users, seed, settings))[0]


# ---- other measurements -------------------------------------------------------------------------------------


def _central(run: Experiment) -> tuple[dict, dict]:
    """Table 2, centralised SGD: as many passes over all users' images as the federation makes."""
    s, users = run.settings, run.bundle.users
    epochs = max(1, round(s.rounds * s.clients_per_round * s.local_epochs / users.n_devices))
    *_, state = run.central((users.x, users.y), epochs)
    metrics, details = mean_utility([utility(run.bundle, run.model(), state)])
    return metrics, {"users": details}


def _background_only(run: Experiment) -> tuple[dict, dict]:
    """No federation: trained on the background only; best epoch on the test set (an optimistic control)."""
    background, model = run.bundle.background, run.model()
    states = run.central((background.x, background.y), BACKGROUND_EPOCHS)
    points = [utility(run.bundle, model, state) for state in states]
    best = min if run.bundle.task == "number" else max  # utility is then an error
    metrics, details = mean_utility([best(points, key=lambda point: point["population"])])
    return metrics, {"users": details}


def _nearest_neighbours(run: Experiment) -> tuple[dict, dict]:
    """Table 2, K-NN: the ten nearest of all users' images, by pixels or by the features of a frozen network."""
    users, result = run.bundle.users, {}
    if run.bundle.vocabulary:
        raise ValueError(f"learner k-nn compares images, but {run.bundle.name} has texts")
    model = (KNeighborsRegressor if run.bundle.task == "labels" else KNeighborsClassifier)(10)
    model.fit(as_input(users.x[:]).flatten(1).numpy(), users.y.numpy())
    for name, (x, y) in (("user", run.bundle.user_test[:2]), ("population", run.bundle.test)):
        guess = model.predict(as_input(x[:]).flatten(1).numpy())
        if run.bundle.task == "labels":  # shares of the ten that have each label
            result[name] = macro_ap(guess, y.numpy())
        else:
            result[name] = 100 * float((guess == y.numpy()).mean())
    return mean_utility([result])[0], {}


def _chance(run: Experiment) -> tuple[dict, dict]:
    """Uniform guessing: 1/classes, five words of all words, the share of positives, or the error of a random number."""
    bundle = run.bundle
    if bundle.task == "labels":
        chance = 100 * float(bundle.test[1].mean())
    elif bundle.task == "number":
        guesses = torch.arange(1, bundle.n_classes + 1)
        chance = float((bundle.test[1][:, None] - guesses).abs().mean())
    else:
        chance = 100 * (WORDS_TRIED if bundle.task == "words" else 1) / bundle.n_classes
    return {"user_accuracy": chance, "population_accuracy": chance}, {}


def describe(run: Experiment) -> dict[str, float]:
    """Sizes of data and network (Tables 1 and 6)."""
    bundle, s = run.bundle, run.settings
    per_device = np.bincount(bundle.users.device.numpy())
    size = len(bundle.background.x)
    return {
        "users": bundle.users.n_users,
        "examples": len(bundle.users.x),
        "examples_per_device": float(per_device.mean()),
        "classes": bundle.n_classes,
        "parameters": sum(v.numel() for v in trained_state(run.model()).values()),
        "background_size": size,
        "clusters": s.clusters,
        "cluster_to_device": size / s.clusters / float(per_device.mean()),
    }


LEARNERS = {"central": _central, "background": _background_only, "k-nn": _nearest_neighbours, "chance": _chance}
MEASURES = {
    "reid": Adversary.reid,
    "pairs": Adversary.pairs,
    "all-pairs": Adversary.all_pairs,
    "open": Adversary.open,
    "protocol": Adversary.protocol,
    "open-reid": studies.open_reid,
    "open-matching": studies.open_matching,
    "stage": studies.stage,
    "groups": studies.groups,
}


def make_mitigation(settings: Settings, bundle: FederatedBundle, seed: int) -> Mitigation:
    """The mitigation of the settings; two joined by a plus sign are applied in that order."""
    parts = [_one_mitigation(name, settings, bundle, seed) for name in settings.mitigation.split("+")]
    return parts[0] if len(parts) == 1 else mitigations.Compose(*parts)


def _one_mitigation(name: str, s: Settings, bundle: FederatedBundle, seed: int) -> Mitigation:
    if name in BACKGROUND_KINDS:
        background, cluster = bundle.background, None
        if name == "mm-aug":
            cluster = cluster_background(background, s.clusters, seed)
        kind = BACKGROUND_KINDS[name]
        return mitigations.Background(background.x, background.y, kind, s.ratio, cluster, s.who, s.refresh)
    if name == "noise":
        return mitigations.GaussianNoise(s.std, s.who)
    if name == "style-jitter":
        return mitigations.StyleJitter(s.who)
    if name == "clip":
        return mitigations.Clip(s.clip_norm, s.who)
    if name == "local-dp":
        return mitigations.LocalDP(s.clip_norm, s.epsilon, s.delta, s.who)
    if name == "central-dp":
        return mitigations.CentralDP(s.clip_norm, s.noise_multiplier, s.delta)
    return Mitigation(s.who)


def cluster_background(background: Background, clusters: int, seed: int) -> np.ndarray:
    """Modes of the background by k-means, (n,): on features if it was embedded, else on words or pixels."""
    vectors = background.x if background.features is None else background.features
    if not 1 <= clusters <= len(vectors):
        raise ValueError(f"clusters must lie in 1 .. {len(vectors)} (background samples), got {clusters}")
    words = vectors.dtype == torch.int64
    flat = word_vectors(vectors[:].numpy(), seed) if words else as_input(vectors[:]).flatten(1).numpy()
    return KMeans(clusters, n_init=3, random_state=seed).fit_predict(flat)


@lru_cache(maxsize=4)
def _bundle(data: Settings, seed: int, reading: Reading, fabric: Fabric) -> FederatedBundle:
    """Rows of a table that differ in other settings share one copy."""
    return load_bundle(data, seed, reading, fabric)


@lru_cache(maxsize=1)
def _fabric(precision: str) -> Fabric:
    return make_fabric(precision=precision)
