"""The paper's figures from the run log alone: published curves dashed grey, ours with the 95 % interval over seeds."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from shared_utils.report import interval, values
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

METRICS = ("precision", "recall", "density", "coverage")
AXES = {  # table: (setting on the x axis, what makes a curve, label)
    "figure-2": ("num_real", ("nearest_k", "embedding"), "N = M"),
    "figure-3": ("mu", ("outlier",), "shift of the fakes"),
    "figure-4": ("share", ("dropping", "redistribute"), "share of the first mode"),
    "figure-6": ("share", ("embedding",), "share of class 0"),
    "figure-7": ("psi", ("embedding",), "truncation psi"),
}


def draw_all(tables: list[Table], results: Path) -> list[Path]:
    """Draw every figure of AXES at the scale closest to the paper's that was measured; returns the files."""
    drawn = []
    for table in tables:
        if table.id not in AXES:
            continue
        for scale in ("paper", "mnist", "embedded"):
            if scale in table.scales and values(table, scale, RunLog(results / f"{scale}.jsonl")):
                path = results / "figures" / f"{table.id}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(table, scale, RunLog(results / f"{scale}.jsonl"), path)
                drawn.append(path)
                break
    return drawn


def draw(table: Table, scale: str, log: RunLog, path: Path) -> None:
    """One panel per metric."""
    x_name, curve_names, label = AXES[table.id]
    found = values(table, scale, log)
    metrics = [metric for metric in METRICS if metric in table.metrics]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3.4), constrained_layout=True)
    curves: dict[tuple, list] = {}
    for row in table.rows_at(scale):
        settings = table.settings(row, scale)
        name = tuple(str(settings[part]) for part in curve_names if part in settings)
        curves.setdefault(name, []).append((settings[x_name], row))
    for panel, metric in zip(axes, metrics, strict=True):
        for number, (name, rows) in enumerate(sorted(curves.items())):
            rows = sorted(rows, key=lambda item: item[0])
            measured = [(x, *interval([m[metric] for m in found[r.name].values()])) for x, r in rows if r.name in found]
            published = [(x, r.published[metric]) for x, r in rows if metric in r.published]
            if measured:
                x, mean, half = np.array(measured).T
                panel.plot(x, mean, color=f"C{number}", marker=".", label=" ".join(name) or "measured")
                half = np.where(np.isfinite(half), half, 0)
                panel.fill_between(x, mean - half, mean + half, color=f"C{number}", alpha=0.25, linewidth=0)
                if published:
                    panel.plot(*np.array(published).T, color=f"C{number}", linestyle="--", linewidth=1, alpha=0.7)
        panel.set(title=metric, xlabel=label)
        if metric != "density":
            panel.set_ylim(-0.03, 1.03)
        if table.id == "figure-2":
            panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{table.title} (scale {scale}; dashed: published)", fontsize=10)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
