"""The paper's figures from the run log alone (figures 3, 4, A1, A4), and a preview of the biased digits."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from shared_utils import report
from shared_utils.folders import project_folder
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

SCALES = ("paper", "mnist", "embedded")
COLOURS = {"Vanilla": "tab:gray", "ReBias": "tab:blue", "Frozen random g": "tab:orange"}
TOY_COLOURS = ("#f4b6ad", "#b9d7f0", "#cfe8c0")


def draw_all(tables: list[Table], results: Path) -> None:
    """Draw every figure at the scale closest to the paper's that was measured."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    for table in tables:
        if table.id not in DRAW:
            continue
        measured = [scale for scale in SCALES if scale in table.scales and details(table, scale, results)]
        if measured or table.id == "figure-A4":
            scale = measured[0] if measured else "paper"
            figure = DRAW[table.id](table, scale, details(table, scale, results))
            figure.savefig(results / "figures" / f"{table.id}.png", dpi=90, metadata={"Software": None})
            plt.close(figure)


def details(table: Table, scale: str, results: Path) -> dict[str, list[dict]]:
    """Details of a table's recorded runs by row, one entry per seed."""
    found = report.measured(table, scale, RunLog(results / f"{scale}.jsonl"))
    return {row: [record["details"] for record in seeds.values()] for row, seeds in found.items()}


def _group_matrices(table: Table, scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """Figure 3: accuracy by label (rows) and background colour (columns), mean over seeds."""
    figure, axes = plt.subplots(1, len(found), figsize=(2.5 * len(found) + 0.7, 3.1), layout="constrained")
    for panel, (row, seeds) in zip(np.atleast_1d(axes), found.items(), strict=True):
        matrix = np.mean([each["group_matrix"] for each in seeds], axis=0)
        image = panel.imshow(100 * matrix, vmin=0, vmax=100, cmap="viridis")
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        panel.set_title(f"{row.split(',')[0]}\noff the diagonal {100 * off.mean():.1f} %", fontsize=9)
        panel.set(xlabel="colour of class", xticks=range(10), yticks=range(10))
        panel.tick_params(labelsize=7)
    np.atleast_1d(axes)[0].set_ylabel("label")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8)
    figure.suptitle(f"Accuracy by label and colour ({next(iter(found)).split(', ')[1]}, scale {scale})", fontsize=10)
    return figure


def _curves(table: Table, scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """Figure 4: unbiased accuracy and HSIC by epoch; and possible explanations: norm, bandwidth, training loss."""
    panels = {
        "unbiased_accuracy": "unbiased accuracy (%)",
        "hsic": "HSIC(f, g), median bandwidths",
        "feature_norm": "mean norm of f's features",
        "sigma_f": "median distance of f's features",
        "conflicting_cross_entropy": "training loss, conflicting images",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.1), layout="constrained")
    for panel, (name, label) in zip(axes, panels.items(), strict=True):
        for row, seeds in found.items():
            colour = COLOURS[row.split(",")[0]]
            for number, each in enumerate(seeds):
                points = [(point["epoch"], point[name]) for point in each["curve"] if name in point]
                panel.plot(*np.array(points).T, color=colour, alpha=0.6, label=None if number else row)
        if name in ("hsic", "feature_norm", "sigma_f"):
            panel.set_yscale("log")
        if scale == "paper" and name in ("unbiased_accuracy", "hsic"):
            column = {"unbiased_accuracy": "unbiased_accuracy_percent", "hsic": "hsic"}[name]
            published = [(float(line["epoch"]), float(line[column])) for line in _published("figure-4")]
            panel.plot(*np.array(published).T, "k--", linewidth=1, label="published")
        panel.set(xlabel="epoch", title=label)
        panel.title.set_size(9)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Training, one line per seed (scale {scale})", fontsize=10)
    return figure


def _toy_boundaries(table: Table, scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """Figure A1: decisions of the first seed's f over the plane; training data fill the diagonal squares."""
    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 3.3), layout="constrained", sharey=True)
    for panel, (row, seeds) in zip(np.atleast_1d(axes), found.items(), strict=True):
        grid = np.array([list(map(int, line)) for line in seeds[0]["decisions"]])  # (bias, signal)
        cmap = matplotlib.colors.ListedColormap(TOY_COLOURS)
        panel.imshow(grid.T, origin="lower", extent=(-1.5, 1.5, -1.5, 1.5), cmap=cmap, vmin=0, vmax=2)
        for square in range(3):
            panel.add_patch(plt.Rectangle((square - 1.5, square - 1.5), 1, 1, fill=False, linewidth=1.2))
        panel.set(title=row, xlabel="bias B")
        panel.title.set_size(9)
    np.atleast_1d(axes)[0].set_ylabel("signal S (the label)")
    figure.suptitle("Decisions of f; squares hold the training data. De-biased: horizontal bands", fontsize=10)
    return figure


def _cluster_matrices(table: Table, scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """Figure A4: accuracy by class and texture cluster, published above, ours (if measured) below."""
    lines = _published("figure-A4")
    classes = list(dict.fromkeys(line["class"] for line in lines))
    clusters = list(dict.fromkeys(line["texture_cluster"] for line in lines))
    shown = []
    for name, column in (("Vanilla, published", "vanilla_accuracy"), ("ReBias, published", "rebias_accuracy")):
        matrix = np.full((len(classes), len(clusters)), np.nan)
        for line in lines:
            matrix[classes.index(line["class"]), clusters.index(line["texture_cluster"])] = float(line[column])
        shown.append((name, matrix, clusters))
    for row, seeds in found.items():
        matrix = np.nanmean(np.array([each["cluster_matrix"] for each in seeds], dtype=float), axis=0)
        few = np.array(seeds[0]["cluster_counts"]) < 10
        shown.append((f"{row}, ours", np.where(few, np.nan, matrix), list(range(9))))
    height = -(-len(shown) // 2)
    figure, axes = plt.subplots(height, 2, figsize=(10, 4.4 * height), layout="constrained")
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (name, matrix, columns) in zip(axes.flat, shown, strict=False):
        image = panel.imshow(100 * matrix, vmin=50, vmax=100, cmap="viridis")
        for (y, x), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                colour = "black" if value > 0.8 else "white"
                panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        panel.set_xticks(range(len(columns)), columns, rotation=45, fontsize=8)
        panel.set_yticks(range(len(classes)), classes, fontsize=8)
        panel.set_title(f"{name}: mean of cells {100 * np.nanmean(matrix):.1f} %", fontsize=9)
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8)
    figure.suptitle("Accuracy by class and texture cluster" + ("" if found else " (ours: not measured)"), fontsize=10)
    return figure


DRAW: dict[str, Callable[[Table, str, dict[str, list[dict]]], plt.Figure]] = {
    "figure-3": _group_matrices,
    "figure-4": _curves,
    "figure-A1": _toy_boundaries,
    "figure-A4": _cluster_matrices,
}


def draw_preview(path: Path) -> None:
    """Biased digits: one row per class, aligned ones and those of other colours (figure 2 of the paper)."""
    import torch

    from rebias.data.biased import biased_sklearn_digits

    data = biased_sklearn_digits(train=True, rho=0.9)
    figure, axes = plt.subplots(10, 12, figsize=(7, 6), layout="constrained")
    for label, line in enumerate(axes):
        aligned = ((data.labels == label) & (data.bias == label)).nonzero()[:8, 0]
        conflicting = ((data.labels == label) & (data.bias != label)).nonzero()[:4, 0]
        (images, _), *_ = data.batches([torch.cat([aligned, conflicting])])
        for panel, image in zip(line, images, strict=False):
            panel.imshow((image.permute(1, 2, 0) + 1) / 2)
        for panel in line:
            panel.axis("off")
    figure.suptitle("Biased digits: eight aligned and four conflicting images per class", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _published(name: str) -> list[dict]:
    """Lines of a figure's published values, stored next to its table file."""
    path = project_folder(__file__) / "tables" / f"{name}.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
