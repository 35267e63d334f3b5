"""From the settings of a table's row to the outcome of a run."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from scipy import stats

from satrn.complexity import costs
from satrn.data.inventory import TEST_FOLDERS, test_folder
from satrn.data.streams import RenderedWords, normalise
from satrn.data.words_lmdb import LmdbMixture, LmdbWords
from satrn.evaluate import aspect_ratios, correct, group_by_ratio, line_jumps
from satrn.models import SATRN
from satrn.pretrained import load_pretrained
from satrn.settings import Settings
from satrn.train import build_model, fit, load_checkpoint, make_fabric
from shared_utils.logging import get_logger
from shared_utils.runlog import Outcome, RunLog, run_missing
from shared_utils.tables import Table, load_tables, settings_hash

PROJECT = Path(__file__).parents[2]
PACKAGES = ("torchvision", "lightning", "numpy")
IRREGULAR = ("IC15", "SVTP", "CT80")
CURVE_ANGLES = tuple(range(0, 360, 30))
CURVE_WORDS = 200
SHEET_WORDS = 8
logger = get_logger("satrn")


def tables() -> list[Table]:
    """All table files, checked against the settings. FileNotFoundError outside a source checkout."""
    if not (PROJECT / "tables").is_dir():
        raise FileNotFoundError("the tables are in the source checkout: run from an editable install of it")
    return load_tables(PROJECT / "tables", [field.name for field in fields(Settings)])


def run_tables(
    chosen: Sequence[Table],
    scale: str,
    data_root: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    force: bool = False,
    jobs: int = 0,
    skip_broken: bool = False,
) -> RunLog:
    """Run what runs/<scale>.jsonl lacks of the tables; see `shared_utils.runlog.run_missing` for jobs."""
    log = RunLog(PROJECT / "runs" / f"{scale}.jsonl")
    runs = [run for table in chosen for run in table.runs(scale, rows, seeds or None)]
    execute_here = partial(execute, data_root=data_root, skip_broken=skip_broken)
    run_missing("satrn", runs, log, execute_here, repository=PROJECT, packages=PACKAGES, force=force, jobs=jobs)
    return log


def execute(settings: dict, seed: int, *, data_root: Path, skip_broken: bool = False) -> Outcome:
    """One run of a table; killed and started again, it goes on from runs/checkpoints."""
    s = Settings(**settings)
    if s.count_only:
        return count(s)
    checkpoint = PROJECT / "runs" / "checkpoints" / f"{settings_hash(settings)}-{seed}.pt"
    _, outcome = train_and_evaluate(s, seed, data_root, _fabric(), checkpoint, skip_broken=skip_broken)
    for path in (checkpoint, _control_path(checkpoint)):
        path.unlink(missing_ok=True)
    return outcome


@lru_cache(maxsize=1)
def _fabric() -> Fabric:
    return make_fabric()


def count(s: Settings) -> Outcome:
    """Parameters and FLOPs (millions, billions), by the paper's rule and with keys and values kept."""
    counted = costs(s.network())
    measured = {
        "parameters": counted.parameters,
        "parameters_m": counted.parameters / 1e6,
        "flops_b": counted.flops / 1e9,
        "flops_kept_b": counted.flops_kept / 1e9,
    }
    return Outcome(measured)


def train_and_evaluate(
    s: Settings,
    seed: int,
    data_root: Path,
    fabric: Fabric,
    checkpoint: Path | None = None,
    *,
    checkpoint_every: int = 1000,
    compile: bool = False,
    workers: int = 4,
    skip_broken: bool = False,
    start: Path | None = None,
    on_point: Callable[[dict], None] = lambda point: None,
) -> tuple[SATRN, Outcome]:
    """Train (on from the checkpoint where there is one) and evaluate the last step, never a chosen one.

    Args:
        s: settings.
        seed: of weights, words and order.
        data_root: with training/ and evaluation/.
        fabric: device, precision, ranks.
        checkpoint: file to resume from and to save to.
        checkpoint_every: steps between saves.
        compile: through torch.compile.
        workers: loader processes.
        skip_broken: go on without broken images.
        start: checkpoint whose weights to begin with, carried over by character; None: fresh ones.
        on_point: called with every point of the training curve.
    """
    data = training_data(s, seed, data_root, fabric, workers, skip_broken)
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "compile": compile, "on_point": on_point}
    model = build_model(s, seed, fabric)
    if start is not None:
        model.load_state_dict(load_pretrained(start, s.charset).state_dict())
    details = {"curve": fit(model, data, s, seed, fabric, checkpoint=checkpoint, **options)}
    control = None
    if s.control:
        squashed = replace(s, squash_height=True)
        control = build_model(squashed, seed, fabric)
        path = None if checkpoint is None else _control_path(checkpoint)
        details["control_curve"] = fit(control, data, squashed, seed, fabric, checkpoint=path, **options)
    metrics, more, tests = evaluate(model, s, seed, data_root, fabric, skip_broken, control)
    return model, Outcome(metrics, details | more, {"train": data.record(), "test": tests})


def _control_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.stem + "-control" + checkpoint.suffix)


def training_data(
    s: Settings, seed: int, data_root: Path, fabric: Fabric, workers: int, skip_broken: bool
) -> RenderedWords | LmdbMixture:
    """The settings' training words."""
    if s.dataset == "rendered":
        return RenderedWords(s, s.train_images, 10_000 + seed, fabric.device)
    return LmdbMixture([data_root / "training" / name for name in s.train_sets], s, workers, skip_broken)


def evaluate(
    model: SATRN,
    s: Settings,
    seed: int,
    data_root: Path,
    fabric: Fabric,
    skip_broken: bool = False,
    control: SATRN | None = None,
) -> tuple[dict, dict, list]:
    """Metrics (percent), details for figures, and records of the test sets."""
    model.eval()
    if s.dataset == "rendered":
        return _evaluate_rendered(model, control, s, seed, fabric)
    return _evaluate_real(model, s, data_root, skip_broken)


def evaluate_checkpoint(
    path: Path, data_root: Path, device: str, test_sets: Sequence[str], skip_broken: bool
) -> dict[str, float]:
    """Metrics of a checkpoint that `satrn train` wrote; other test sets than its own where they are named."""
    content = load_checkpoint(path)
    s = Settings(**content["run"]["settings"])
    s = replace(s, test_sets=tuple(test_sets)) if test_sets else s
    fabric = make_fabric(device)
    return evaluate(load_model(path, fabric), s, content["run"]["seed"], data_root, fabric, skip_broken)[0]


def load_model(path: Path, fabric: Fabric) -> SATRN:
    """The network of a checkpoint, ready to read. ValueError where the weights are of another network."""
    content = load_checkpoint(path)
    model = build_model(Settings(**content["run"]["settings"]), 0, fabric)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the settings beside them ({error})") from error
    return model.eval()


# ---- real words ------------------------------------------------------------


def _evaluate_real(model: SATRN, s: Settings, data_root: Path, skip_broken: bool) -> tuple[dict, dict, list]:
    metrics: dict[str, float] = {}
    hits: dict[str, np.ndarray] = {}
    records = []
    for name in s.test_sets:
        words = LmdbWords(test_folder(data_root, name), s.img_size, s.in_channels, skip_broken)
        expected = TEST_FOLDERS.get(name, (name, len(words)))[1]
        if len(words) != expected:
            logger.warning("%s has %d words, the paper's has %d: not comparable", name, len(words), expected)
        hits[name] = correct(model, words)
        metrics[name] = 100 * float(hits[name].mean())
        for angle in s.test_angles:
            key = f"rotated_{angle:g}"
            hits[key] = np.append(hits.get(key, []), correct(model, words, degrees=angle))
        records.append(words.record())
    metrics["accuracy"] = 100 * float(np.concatenate([hits[name] for name in s.test_sets]).mean())
    metrics |= {key: 100 * float(np.mean(values)) for key, values in hits.items() if key.startswith("rotated_")}
    if set(IRREGULAR) <= hits.keys():
        metrics["irregular_mean"] = float(np.mean([metrics[name] for name in IRREGULAR]))
    return metrics | _sizes(s), {}, records


def _sizes(s: Settings) -> dict[str, float]:
    counted = count(s).metrics
    return {name: counted[name] for name in ("parameters_m", "flops_b")}


# ---- rendered words ------------------------------------------------------------


def _evaluate_rendered(
    model: SATRN, control: SATRN | None, s: Settings, seed: int, fabric: Fabric
) -> tuple[dict, dict, list]:
    test = RenderedWords(s, s.test_images, 20_000 + seed, fabric.device)
    hits = correct(model, test, strict=True)
    metrics = {"accuracy": 100 * float(hits.mean())} | _sizes(s)
    details: dict[str, Any] = {}
    if control is not None:
        control.eval()
        other = correct(control, test, strict=True)
        metrics["control_accuracy"] = 100 * float(other.mean())
        metrics["gain"] = metrics["accuracy"] - metrics["control_accuracy"]
        details["mcnemar"] = mcnemar(hits, other)
    if s.warp == "rotate":
        names = {"accuracy_by_angle": model} | ({"control_accuracy_by_angle": control} if control else {})
        details |= {name: rotation_curve(each, s, seed, fabric) for name, each in names.items()}
    if s.warp == "upright_or_vertical":
        metrics["ratio_auc"], details["ratio_groups"] = _ratio_report(model, test)
    if s.warp == "multi_line":
        metrics["one_jump"] = _one_jump(model, test)
    if s.control:
        details["sheet"] = reading_sheet(model, test)
    return metrics, details, [test.record()]


def rotation_curve(model: SATRN, s: Settings, seed: int, fabric: Fabric) -> dict[str, float]:
    """Accuracy in percent by angle: the same words drawn at every angle."""
    words = replace(s, warp="straight")
    curve = {}
    for angle in CURVE_ANGLES:
        test = RenderedWords(words, CURVE_WORDS, 30_000 + seed, fabric.device, degrees=angle)
        curve[str(angle)] = round(100 * float(correct(model, test, strict=True).mean()), 2)
    return curve


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Words that only one of two models read, and the exact two-sided p that both are as good."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    p = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": float(f"{p:.3g}")}


def _ratio_report(model: SATRN, test: RenderedWords) -> tuple[float, dict]:
    """Share of (vertical, upright) pairs in which the vertical word has the higher r, and the paper's groups."""
    ratios = aspect_ratios(model, test.images).cpu().numpy()
    vertical = (test.angles == 90).numpy()
    wins = stats.mannwhitneyu(ratios[vertical], ratios[~vertical]).statistic
    groups = {
        "vertical": group_by_ratio(ratios[vertical]),
        "upright": group_by_ratio(ratios[~vertical]),
        "median_vertical": round(float(np.median(ratios[vertical])), 4),
        "median_upright": round(float(np.median(ratios[~vertical])), 4),
    }
    return float(wins / (vertical.sum() * (~vertical).sum())), groups


def _one_jump(model: SATRN, test: RenderedWords) -> float:
    """Percent of correctly read two-line words whose attention moves down exactly once."""
    read = model.generate(normalise(test.images, model.cfg.in_channels), attention=True)
    assert read.attention is not None
    jumps = [
        line_jumps(maps, len(text))
        for maps, text, label in zip(read.attention, read.texts, test.labels, strict=True)
        if text == label
    ]
    return 100 * float(np.mean([jump == 1 for jump in jumps])) if jumps else 0.0


def reading_sheet(model: SATRN, test: RenderedWords) -> list[dict]:
    """Test words with readings, confidences and attention maps, small enough for a run record."""
    read = model.generate(normalise(test.images[:SHEET_WORDS], model.cfg.in_channels), attention=True)
    assert read.attention is not None
    sheet = []
    for i, text in enumerate(read.texts):
        maps = read.attention[i, : len(text)]
        shades = (255 * maps / maps.amax(dim=(1, 2), keepdim=True)).round().to(torch.uint8)
        sheet.append(
            {
                "label": test.labels[i],
                "text": text,
                "confidence": round(read.confidence[i], 3),
                "size": list(test.images.shape[2:]),
                "image": base64.b64encode(test.images[i, 0].cpu().numpy().tobytes()).decode(),
                "maps": [base64.b64encode(shade.cpu().numpy().tobytes()).decode() for shade in shades],
                "map_size": list(maps.shape[1:]),
            }
        )
    return sheet


def overfit_one_batch(s: Settings, fabric: Fabric, steps: int = 300) -> float:
    """Self-check: percent of one batch of rendered words that a network reads after training on it alone."""
    changes: dict[str, Any] = dict(
        dataset="rendered", warp="straight", rotation="none", train_images=8, batch_size=8, accumulate=1
    )
    changes |= dict(schedule="onecycle", lr=1e-3, dropout=0.0, control=False, steps=steps)
    s = replace(s, **changes, word_lengths=(2, min(5, s.max_length - 1)), font_pixels=float(min(s.img_size)))
    data = RenderedWords(s, s.train_images, 0, fabric.device)
    model = build_model(s, 0, fabric)
    fit(model, data, s, 0, fabric)
    return 100 * float(correct(model, data, strict=True).mean())
