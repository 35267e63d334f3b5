"""The paper's figures from the run log alone: published values in grey, ours with the 95 % interval over seeds."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shared_utils.report import interval, values
from shared_utils.runlog import RunLog
from shared_utils.tables import Table
from wsol_eval.cutouts import SHIFT, SIDE, SPREAD, make_split

METHODS = ("CAM", "HaS", "ACoL", "SPG", "ADL", "CutMix")
WITH_FSL = (*METHODS, "FSL baseline")


def draw_all(tables: list[Table], results: Path) -> list[Path]:
    """Draw each figure whose runs are recorded; returns the files."""
    known = {table.id: table for table in tables}
    logs = {scale: RunLog(results / f"{scale}.jsonl") for scale in ("embedded", "paper")}
    drawn = []
    for name, draw in FIGURES.items():
        table = known["table-8" if name == "figure-1" else name]
        measured = values(table, "embedded", logs["embedded"])
        if len(measured) == len(table.rows_at("embedded")) or (name == "figure-1" and _points(known, logs["paper"])):
            path = results / "figures" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure = draw(known, logs["paper" if name == "figure-1" else "embedded"])
            figure.savefig(path, dpi=90, metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def _points(known: dict[str, Table], paper: RunLog) -> dict[str, float]:
    """Accuracies of figure-1's rows measured at the paper's scale, means over seeds."""
    found = values(known["figure-1"], "paper", paper)
    return {
        row: float(np.mean([metrics["gt_known_accuracy"] for metrics in seeds.values()]))
        for row, seeds in found.items()
    }


def _details(table: Table, log: RunLog) -> dict[str, dict[int, dict]]:
    """Details of a table's embedded records by row and seed, of the table's present settings only."""
    measured = values(table, "embedded", log)
    found: dict[str, dict[int, dict]] = {}
    for record in log.records():
        if record["table"] == table.id and record["seed"] in measured.get(record["row"], {}):
            found.setdefault(record["row"], {})[record["seed"]] = record["details"]
    return found


def threshold_curves(known: dict[str, Table], paper: RunLog) -> Figure:
    """Figure 1: accuracy against tau, the paper's on ImageNet (crosses: measured), and ours on the photographs."""
    log = RunLog(paper.path.with_name("embedded.jsonl"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    rows = [row for row in known["figure-1"].rows if row.published]
    published = {row.name.removeprefix("ImageNet: "): row.published["gt_known_accuracy"] for row in rows}
    points = [(float(name.split("=")[1]), value) for name, value in published.items() if name.startswith("CAM, tau=")]
    left.plot(*np.array(points).T, color="C0", marker="o", label="CAM")
    for number, name in enumerate(("HaS", "ACoL", "SPG"), 1):
        left.plot(0.4, published[f"{name}, tau=0.4"], color=f"C{number}", marker="o", linestyle="none", label=name)
    for name, style in (("FSL, best tau", "-"), ("Best WSOL, best tau", "--"), ("Center, best tau", ":")):
        left.axhline(published[name], color="0.4", linestyle=style, label=name.split(",")[0])
    for row, value in _points(known, paper).items():
        if ", tau=" in row:
            left.plot(float(row.split("=")[1]), value, color="k", marker="x", linestyle="none")
    left.set(title="published: ImageNet, ResNet50 (read by eye, ±0.4)", xlim=(0, 0.5))
    curves = _details(known["table-8"], log)
    for number, name in enumerate(WITH_FSL if curves else ()):
        taus = np.array(next(iter(curves[name].values()))["taus"])
        per_seed = [details["curve_largest_50"] for details in curves[name].values()]
        mean, half = np.array([interval(column) for column in zip(*per_seed, strict=True)]).T
        color = f"C{number}" if name in METHODS else "0.2"
        right.plot(taus, mean, color=color, label=name)
        right.fill_between(taus, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
    center = values(known["table-8"], "embedded", log).get("Center baseline", {}).values()
    if center:
        mean = np.mean([metrics["max_box_acc"] for metrics in center])
        right.axhline(mean, color="0.4", linestyle=":", label="Center (best tau)")
    right.axvline(0.2, color="0.8", linewidth=1, zorder=0)
    right.set(title="measured: digits on photographs", xlim=(0, 1))
    for panel in (left, right):
        panel.set(xlabel="threshold tau", ylabel="GT-known accuracy at IoU 50 (%)", ylim=(0, 103))
        panel.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower right")
    if curves:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def trials(known: dict[str, Table], log: RunLog) -> Figure:
    """Violins of V2 on train-fullsup over all trials and seeds; the chosen trials as dots."""
    found = _details(known["figure-trials"], log)
    figure, panel = plt.subplots(figsize=(7, 3.8), constrained_layout=True)
    for place, name in enumerate(METHODS):
        per_seed = [[v for v in d["values"] if v is not None] for d in found[name].values()]
        pooled = np.concatenate(per_seed)
        violins = panel.violinplot(pooled, [place], showextrema=False, widths=0.8)
        body = violins["bodies"][0]  # type: ignore[index]  # a list
        body.set(facecolor=f"C{place}", alpha=0.3)
        panel.scatter(np.full(len(pooled), place), pooled, s=8, color=f"C{place}", alpha=0.6)
        panel.scatter(np.full(len(per_seed), place), [max(v) for v in per_seed], s=26, color=f"C{place}", edgecolor="k")
    panel.set_xticks(range(len(METHODS)), METHODS)
    panel.set(
        ylabel="MaxBoxAccV2 on train-fullsup (%)", title="All trials of the random search, all seeds (ringed: chosen)"
    )
    panel.set_ylim(0)
    panel.grid(alpha=0.3, axis="y")
    return figure


def supervision(known: dict[str, Table], log: RunLog) -> Figure:
    """Accuracy against the number of fully labelled images: choosing CAM with them, or fitting FSL on them."""
    found = values(known["figure-supervision"], "embedded", log)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    labels = {"max_box_acc_v2": "MaxBoxAccV2 (%)", "pxap": "PxAP (%)"}
    for panel, metric in zip(panels, labels, strict=True):
        for color, method in (("C0", "CAM"), ("0.2", "FSL")):
            rows = [(int(name.split()[1]), name) for name in found if name.startswith(f"{method},")]
            x, mean, half = np.array([(n, *interval([m[metric] for m in found[name].values()])) for n, name in rows]).T
            panel.errorbar(x, mean, half, color=color, marker="o", capsize=3, label=f"{method}")
        center = values(known["table-8"], "embedded", log)["Center baseline"]
        panel.axhline(np.mean([m[metric] for m in center.values()]), color="0.4", linestyle=":", label="Center")
        panel.set(xlabel="fully labelled images per class", ylabel=labels[metric], ylim=(0, 103), xscale="log")
        panel.set_xticks([1, 2, 5], ["1", "2", "5"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def qualitative(known: dict[str, Table], log: RunLog) -> Figure:
    """Score maps of the first test images, as stored in the run log, with ground truth and the box at tau*."""
    from wsol_eval.sweep import boxes_at_threshold

    found = _details(known["table-8"], log)
    seed = min(found["CAM"])
    stored = {name: _maps(found[name][seed]) for name in WITH_FSL}
    count = len(stored["CAM"])
    cutouts = make_split("test", count, seed)
    figure, grid = plt.subplots(count, 1 + len(WITH_FSL), figsize=(12, 1.55 * count + 0.3), constrained_layout=True)
    for line, panels in enumerate(grid):
        image = np.clip(cutouts.images[line].permute(1, 2, 0).numpy() * SPREAD + SHIFT, 0, 1)
        panels[0].imshow(image)
        for panel, name in zip(panels[1:], WITH_FSL, strict=True):
            panel.imshow(image)
            panel.imshow(stored[name][line], cmap="jet", alpha=0.5, vmin=0, vmax=255)
            tau = found[name][seed]["tau_star_largest"]
            _box(panel, boxes_at_threshold(stored[name][line], tau, "largest")[0], "lime")
        for panel, name in zip(panels, ("image", *WITH_FSL), strict=True):
            _box(panel, cutouts.boxes[line][0], "red")
            panel.set_axis_off()
            if line == 0:
                panel.set_title(name, fontsize=9)
    figure.suptitle(
        f"Test images of seed {seed}: ground truth red, largest contour at the method's best tau green", fontsize=9
    )
    return figure


def _maps(details: dict) -> np.ndarray:
    """(n, 32, 32) uint8."""
    raw = zlib.decompress(base64.b64decode(details["maps"]))
    return np.frombuffer(raw, np.uint8).reshape(-1, SIDE, SIDE)


def _box(panel: plt.Axes, box: np.ndarray, color: str) -> None:
    x0, y0, x1, y1 = (float(value) for value in box)
    panel.add_patch(
        Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=color, linewidth=1.2)
    )


FIGURES: dict[str, Callable[[dict[str, Table], RunLog], Figure]] = {
    "figure-1": threshold_curves,
    "figure-trials": trials,
    "figure-supervision": supervision,
    "table-8": qualitative,
}
