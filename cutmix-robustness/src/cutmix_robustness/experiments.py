"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric

from cutmix_robustness.data.benchmark import Benchmark, folder_benchmark, open_benchmark
from cutmix_robustness.data.inventory import needs
from cutmix_robustness.data.ood import outliers
from cutmix_robustness.data.sources import Batches, ResidentImages
from cutmix_robustness.draws import generator_for
from cutmix_robustness.evaluation import Evaluator, logits_of, top1_error
from cutmix_robustness.foreign import load_model
from cutmix_robustness.networks import NETWORKS, Classifier
from cutmix_robustness.recipe import Recipe
from cutmix_robustness.settings import Settings
from cutmix_robustness.train import best_of, fit, load_checkpoint, load_network, make_fabric
from shared_utils.folders import project_folder, runs_folder
from shared_utils.logging import get_logger
from shared_utils.preflight import Need, require
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.seeding import seed_everything
from shared_utils.tables import Table, load_tables, settings_hash

logger = get_logger("cutmix-robustness")

PROJECT = project_folder(__file__)
PACKAGES = ("torchvision", "lightning", "numpy", "scipy")
PAPER_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167, "cub": 5_994}
GENERAL = ("clean", "calibration", "occlusion", "fgsm", "pgd", "corruption")  # suites that work for any model
AVERAGED = (  # Table 4 of 2003.03879
    "top1_error", "fgsm_error", "center_occlusion_error", "noise_ce", "blur_ce", "weather_ce", "digital_ce",
)  # fmt: skip
WITH_BRANCHES = ("small", "resnet", "wrn", "pyramidnet", "resnext")


class Reading(NamedTuple):
    """How image files are read; see `open_benchmark`."""

    workers: int | None = None
    skip_broken: bool = False


READING = Reading()


def tables() -> list[Table]:
    """The project's table files, checked against the settings."""
    return list(_read_tables(PROJECT / "tables"))


@lru_cache(maxsize=1)  # reading takes more than a second
def _read_tables(folder: Path) -> tuple[Table, ...]:
    return tuple(load_tables(folder, [field.name for field in fields(Settings)]))


def built(known: Iterable[Table], scale: str) -> list[Table]:
    """Tables that can be run at a scale; the log names those that are not implemented (captioning)."""
    chosen = []
    for table in known:
        if scale in table.scales:
            if table.scales[scale].settings.get("task") == "captioning":
                logger.info("%s is skipped: image captioning on COCO is not part of this project", table.id)
            else:
                chosen.append(table)
    return chosen


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    data_root: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
    reading: Reading = READING,
    precision: str = "auto",
    compile: bool = False,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks for the tables; see `shared_utils.runlog.run_missing` for jobs."""
    log = RunLog(runs_folder(PROJECT) / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds)]
    run_missing(
        "cutmix-robustness",
        runs,
        log,
        partial(execute, data_root=data_root, reading=reading, precision=precision, compile=compile),
        repository=PROJECT,
        packages=PACKAGES,
        force=force,
        jobs=jobs,
        needs=partial(needs_of, data_root=data_root),
    )
    return log


def needs_of(settings: dict, *, data_root: Path) -> list[Need]:
    """Everything that a run of a table reads."""
    return list(needs(Settings(**settings), data_root))


def execute(
    settings: dict,
    seed: int,
    *,
    data_root: Path,
    reading: Reading = READING,
    precision: str = "auto",
    compile: bool = False,
) -> Outcome:
    """One run of a table; a killed run resumes from runs/checkpoints."""
    resolved = Settings(**settings)
    if resolved.task == "properties":
        return measure_properties(resolved, seed)
    checkpoint = runs_folder(PROJECT) / "checkpoints" / f"{settings_hash(settings)}-{seed}.pt"
    if resolved.task == "detection":
        from cutmix_robustness.detection import train_and_measure

        fabric = _fabric("32-true")  # bfloat16 would round the corners of anchors to 4 pixels
        outcome = train_and_measure(resolved, seed, data_root, fabric, checkpoint)
    else:
        fabric = _fabric(precision)
        benchmark = open_benchmark(resolved, seed, data_root, fabric.device, **reading._asdict())
        _, outcome = train_and_evaluate(resolved, seed, benchmark, data_root, fabric, checkpoint, compile=compile)
    for path in (checkpoint, best_of(checkpoint)):
        path.unlink(missing_ok=True)
    if resolved.initial_weights:
        outcome = replace(outcome, weights={resolved.initial_weights: _digest(data_root / resolved.initial_weights)})
    return outcome


def train_and_evaluate(
    settings: Settings,
    seed: int,
    benchmark: Benchmark,
    data_root: Path,
    fabric: Fabric,
    checkpoint: Path | None,
    checkpoint_every: int = 1000,
    compile: bool = False,
) -> tuple[Classifier, Outcome]:
    """Train from scratch (or from the checkpoint) and evaluate the last epoch.

    Also reports the error of the best epoch on the test set, as the papers do, and, if images are held out, of the
    epoch that these choose.
    """
    model = build_classifier(settings, benchmark, seed)
    if settings.initial_weights:
        path = data_root / settings.initial_weights
        load_network(model, load_checkpoint(path)["network"], str(path), keep_head=False)
    side_images = None
    if settings.outliers != "none":
        if not isinstance(benchmark.train, ResidentImages):
            raise ValueError(f"outliers need a training set that fits in memory, got {benchmark.train.name}")
        side = benchmark.train.images.shape[-1]
        side_images = outliers(settings.outliers, data_root, side, seed, fabric.device)
    curve = fit(
        model,
        settings,
        benchmark.train,
        seed,
        fabric,
        outliers=side_images,
        measure=partial(_errors, benchmark=benchmark, fabric=fabric),
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        compile=compile,
    )
    evaluator = Evaluator(model, benchmark, fabric, settings.severities, settings.probe_images, seed)
    found = evaluator.run(settings.suites)
    errors = {point["epoch"]: point["test_error"] for point in curve if "test_error" in point}
    found.metrics |= {"best_top1_error": min(errors.values()), "parameters_millions": count_parameters(model) / 1e6}
    if benchmark.validation is not None:
        best = min((point for point in curve if "validation_error" in point), key=lambda p: p["validation_error"])
        found.metrics |= {"validated_top1_error": best["test_error"], "validation_error": best["validation_error"]}
        found.details["validated_epoch"] = best["epoch"]
    if "mce" in found.metrics:
        found.metrics["average_error"] = sum(found.metrics[name] for name in AVERAGED) / len(AVERAGED)
    found.details["test_errors"] = {str(epoch): round(error, 3) for epoch, error in errors.items()}
    found.details["train"] = {name: round(value, 4) for name, value in curve[-1].items()}
    dataset = {"train": benchmark.train.record(), "test": benchmark.test.record()}
    if settings.probe_images:
        dataset["probes"] = evaluator.probes.record()
    caveats = [_skipped(part) for part in (benchmark.train, benchmark.test)] + _other_size(settings, benchmark)
    precision = str(fabric.strategy.precision.precision)
    return model, Outcome(
        found.metrics, found.details, dataset, precision=precision, caveats=tuple(filter(None, caveats))
    )


def _errors(model: Classifier, benchmark: Benchmark, fabric: Fabric) -> dict[str, float]:
    errors = {"test_error": top1_error(model, benchmark.test, fabric)}
    if benchmark.validation is not None:
        errors["validation_error"] = top1_error(model, benchmark.validation, fabric)
    return errors


def _skipped(part: Batches) -> str:
    skipped = getattr(part, "skipped", [])
    return f"{len(skipped)} files of {part.name} skipped" if skipped else ""  # type: ignore[attr-defined]


def _other_size(settings: Settings, benchmark: Benchmark) -> list[str]:
    """Caveats of the run: a training set smaller than the paper's."""
    expected = PAPER_IMAGES.get(settings.dataset, len(benchmark.train))
    own = len(benchmark.train) != expected and not settings.train_images
    return [f"{len(benchmark.train):,} of the paper's {expected:,} training images"] if own else []


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def build_classifier(settings: Settings, benchmark: Benchmark, seed: int) -> Classifier:
    """New weights from the seed.

    Raises:
        ValueError: an unknown network, or a branch regularizer on a network without residual branches.
    """
    if settings.network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {settings.network!r}")
    options: dict[str, Any] = {"num_classes": benchmark.num_classes}
    if settings.branch != "none":
        if not settings.network.startswith(WITH_BRANCHES):
            raise ValueError(f"{settings.network} has no residual branches for {settings.branch}")
        options |= {"branch": settings.branch, "branch_rate": settings.branch_rate}
    seed_everything(seed)
    return Classifier(NETWORKS[settings.network](**options), benchmark.mean, benchmark.std)


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def evaluate_checkpoint(path: Path, data_root: Path, device: str, suites: Sequence[str]) -> dict[str, float]:
    """Metrics of a checkpoint that `train` wrote. ValueError if it is damaged or from another network."""
    content = load_checkpoint(path)
    settings = Settings(**content["run"]["settings"])
    fabric = make_fabric(device)
    benchmark = open_benchmark(settings, content["run"]["seed"], data_root, fabric.device)
    model = build_classifier(settings, benchmark, content["run"]["seed"])
    load_network(model, content["network"], str(path))
    model.to(fabric.device).to(memory_format=torch.channels_last)
    seed = content["run"]["seed"]
    evaluator = Evaluator(model, benchmark, fabric, settings.severities, settings.probe_images, seed)
    return evaluator.run(suites or settings.suites).metrics


def evaluate_model(
    where: str,
    data: str,
    data_root: Path,
    device: str,
    suites: Sequence[str],
    weights: Path | None = None,
    probe_images: int = 0,
    reading: Reading = READING,
) -> dict[str, float]:
    """Metrics of any model that `load_model` knows.

    Args:
        where: the model, see `load_model`.
        data: cifar10, cifar100, cifar10-jpeg, imagenet, or a folder with one folder of images per class.
        data_root: folder that holds a named data set.
        device: auto, cpu or cuda.
        suites: default: clean, calibration, occlusion, fgsm, pgd and corruption.
        weights: see `load_model`.
        probe_images: see `Evaluator`.
        reading: how image files are read.
    """
    suites, fabric = suites or GENERAL, make_fabric(device)
    if data in PAPER_IMAGES or data == "cifar10-jpeg":
        settings = Settings(dataset=data, augment="none", suites=tuple(suites))
        require(needs(settings, data_root))
        benchmark = open_benchmark(settings, 0, data_root, fabric.device, **reading._asdict())
    else:
        benchmark = folder_benchmark(Path(data), fabric.device, **reading._asdict())
    model = load_model(where, benchmark.num_classes, benchmark.mean, benchmark.std, weights).to(fabric.device)
    logits, _ = logits_of(model, benchmark.test.select(torch.arange(1)), fabric)
    if logits.shape[1] != benchmark.num_classes:
        raise ValueError(f"{where} has {logits.shape[1]} classes, {data} has {benchmark.num_classes}")
    return Evaluator(model, benchmark, fabric, probe_images=probe_images).run(suites).metrics


def measure_properties(settings: Settings, seed: int) -> Outcome:
    """Table 2, measured: image i is i + 1 everywhere, so every pixel shows where it came from."""
    n, side = 64, 32
    model = Classifier(torch.nn.Identity(), (0.0,) * 3, (1.0,) * 3)
    recipe = Recipe(settings, model, torch.nn.Identity())
    recipe.generator.manual_seed(generator_for(seed).initial_seed())
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 3, side, side).contiguous()
    images = recipe.cutout(images) if recipe.cutout else images
    own = torch.arange(1.0, n + 1)[:, None, None]
    partner = 0.0
    if recipe.mix is not None:
        batch = recipe.mix(images, torch.arange(n))
        images, partner = batch.images, 100 * (1 - batch.lam.double().mean().item())
    pixels = images[:, 0]
    blank, foreign = pixels == 0, (pixels - pixels.round()).abs().lt(1e-6) & (pixels != own)
    return Outcome(
        {
            "informative_pixels": 100 - 100 * blank.double().mean().item(),
            "dropped_pixels": 100 * foreign.double().mean().item(),
            "partner_label": partner,
        }
    )


@lru_cache(maxsize=1)
def _fabric(precision: str) -> Fabric:
    return make_fabric(precision=precision)
