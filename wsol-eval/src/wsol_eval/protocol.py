"""The protocol (the paper's section 3.2 and 5): equal random search on train-fullsup, then one report on test.

The ledger counts every use of full supervision and every look at test. A search that was killed goes on with the same
trials: each is drawn from the seed, the method and its number alone.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared_utils.tables import settings_hash
from wsol_eval.data import Source
from wsol_eval.evaluate import Report, evaluate
from wsol_eval.models import Network, plugin
from wsol_eval.recipe import Recipe
from wsol_eval.train import Diverged, fit, load_trained

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("wsol-eval")
Hyperparameters = dict[str, Any]
FslValidation = Literal["split", "none"]


def draw(space: str, method: str, seed: int, trial: int) -> Hyperparameters:
    """Hyperparameters of one trial, as fields of `Recipe`.

    Learning rate and map size of a trial number are the same for every method; the rest is the method's own.

    Args:
        space: "paper" (appendix table 5; drop area: share of the image that a hidden patch has); "fine-tuning", the
            same with smaller learning rates and maps of 7 x 7 or 14 x 14; or "photographs".
        method: see `build_model`, or a plug-in, whose own class says what is drawn.
        seed: of the search.
        trial: number, from 0.
    """
    shared = np.random.default_rng([seed, trial])
    own = np.random.default_rng([seed, trial, zlib.crc32(name_of(method).encode())])
    if space == "paper":
        found = {"lr": _log_uniform(shared, 1e-5, 1.0), "feature_map": int(shared.choice([14, 28]))}
    elif space == "fine-tuning":
        found = {"lr": _log_uniform(shared, 1e-4, 1e-2), "feature_map": int(shared.choice([7, 14]))}
    else:
        found = {"lr": _log_uniform(shared, 0.01, 0.05), "feature_map": int(shared.choice([4, 8]))}
    if plugin.is_plugin(method):
        return found | {
            "own": tuple((n, own.uniform(*ends)) for n, ends in plugin.load(method).hyperparameters.items())
        }
    return found | (_photographs_space if space == "photographs" else _paper_space)(method, own)


def name_of(method: str) -> str:
    """A method's name; of a plug-in its class's."""
    return method.rpartition(":")[2]


def _paper_space(method: str, rng: np.random.Generator) -> Hyperparameters:
    match method:
        case "has":
            return {"has_drop_rate": rng.random(), "has_grid_size": max(1, round(224 * float(np.sqrt(rng.random()))))}
        case "acol":
            return {"acol_threshold": rng.random()}
        case "spg":
            return {"spg": _spg(rng)}
        case "adl":
            return {"adl_drop_rate": rng.random(), "adl_threshold": rng.random()}
        case "cutmix":
            return {"cutmix_beta": 1 / (2 * (1 - rng.random())) - 0.5, "cutmix_prob": rng.random()}
    return {}


def _photographs_space(method: str, rng: np.random.Generator) -> Hyperparameters:
    match method:
        case "fsl":
            return {"lr": float(rng.choice([0.01, 0.03, 0.1])), "feature_map": 8}
        case "has":
            return {"has_drop_rate": rng.uniform(0, 0.6), "has_grid_size": int(rng.choice([4, 8]))}
        case "acol":
            return {"acol_threshold": rng.uniform(0.5, 1)}
        case "spg":
            return {"spg": _spg(rng)}
        case "adl":
            return {"adl_drop_rate": rng.random(), "adl_threshold": rng.uniform(0.5, 1)}
        case "cutmix":
            return {"cutmix_beta": 1.0, "cutmix_prob": rng.random()}
    return {}


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _spg(rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """(high, low) of the three masks: low ~ U[0, 1], high ~ U[low, 1]."""
    lows = rng.random(3).tolist()
    return tuple((rng.uniform(low, 1), low) for low in lows)


class Ledger:
    """What was trained, what was judged with full supervision, and what was reported on test.

    One file may hold many protocols: each entry bears the key of its own, and a ledger sees no other's.

    Args:
        path: JSON lines, appended to; None keeps everything in memory.
        writes: False on all ranks but one: they read the file, and remember what is added.
        facts: all that the protocol's result depends on, recipe and data included; their hash is the key.
    """

    def __init__(self, path: Path | None = None, writes: bool = True, facts: dict[str, Any] | None = None):
        self.path, self.writes, self.key = path, writes, settings_hash(facts or {})
        self.entries: list[dict] = []
        if path is not None and path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    entry = json.loads(line)
                except ValueError:
                    logger.warning("%s line %d is cut off; skipped", path, number)
                    continue
                if entry.get("protocol") == self.key:
                    self.entries.append(entry)
        if facts and not self.entries:
            self.add("protocol", facts=facts)

    def add(self, kind: str, **facts: Any) -> dict:
        """Append an entry; on disk before this returns."""
        entry = {"kind": kind, "protocol": self.key, **facts}
        self.entries.append(entry)
        if self.path is not None and self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
            with open(self.path, "ab") as file:
                file.write(b"\n" * bool(torn) + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        return entry

    def find(self, kind: str, **facts: Any) -> list[dict]:
        """Entries of this protocol with these values."""
        return [e for e in self.entries if e["kind"] == kind and all(e.get(name) == v for name, v in facts.items())]

    def counts(self) -> dict[str, int]:
        """How often full supervision was used, on how many images at most, and how often test was looked at."""
        trials, looks = self.find("trial"), self.find("test")
        return {
            "uses_of_full_supervision": sum(entry["uses"] for entry in trials),
            "images_of_full_supervision": max((entry["images"] for entry in trials), default=0),
            "looks_at_test": len(looks),
        }


@dataclass(frozen=True)
class Search:
    """A finished search."""

    method: str
    values: tuple[float | None, ...]
    """the criterion on train-fullsup of each trial, in percent; None where training diverged"""
    best: int
    """number of the chosen trial"""
    recipe: Recipe
    """the chosen one"""


Train = Callable[[Recipe, int], Network]


def search(
    base: Recipe,
    space: str,
    trials: int,
    seed: int,
    train: Train,
    val: Source,
    fabric: Fabric,
    ledger: Ledger,
    criterion: str = "max_box_acc_v2",
    interval: float = 0.001,
) -> Search:
    """Random search on train-fullsup; a trial that the ledger has is not run again.

    Args:
        base: what the trials have in common.
        space: see `draw`; with one trial and space "fixed" the base is judged as it is.
        trials: equal for all methods (the paper: 30).
        seed: of the draws.
        train: makes a network from a recipe and the number of its trial.
        val: train-fullsup.
        fabric: device and ranks.
        ledger: remembers the trials.
        criterion: max_box_acc_v2 (boxes) or pxap (masks).
        interval: step between thresholds.

    Raises:
        RuntimeError: every trial diverged.
    """
    values = []
    for trial in range(trials):
        drawn = {} if space == "fixed" else draw(space, base.method, seed, trial)
        known = ledger.find("trial", method=base.method, seed=seed, trial=trial)
        if not known:
            value = _judge(replace(base, **drawn), trial, train, val, fabric, criterion, interval)
            facts = {"method": base.method, "seed": seed, "trial": trial, "hyperparameters": drawn}
            known = [ledger.add("trial", **facts, criterion=criterion, value=value, uses=1, images=len(val))]
            if ledger.path is not None and ledger.writes:
                logger.info("%s trial %d of %d: %s %s", base.method, trial + 1, trials, criterion, value)
        values.append(known[0]["value"])
    if all(value is None for value in values):
        raise RuntimeError(
            f"{base.method}: every trial diverged ({trials} of {trials}); try more trials or another seed"
        )
    best = int(np.argmax([-np.inf if value is None else value for value in values]))
    drawn = {} if space == "fixed" else draw(space, base.method, seed, best)
    return Search(base.method, tuple(values), best, replace(base, **drawn))


def _judge(
    recipe: Recipe, trial: int, train: Train, val: Source, fabric: Fabric, criterion: str, interval: float
) -> float | None:
    try:
        network = train(recipe, trial)
    except Diverged as error:
        logger.warning("trial %d: %s", trial, error)
        return None
    return evaluate(network, val, fabric, interval).metrics()[criterion]


def split_fullsup(count: int, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train-fullsup that FSL is fitted on, and those it is validated on (the journal version's 20 %)."""
    order = np.random.default_rng([seed, 80]).permutation(count)
    held_out = max(1, round(share * count))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def search_fsl(
    base: Recipe,
    space: str,
    trials: int,
    seed: int,
    val: Source,
    fabric: Fabric,
    ledger: Ledger,
    criterion: str = "max_box_acc_v2",
    interval: float = 0.001,
    validation: FslValidation = "split",
    compile_model: bool = False,
) -> tuple[Search, Network]:
    """The FSL baseline: fitted on the very images that the other methods are chosen with.

    With validation "split", hyperparameters are chosen on 20 % of train-fullsup after fitting on 80 % (the journal
    version), then the network is fitted on all of it (our decision). With "none" nothing is held out: they are judged
    on the images that were fitted (the conference version).
    """
    fitted, judged = val, val
    if validation == "split":
        kept, held_out = split_fullsup(len(val), seed)
        fitted, judged = val.subset(kept), val.subset(held_out)

    def train(recipe: Recipe, trial: int) -> Network:
        return fit(recipe, fitted, seed, fabric, compile_model=compile_model)

    found = search(base, space, trials, seed, train, judged, fabric, ledger, criterion, interval)
    ledger.add("trial", method="fsl refit", seed=seed, trial=found.best, uses=1, images=len(val))
    return found, fit(found.recipe, val, seed, fabric, compile_model=compile_model)


def report_once(
    name: str, network: Network, test: Source, fabric: Fabric, ledger: Ledger, interval: float, skipped: int = 0
) -> tuple[Report, dict]:
    """The final report on test, and its entry in the ledger. RuntimeError if there is one of this name already.

    `skipped`: broken files left out in training; those of test are added.
    """
    known = ledger.find("test", name=name)
    if known:
        raise RuntimeError(
            f"test was reported already for {name}: {known[0]['metrics']}; a second look breaks the protocol;"
            " use a new folder for a new experiment"
        )
    report = evaluate(network, test, fabric, interval, keep_images=True)
    skipped += len(test.skipped)
    facts = {"images": report.n, "metrics": report.metrics() | report.intervals(), "details": report.details()}
    return report, ledger.add(
        "test", name=name, precision=fabric.strategy.precision.precision, skipped=skipped, **facts
    )


def criterion_of(criterion: str, val: Source) -> str:
    """max_box_acc_v2 where there are boxes, pxap where there are masks; ValueError for one that cannot be computed."""
    possible = ["max_box_acc_v2"] * val.has_boxes + ["pxap"] * val.has_masks
    if not possible:
        raise ValueError("train-fullsup has neither boxes nor masks: nothing can judge a trial")
    if criterion not in ("auto", *possible):
        raise ValueError(f"criterion: this data set allows {' or '.join(possible)}, got {criterion!r}")
    return possible[0] if criterion == "auto" else criterion


def run_in_folder(
    base: Recipe,
    space: str,
    trials: int,
    seed: int,
    sources: dict[str, Source],
    fabric: Fabric,
    folder: Path,
    criterion: str = "auto",
    interval: float = 0.001,
    fsl_validation: FslValidation = "split",
    compile_model: bool = False,
) -> tuple[Search, dict[str, Any], Ledger]:
    """The whole protocol of one method, to be killed and started again at will.

    Checkpoints of the trials lie in `folder`, of finished ones only the best; ledger.jsonl lies beside them. Both are
    named by everything that the result depends on: another recipe or other data in the same folder start anew.

    Args:
        base: what the trials have in common.
        space: of the hyperparameters, see `draw`; "fixed" judges the base as it is.
        trials: equal for all methods.
        seed: of draws and training.
        sources: splits train, val and test; with "proxy" (ImageNet's 10 %) the trials are trained on that, and the
            chosen one again on all of train, as in the paper.
        fabric: device and ranks.
        folder: created where missing.
        criterion: what a trial is judged by, see `criterion_of`.
        interval: step between thresholds.
        fsl_validation: see `search_fsl`.
        compile_model: torch.compile the networks for training.

    Returns:
        The search, the ledger's entry of the report on test, and the ledger.
    """
    criterion = criterion_of(criterion, sources["val"])
    facts = {"recipe": json.loads(json.dumps(asdict(base))), "space": space, "trials": trials, "seed": seed}
    facts |= {"criterion": criterion, "interval": interval, "fsl_validation": fsl_validation}
    facts |= {"method_file": plugin.checksum(base.method)} if plugin.is_plugin(base.method) else {}
    facts["data"] = {split: source.checksum() for split, source in sources.items()}
    ledger = Ledger(folder / "ledger.jsonl", writes=fabric.is_global_zero, facts=facts)
    fabric.barrier()  # nobody writes before all have read
    name = name_of(base.method) if plugin.is_plugin(base.method) else f"{base.method}-{base.arch}"

    def path(trial: int | str) -> Path:
        return folder / f"{name}-{ledger.key}-{trial}.pt"

    if base.method == "fsl":
        options = (sources["val"], fabric, ledger, criterion, interval, fsl_validation, compile_model)
        found, network = search_fsl(base, space, trials, seed, *options)
    else:
        proxy = sources.get("proxy") if space != "fixed" else None

        def train(recipe: Recipe, trial: int) -> Network:
            known = [e for e in ledger.find("trial") if e["value"] is not None]
            best = max(known, key=lambda entry: entry["value"], default=None)
            for entry in known:
                if entry is not best:
                    path(entry["trial"]).unlink(missing_ok=True)
            return fit(recipe, proxy or sources["train"], seed, fabric, path(trial), compile_model=compile_model)

        found = search(base, space, trials, seed, train, sources["val"], fabric, ledger, criterion, interval)
        if proxy:
            whole = (found.recipe, sources["train"], seed, fabric, path("retrained"))
            network = fit(*whole, compile_model=compile_model)
        else:
            network, _ = load_trained(path(found.best), sources["train"].num_classes)
    known = ledger.find("test", name=name)
    if not known:
        skipped = sum(len(source.skipped) for split, source in sources.items() if split != "test")
        known = [report_once(name, network, sources["test"], fabric, ledger, interval, skipped)[1]]
    return found, known[0], ledger
