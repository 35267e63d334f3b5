"""What the command line does with a user's own data: train, evaluate, search. Not tied to any table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared_utils.preflight import Need, require
from wsol_eval.evaluate import evaluate
from wsol_eval.protocol import FslValidation, run_in_folder
from wsol_eval.recipe import OnData, OnDevice, Recipe
from wsol_eval.score import describe
from wsol_eval.scoremaps import ScoreMaps
from wsol_eval.sources import needs_of, source_of, sources_of
from wsol_eval.train import fit, load_trained, make_fabric


def train(recipe: Recipe, on: OnData, device: OnDevice, output: Path, checkpoint_every: int, proxy: bool) -> None:
    """Train one model; fsl is fitted on train-fullsup, the others on train-weaksup."""
    split = "val" if recipe.method == "fsl" else "train"
    require([*needs_of(on, (split,)), *_weights(recipe)])
    source = source_of(on, split, proxy)
    fabric = make_fabric(device.device, device.precision)
    fit(recipe, source, on.seed, fabric, output, checkpoint_every, device.compile)


def evaluate_checkpoint(
    checkpoint: Path,
    on: OnData,
    device: OnDevice,
    split: str,
    cam_curve_interval: float,
    tau: float | None,
    scoremap_root: Path | None,
    scoremap_dtype: str,
) -> dict[str, Any]:
    """Everything measured of a checkpoint on a split."""
    require(needs_of(on, (split,)))
    source = source_of(on, split)
    network, recipe = load_trained(checkpoint, source.num_classes)
    fabric = make_fabric(device.device, device.precision)
    store = ScoreMaps(scoremap_root, scoremap_dtype) if scoremap_root else None
    report = evaluate(network, source, fabric, cam_curve_interval, store=store)
    facts = {"dataset": on.dataset, "split": split, "method": recipe.method, "arch": recipe.arch}
    return facts | {"skipped": len(source.skipped)} | describe(report, tau)


def search(
    output: Path,
    recipe: Recipe,
    on: OnData,
    device: OnDevice,
    trials: int,
    space: str,
    criterion: str,
    cam_curve_interval: float,
    fsl_validation: FslValidation,
) -> dict[str, Any]:
    """The protocol of one method; the ledger's counts stand beside the result."""
    require([*needs_of(on), *_weights(recipe)])
    sources, fabric = sources_of(on), make_fabric(device.device, device.precision)
    options = (sources, fabric, output, criterion, cam_curve_interval, fsl_validation, device.compile)
    found, entry, ledger = run_in_folder(recipe, space, trials, on.seed, *options)
    chosen = ledger.find("trial", method=found.method, trial=found.best)[0]["hyperparameters"]
    result = {"method": found.method, "trials": list(found.values), "chosen": chosen, "test": entry["metrics"]}
    return result | {"skipped": entry["skipped"], "protocol": ledger.key} | ledger.counts()


def _weights(recipe: Recipe) -> list[Need]:
    """A file of pretrained weights, where one is named."""
    if recipe.pretrained in (None, "imagenet"):
        return []
    what = f"weights of {recipe.arch} ({recipe.pretrained})"
    return [Need(what, "name a file with torchvision's state dict, or imagenet", Path(recipe.pretrained).is_file())]
