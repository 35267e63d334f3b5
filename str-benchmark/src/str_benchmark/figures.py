"""The paper's figures from the run log, its published files and the renderer; and images with the words read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from shared_utils.images import read_image
from shared_utils.report import measured
from shared_utils.runlog import RunLog
from shared_utils.tables import Table
from str_benchmark.analysis import frontier, published, split_stages
from str_benchmark.config import COMBINATIONS
from str_benchmark.data.lmdb_store import LMDBDataset
from str_benchmark.data.rendered import RENDERED, rendered_lmdb

SCALES = ("paper", "rendered", "embedded")
COLOURS = {"VGG": "tab:blue", "RCNN": "tab:green", "ResNet": "tab:red"}
MIXTURE = "None-VGG-None-CTC (half A, half B)"
SHOWN_WORDS = 4  # of each set on the sheet
SHOWN_MISSED = 4


def draw_all(tables: Sequence[Table], results: Path, rendered: Path) -> None:
    """Draw every figure at the scale closest to the paper's that was measured.

    Args:
        tables: of the project.
        results: folder with <scale>.jsonl; figures/ lies in it.
        rendered: folder with the renderer's LMDBs; missing ones are generated.
    """
    (results / "figures").mkdir(parents=True, exist_ok=True)
    _save(_published_tradeoff(), results / "figures" / "figure-4.png")
    _save(_coco_text(), results / "figures" / "figure-19.png")
    for table in tables:
        for scale in SCALES:
            records = records_by_row(table, scale, RunLog(results / f"{scale}.jsonl"))
            if table.id in DRAW and records and not (table.id == "modules" and scale == "embedded"):
                _save(DRAW[table.id](table, scale, records, rendered), results / "figures" / f"{table.id}.png")
                break
    draw_words(tables, RunLog(results / "embedded.jsonl"), rendered, results / "figures" / "words.png")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def records_by_row(table: Table, scale: str, log: RunLog) -> dict[str, list[dict]]:
    """A table's records at a scale by row, one per seed."""
    return {row: list(seeds.values()) for row, seeds in measured(table, scale, log).items()}


# ---- trade-offs ------------------------------------------------------------


def tradeoff(panel: plt.Axes, frame: pd.DataFrame, cost: str, accuracy: str, prefix: str) -> None:
    """One panel of figure 4: all models, the upper hull as a line with named steps, non-dominated models ringed.

    Colour: feature extractor; square: TPS; filled: BiLSTM; a dot inside: attention.
    """
    frame = split_stages(frame)
    for row in frame.itertuples():
        x, y, colour = getattr(row, cost), getattr(row, accuracy), COLOURS[row.feat]
        face = colour if row.seq == "BiLSTM" else "none"
        panel.plot(x, y, "s" if row.trans == "TPS" else "o", color=colour, markerfacecolor=face, markersize=7)
        if row.pred == "Attn":
            panel.plot(x, y, ".", color="black", markersize=3)
    best = frontier(frame, cost, accuracy)
    hull = best[best.on_hull]
    panel.plot(hull[cost], hull[accuracy], color="tab:orange", zorder=0)
    ringed = best[~best.on_hull]
    panel.plot(
        ringed[cost], ringed[accuracy], "o", color="gray", markerfacecolor="none", markersize=13, linestyle="none"
    )
    for number, row in enumerate(hull.itertuples(), 1):
        place = (getattr(row, cost), getattr(row, accuracy))
        panel.annotate(f"{prefix}{number}", place, xytext=(-7, 7), textcoords="offset points", fontsize=9, ha="right")
    panel.grid(alpha=0.3)
    panel.margins(0.08)


def _legend(figure: plt.Figure) -> None:
    marks = [
        plt.Line2D([], [], color=colour, marker="o", linestyle="none", label=name) for name, colour in COLOURS.items()
    ]
    style: dict[str, Any] = {"color": "black", "linestyle": "none"}
    marks += [
        plt.Line2D([], [], marker="s", markerfacecolor="none", label="TPS (circle: none)", **style),
        plt.Line2D([], [], marker="o", label="BiLSTM (hollow: none)", **style),
        plt.Line2D([], [], marker=".", label="Attn (no dot: CTC)", **style),
        plt.Line2D([], [], color="tab:orange", label="upper convex hull"),
        plt.Line2D([], [], marker="o", color="gray", markerfacecolor="none", markersize=11, linestyle="none",
                   label="not dominated, below the hull"),
    ]  # fmt: skip
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8)


def _published_tradeoff() -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    frame = published()
    tradeoff(axes[0], frame, "time_ms", "total_8539", "T")
    tradeoff(axes[1], frame, "params_M", "total_8539", "P")
    axes[0].set(xlabel="time (ms per image, Tesla P40)", ylabel="total accuracy (%), 8,539 words")
    axes[1].set(xlabel="parameters (M)")
    figure.suptitle("Published (table 8): accuracy against time and parameters", fontsize=11)
    _legend(figure)
    return figure


def _coco_text() -> plt.Figure:
    figure, panel = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    tradeoff(panel, published("figure-19"), "time_ms", "coco_text_accuracy", "T")
    panel.set(xlabel="time (ms per image, Tesla P40)", ylabel="accuracy on COCO-Text (%)")
    figure.suptitle("Published (digitised): all 24 on COCO-Text", fontsize=11)
    _legend(figure)
    return figure


def _measured_tradeoff(table: Table, scale: str, records: dict[str, list[dict]], rendered: Path) -> plt.Figure:
    """Our own runs: means over seeds; at scale embedded two models only."""
    names = ("total_accuracy", "time_ms", "params_M")
    frame = pd.DataFrame(
        [
            {"combination": row} | {n: np.mean([r["metrics"][n] for r in each]) for n in names}
            for row, each in records.items()
        ]
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    tradeoff(axes[0], frame, "time_ms", "total_accuracy", "T")
    tradeoff(axes[1], frame, "params_M", "total_accuracy", "P")
    axes[0].set(xlabel="time (ms per image)", ylabel="total accuracy (%)")
    axes[1].set(xlabel="parameters (M)")
    figure.suptitle(f"Measured (scale {scale}): means over seeds of {len(frame)} combinations", fontsize=11)
    _legend(figure)
    return figure


def _cost(table: Table, scale: str, records: dict[str, list[dict]], rendered: Path) -> plt.Figure:
    """Time of the networks at the paper's size: published on a GPU, ours on this device."""
    figure, panel = plt.subplots(figsize=(8.5, 5.6), layout="constrained")
    rows = sorted(records, key=lambda row: np.mean([r["metrics"]["time_ms"] for r in records[row]]))
    times = [np.mean([r["metrics"]["time_ms"] for r in records[row]]) for row in rows]
    flops = [records[row][0]["metrics"]["gflops"] for row in rows]
    panel.barh(range(len(rows)), times, color=[COLOURS[row.split("-")[1]] for row in rows])
    for y, (time, flop) in enumerate(zip(times, flops, strict=True)):
        panel.text(time, y, f" {time:.1f} ms, {flop:.1f} GFLOP", va="center", fontsize=7)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set(xlabel="ms per image", xlim=(0, 1.25 * max(times)))
    figure.suptitle(f"One image on {records[rows[0]][0]['device']}, mean over seeds", fontsize=10)
    return figure


# ---- training data, words, failures ----------------------------------------


def _training_data(table: Table, scale: str, records: dict[str, list[dict]], rendered: Path) -> plt.Figure:
    """Accuracy by test set, one dot per seed, a bar for the mean."""
    sets = list(next(iter(records.values()))[0]["details"]["correct"]) if scale == "embedded" else []
    columns = [*(name.replace("-", "_") for name in sets), "total_accuracy"]
    figure, panel = plt.subplots(figsize=(2.1 * len(columns) + 1.5, 3.8), layout="constrained")
    for number, (row, each) in enumerate(records.items()):
        values = np.array([[r["metrics"][name] for name in columns] for r in each])
        place = np.arange(len(columns)) + 0.25 * (number - (len(records) - 1) / 2)
        panel.bar(place, values.mean(0), width=0.22, alpha=0.55, label="trained on " + _training_set(row))
        for seed in values:
            panel.plot(place, seed, "k.", markersize=4)
    shown = [name.removeprefix("test_").replace("_", "\n") for name in columns]
    panel.set_xticks(range(len(columns)), shown)
    panel.set(ylabel="words read (%)", ylim=(0, 105))
    panel.grid(alpha=0.3, axis="y")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(records))
    figure.suptitle(f"Equal numbers of training words (scale {scale}); a dot per seed", fontsize=10)
    return figure


def _training_set(row: str) -> str:
    """Label of a row of training-data: "A" for "None-VGG-None-CTC (A)"; "MJ + ST" is unchanged."""
    return row.partition("(")[2].rstrip(")") if row.startswith(COMBINATIONS) else row


def draw_words(tables: Sequence[Table], log: RunLog, rendered: Path, path: Path) -> list[tuple[str, str]]:
    """A sheet of test images with what the mixture's first seed read; returns pairs of label and text."""
    table = next((table for table in tables if table.id == "training-data"), None)
    records = records_by_row(table, "embedded", log).get(MIXTURE) if table else None
    if not records:
        return []
    cells = []
    for name, read in records[0]["details"]["read"].items():
        data = LMDBDataset(rendered_lmdb(name, rendered), charset="36", filter="off")
        cells += [(*data[index], text, confidence) for index, (text, confidence) in enumerate(read)]
    _save(_sheet(cells, SHOWN_WORDS), path)
    return [(label, text) for _, label, text, _ in cells]


def draw_sheet(read: Sequence[tuple[Path, str, float]], path: Path, columns: int = 4) -> None:
    """A PNG of images with texts and confidences."""
    cells = []
    for name, text, confidence in read:
        cells.append((read_image(name), None, text, confidence))
    _save(_sheet(cells, columns), path)


def _sheet(cells: list[tuple], columns: int) -> plt.Figure:
    rows = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 1.15 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, (image, label, text, confidence) in zip(axes.flat, cells, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        wrong = label is not None and label != text
        panel.set_title(
            f"{text or '(nothing)'}  {confidence:.2f}" + (f"  ({label})" if wrong else ""),
            fontsize=9, color="tab:red" if wrong else "black",
        )  # fmt: skip
    return figure


def _failures(table: Table, scale: str, records: dict[str, list[dict]], rendered: Path) -> plt.Figure:
    """Words that every model misses by set, against independent models; first seed, and such words if we rendered them.

    Words of the paper's sets are not shown: we may not publish their images.
    """
    sets = next(iter(records.values()))[0]["details"]["sets"]
    drawn = [name for name in sets if name in RENDERED]
    words = [(name, index) for name in drawn for index in sets[name]["missed"][:SHOWN_MISSED]]
    figure = plt.figure(figsize=(9, 5.2 if words else 3.4), layout="constrained")
    upper, *lower = figure.subfigures(2 if words else 1, 1, squeeze=False)[:, 0]
    panel, place = upper.subplots(), np.arange(len(sets))
    for shift, key, label in ((-0.2, "missed_by_all", "missed by all"), (0.2, "expected", "if they were independent")):
        panel.bar(place + shift, [part[key] for part in sets.values()], width=0.38, label=label)
    names = [f"{name.removeprefix('test-')}\nn = {part['n']:,}" for name, part in sets.items()]
    panel.set_xticks(place, names, fontsize=8)
    panel.set(ylabel="words (%)")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3, axis="y")
    if words:
        axes = lower[0].subplots(len(words) // 8 + 1, 8)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, index) in zip(axes.flat, words, strict=False):
            image, label = LMDBDataset(rendered_lmdb(name, rendered), charset="36", filter="off")[index]
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_title(label, fontsize=9)
    figure.suptitle(f"Missed by every model (scale {scale}, first seed)", fontsize=10)
    return figure


DRAW = {
    "training-data": _training_data,
    "modules": _measured_tradeoff,
    "cost": _cost,
    "failures": _failures,
}
