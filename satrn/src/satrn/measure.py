"""From a trained network to metrics: on real words, on rendered ones, of a checkpoint, of two."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from scipy import stats
from torch import Tensor

from satrn.complexity import costs
from satrn.config import SATRNConfig
from satrn.data import inventory
from satrn.data.streams import RenderedWords, normalise
from satrn.data.words_lmdb import LmdbWords
from satrn.evaluate import aspect_ratios, comparable, correct, group_by_ratio, line_jumps, mcnemar
from satrn.models import SATRN
from satrn.pretrained import load_pretrained, read_checkpoint, settings_of
from satrn.settings import Settings
from satrn.train import make_fabric

IRREGULAR = ("IC15", "SVTP", "CT80")
CURVE_ANGLES = tuple(range(0, 360, 30))
CURVE_WORDS = 200
SHEET_WORDS = 8
REAL_SHEET_WORDS = 24


def sizes(s: Settings) -> dict[str, float]:
    """Parameters (also in millions) and FLOPs (billions) by the paper's rule, and with cached keys and values."""
    counted = costs(s.network())
    return {
        "parameters": counted.parameters,
        "parameters_m": counted.parameters / 1e6,
        "flops_b": counted.flops / 1e9,
        "flops_kept_b": counted.flops_kept / 1e9,
    }


def with_network(s: Settings, cfg: SATRNConfig) -> Settings:
    """Settings with another network, but its own input size, alphabet, longest word and dropout."""
    own = ("img_size", "charset", "max_length", "dropout")
    return replace(s, **{k: v for k, v in vars(cfg).items() if hasattr(s, k) and k not in own})


def evaluate(
    model: SATRN,
    s: Settings,
    seed: int,
    data_root: Path,
    fabric: Fabric,
    skip_broken: bool = False,
    control: SATRN | None = None,
    protocol: str = "case-insensitive",
) -> tuple[dict, dict, list]:
    """Metrics (percent), details for figures, and records of the test sets.

    The protocol is that of real words (see `satrn.evaluate.comparable`); rendered ones are compared exactly.
    """
    model.eval()
    if s.dataset == "rendered":
        return _evaluate_rendered(model, control, s, seed, fabric)
    return _evaluate_real(model, s, data_root, skip_broken, protocol)


def checkpoint_settings(path: Path, model: SATRN, test_sets: Sequence[str]) -> tuple[Settings, int]:
    """Settings and seed for evaluating a checkpoint; MMOCR's have neither. Named test sets replace its own."""
    content = read_checkpoint(path)
    own = "run" in content
    s = settings_of(content, path) if own else with_network(Settings(), model.cfg)
    s = replace(s, dataset="lmdb", test_sets=tuple(test_sets)) if test_sets else s
    return s, content["run"]["seed"] if own else 0


def evaluate_checkpoint(
    path: Path,
    data_root: Path,
    device: str = "auto",
    test_sets: Sequence[str] = (),
    skip_broken: bool = False,
    protocol: str = "case-insensitive",
    dictionary: str | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics of a checkpoint and the number of words of each set, on its own test sets or on those named."""
    comparable("", protocol)  # an unknown protocol is an error for every data set
    fabric = make_fabric(device)
    model = load_model(path, fabric, dictionary)
    s, seed = checkpoint_settings(path, model, test_sets)
    metrics, details, _ = evaluate(model, s, seed, data_root, fabric, skip_broken, protocol=protocol)
    return metrics, details.get("words", {})


def compare_checkpoints(
    paths: tuple[Path, Path],
    data_root: Path,
    device: str = "auto",
    test_sets: Sequence[str] = (),
    skip_broken: bool = False,
    protocol: str = "case-insensitive",
    dictionary: str | None = None,
) -> pd.DataFrame:
    """McNemar's test of two checkpoints on the same words, by test set and over all.

    Returns:
        Columns set, words, first and second (percent read), only_first, only_second, p.
    """
    fabric, hits = make_fabric(device), []
    for path in paths:
        model = load_model(path, fabric, dictionary)
        s, _ = checkpoint_settings(path, model, test_sets or Settings().test_sets)
        words = {name: _test_words(name, s, data_root, skip_broken) for name in s.test_sets}
        hits.append({name: correct(model, each, protocol=protocol) for name, each in words.items()})
    for both in hits:
        both["all"] = np.concatenate(list(both.values()))
    return pd.DataFrame(
        {"set": name, "words": len(first), "first": 100 * first.mean(), "second": 100 * hits[1][name].mean()}
        | mcnemar(first, hits[1][name])
        for name, first in hits[0].items()
    )


def load_model(path: Path, fabric: Fabric, dictionary: str | None = None) -> SATRN:
    """The network of a checkpoint, ready to read; see `satrn.pretrained.load_pretrained`."""
    return load_pretrained(path, dictionary=dictionary).to(fabric.device).to(memory_format=torch.channels_last)


# ---- real words ------------------------------------------------------------


def _test_words(name: str, s: Settings, data_root: Path, skip_broken: bool) -> LmdbWords:
    return LmdbWords(inventory.test_folder(data_root, name), s.img_size, s.in_channels, skip_broken)


def _evaluate_real(
    model: SATRN, s: Settings, data_root: Path, skip_broken: bool, protocol: str
) -> tuple[dict, dict, list]:
    hits: dict[str, np.ndarray] = {}
    turned: dict[str, list[np.ndarray]] = {}
    records, sheet = [], []
    for name in s.test_sets:
        words = _test_words(name, s, data_root, skip_broken)
        hits[name] = correct(model, words, protocol=protocol)
        for angle in s.test_angles:
            turned.setdefault(f"rotated_{angle:g}", []).append(correct(model, words, protocol=protocol, degrees=angle))
        records.append(words.record())
        sheet += real_sheet(model, words, max(1, REAL_SHEET_WORDS // len(s.test_sets)))
    metrics = {name: 100 * float(each.mean()) for name, each in hits.items()}
    metrics["accuracy"] = 100 * float(np.concatenate(list(hits.values())).mean())  # over the union: every word once
    metrics |= {name: 100 * float(np.concatenate(each).mean()) for name, each in turned.items()}
    if set(IRREGULAR) <= hits.keys():
        metrics["irregular_mean"] = float(np.mean([metrics[name] for name in IRREGULAR]))
    sizes = {name: len(each) for name, each in hits.items()}
    return metrics | _sizes(s), {"words": sizes | {"all": sum(sizes.values())}, "sheet": sheet}, records


def real_sheet(model: SATRN, words: LmdbWords, count: int) -> list[dict]:
    """Evenly spaced words of a set with their readings, in gray, for a run record; broken ones are left out."""
    places = np.unique(np.linspace(0, len(words) - 1, count).astype(int)).tolist()
    found = [word for word in map(words.get, places) if word is not None]
    if not found:
        return []
    images = torch.stack([image for image, _ in found])
    read = model.generate(normalise(images.to(next(model.parameters()).device), model.cfg))
    return [
        {"label": label, "text": text, "confidence": round(confidence, 3)} | _stored(image)
        for (image, label), text, confidence in zip(found, read.texts, read.confidence, strict=True)
    ]


def _stored(image: Tensor) -> dict:
    """An image uint8 [C, H, W] in gray, as a run record holds it."""
    gray = image.float().mean(dim=0).round().to(torch.uint8)
    return {"size": list(gray.shape), "image": base64.b64encode(gray.cpu().numpy().tobytes()).decode()}


def _sizes(s: Settings) -> dict[str, float]:
    counted = sizes(s)
    return {name: counted[name] for name in ("parameters_m", "flops_b")}


# ---- rendered words ------------------------------------------------------------


def _evaluate_rendered(
    model: SATRN, control: SATRN | None, s: Settings, seed: int, fabric: Fabric
) -> tuple[dict, dict, list]:
    test = RenderedWords(s, s.test_images, 20_000 + seed, fabric.device)
    hits = correct(model, test, protocol="exact")
    metrics = {"accuracy": 100 * float(hits.mean())} | _sizes(s)
    details: dict[str, Any] = {}
    if control is not None:
        control.eval()
        other = correct(control, test, protocol="exact")
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
        curve[str(angle)] = round(100 * float(correct(model, test, protocol="exact").mean()), 2)
    return curve


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
    read = model.generate(normalise(test.images, model.cfg), attention=True)
    assert read.attention is not None
    jumps = [
        line_jumps(maps, len(text))
        for maps, text, label in zip(read.attention, read.texts, test.labels, strict=True)
        if text == label
    ]
    return 100 * float(np.mean([jump == 1 for jump in jumps])) if jumps else 0.0


def reading_sheet(model: SATRN, test: RenderedWords) -> list[dict]:
    """Test words with readings, confidences and attention maps, small enough for a run record."""
    read = model.generate(normalise(test.images[:SHEET_WORDS], model.cfg), attention=True)
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
                "maps": [base64.b64encode(shade.cpu().numpy().tobytes()).decode() for shade in shades],
                "map_size": list(maps.shape[1:]),
            }
            | _stored(test.images[i])
        )
    return sheet
