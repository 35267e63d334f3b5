"""The paper's figures and further ones, drawn from the run log alone; each comes with a CSV of its data.

Arrays come from the details of the records; the lowest recorded seed is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle

from hib_ndigit_mnist.evaluate import CONDITIONS, shares_digit
from hib_ndigit_mnist.quadrature import expected_sigmoid
from shared_utils.report import interval, values
from shared_utils.runlog import RunLog, key_of
from shared_utils.tables import Table

Details = dict[str, Any]
COLOURS = matplotlib.color_sequences["tab10"]


def draw_all(tables: list[Table], results: Path) -> list[Path]:
    """Draw every figure at the scale closest to the paper's that was measured; returns the PNG files."""
    drawn = []
    for table in tables:
        for scale in ("paper", "lenet", "mnist", "embedded"):
            log = RunLog(results / f"{scale}.jsonl")
            if table.id in DRAW and scale in table.scales and values(table, scale, log):
                path = results / "figures" / f"{table.id}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure, frame = DRAW[table.id](table, scale, log)
                figure.suptitle(f"{table.title} (scale {scale})", fontsize=10)
                figure.savefig(path, dpi=80, metadata={"Software": None})
                plt.close(figure)
                frame.to_csv(path.with_suffix(".csv"), index=False)
                drawn.append(path)
                break
    return drawn


def _details(table: Table, scale: str, log: RunLog) -> dict[str, Details]:
    """Details of the lowest seed, by row."""
    records = {key_of(record): record for record in log.records() if record["table"] == table.id}
    found: dict[str, Details] = {}
    for run in sorted(table.runs(scale), key=lambda run: run.seed):
        if run.key in records:
            found.setdefault(run.row, records[run.key]["details"])
    return found


def _grid(columns: int, rows: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    size = (4.2 * columns, 3.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False, **options)
    return figure, axes


# ---- ellipses: figures 3 and 8 ----


def _ellipses(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """One- and two-sigma ellipses: colour is the class, opacity the certainty; a line joins a mixture's components."""
    rows = _details(table, scale, log)
    figure, axes = _grid(2, len(rows), sharex="row", sharey="row")
    lines = []
    for panels, (row, details) in zip(axes, rows.items(), strict=True):
        classes = sorted(set(details["labels"]))
        for panel, condition in zip(panels, CONDITIONS, strict=True):
            part = details[condition]
            mu, sigma = np.array(part["mu"])[..., :2], np.array(part["sigma"])[..., :2]
            for image, label in enumerate(details["labels"]):
                colour = COLOURS[classes.index(label) % 10]
                alpha = float(np.clip(1 - 2 * part["eta"][image], 0.15, 0.9))
                panel.plot(*mu[image].T, color=colour, alpha=alpha, linewidth=0.8)
                for component in range(mu.shape[1]):
                    for times, fill in ((1, True), (2, False)):
                        width, height = 2 * times * sigma[image, component]
                        shape = Ellipse(mu[image, component], width, height, color=colour, fill=fill, linewidth=0.5)
                        shape.set_alpha(alpha * (0.5 if fill else 0.6))
                        panel.add_patch(shape)
                    lines.append([row, condition, label, component, *mu[image, component], *sigma[image, component]])
            panel.autoscale_view()
            shown = " (first two dimensions)" if np.shape(part["mu"])[-1] > 2 else ""
            panel.set_title(f"{row}, {condition}{shown}", fontsize=9)
            panel.set_aspect("equal")
        handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[i % 10]) for i in range(len(classes))]
        if len(classes) <= 10:
            panels[1].legend(handles, classes, fontsize=7, title="class", title_fontsize=7, loc="upper right")
    columns = ["row", "condition", "class", "component", "mu_1", "mu_2", "sigma_1", "sigma_2"]
    return figure, pd.DataFrame(lines, columns=columns)


# ---- figure 1: an ambiguous image ----


def _mixture(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """The image, and p(m | x, z) over the plane, clean and corrupted, with class centroids."""
    rows = _details(table, scale, log)
    figure, axes = _grid(4, len(rows), gridspec_kw={"width_ratios": [0.5, 1, 0.5, 1]})
    lines = []
    for panels, (row, details) in zip(axes, rows.items(), strict=True):
        centroids = np.array(details["centroids"])
        low, high = centroids.min(0) - 0.7, centroids.max(0) + 0.7
        x, y = (np.linspace(low[d], high[d], 90) for d in (0, 1))
        height, width = np.shape(details["clean"]["pixels"])
        digits = width // height
        for number, condition in enumerate(CONDITIONS):
            part = details[condition]
            mu, sigma = np.array(part["mu"][0]), np.array(part["sigma"][0])
            panels[2 * number].imshow(part["pixels"], cmap="gray", vmin=0, vmax=255)
            panels[2 * number].set(xticks=[], yticks=[])
            panels[2 * number].set_title(f"{details['label']:0{digits}d}, {condition}", fontsize=9)
            panel = panels[2 * number + 1]
            heat = _heat(mu, sigma, details["a"], details["b"], x, y)
            image = panel.pcolormesh(x, y, heat, cmap="viridis", vmin=0, vmax=1)
            for where, name in zip(centroids, details["numbers"], strict=True):
                panel.annotate(f"{name:0{digits}d}", where, color="white", fontsize=8, ha="center", va="center")
            panel.plot(*mu.T, color="red", marker="+", linewidth=1)
            panel.set_title(f"{row}: p(m | x, z)", fontsize=9)
            lines += [[row, condition, i, *mu[i], *sigma[i]] for i in range(len(mu))]
        figure.colorbar(image, ax=panel)
    return figure, pd.DataFrame(lines, columns=["row", "condition", "component", "mu_1", "mu_2", "sigma_1", "sigma_2"])


def _heat(mu: np.ndarray, sigma: np.ndarray, a: float, b: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    plane = np.stack(np.meshgrid(x, y), -1).reshape(-1, 1, 2)
    mean = torch.from_numpy(plane - mu).reshape(-1, 2)
    variance = torch.from_numpy(np.broadcast_to(sigma**2, (len(plane), *sigma.shape)).copy()).reshape(-1, 2)
    p = expected_sigmoid(mean, variance, torch.tensor(a), torch.tensor(b), 1e-3)
    return p.view(len(y), len(x), len(mu)).mean(2).numpy()


# ---- figure 4: class centroids ----


def _centroids(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """Class centroids; lines join numbers that differ in one digit."""
    rows = _details(table, scale, log)
    figure, axes = _grid(len(rows))
    lines = []
    for panel, (row, details) in zip(axes[0], rows.items(), strict=True):
        where, numbers = np.array(details["centroids"]), torch.tensor(details["numbers"])
        for i, j in shares_digit(numbers, 2).triu().nonzero().tolist():
            panel.plot(*where[[i, j]].T, color="grey", alpha=0.12, linewidth=0.6)
        tens = [int(number) // 10 for number in numbers]
        panel.scatter(*where.T, c=[COLOURS[ten] for ten in tens], s=12)
        for point, number in zip(where, details["numbers"], strict=True):
            panel.annotate(f"{number:02d}", point, fontsize=6, xytext=(2, 2), textcoords="offset points")
        panel.set_title(f"{row} (colour: first digit)", fontsize=9)
        lines += [[row, number, *point] for number, point in zip(details["numbers"], where, strict=True)]
    return figure, pd.DataFrame(lines, columns=["row", "number", "z_1", "z_2"])


# ---- figure 5: bins of eta ----


def _bins(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """Average precision and KNN accuracy over 20 bins of eta."""
    rows = _details(table, scale, log)
    figure, axes = _grid(2, len(rows))
    lines = []
    for panels, (row, details) in zip(axes, rows.items(), strict=True):
        for panel, task, label in zip(panels, ("ap", "knn"), ("average precision", "KNN accuracy"), strict=True):
            taus = []
            for colour, condition in zip(("C0", "C3"), CONDITIONS, strict=True):
                part = details[f"{task}_{condition}"]
                panel.plot(part["eta"], part["y"], "o", color=colour, markersize=4, label=condition)
                taus.append(f"{condition} {part['tau']:.2f}")
                lines += [[row, task, condition, x, y] for x, y in zip(part["eta"], part["y"], strict=True)]
            panel.set(xlabel="mean eta of the bin", ylabel=label)
            panel.set_title(f"{row}: tau {', '.join(taus)}", fontsize=9)
            panel.legend(fontsize=8)
            panel.grid(alpha=0.3)
    return figure, pd.DataFrame(lines, columns=["row", "task", "condition", "eta", "performance"])


# ---- sweep, strip, calibration, steps ----


def _sweep(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """Left: one image's Gaussian while the occluder grows; right: mean eta and sigma."""
    ((row, details),) = _details(table, scale, log).items()
    sides = np.arange(len(details["eta"]))
    figure, axes = _grid(2)
    left, right = axes[0]
    shades = plt.get_cmap("viridis")(sides / sides[-1])
    for side, part in zip(sides, details["one"], strict=True):
        for centre, sigma in zip(part["mu"][0], part["sigma"][0], strict=True):
            left.add_patch(Ellipse(centre, *(2 * np.array(sigma)), color=shades[side], fill=False, linewidth=1.5))
            left.annotate(str(side), centre, color=shades[side], fontsize=8)
    left.autoscale_view()
    left.set_aspect("equal", "datalim")
    left.set_title(f"{row}: a {details['label']}, one sigma, by side of the occluder", fontsize=9)
    inset = left.inset_axes([0.02, 0.72, 0.25, 0.25])
    inset.imshow(details["pixels"], cmap="gray")
    inset.set(xticks=[], yticks=[])
    right.plot(sides, details["eta"], marker="o", label="mean eta")
    right.plot(sides, details["sigma"], marker="s", label="mean sigma")
    right.set(xlabel="side of the occluder in pixels", title="200 test images")
    right.title.set_fontsize(9)
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure, pd.DataFrame({"side": sides, "eta": details["eta"], "sigma": details["sigma"]})


def _strip(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """Corrupted images sorted by eta, with the occluders outlined."""
    ((_, details),) = _details(table, scale, log).items()
    count = len(details["eta"])
    figure, axes = plt.subplots(2, count // 2, figsize=(count * 0.55, 3.2), constrained_layout=True)
    for number, panel in enumerate(axes.flat):
        pixels = np.array(details["pixels"][number])
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        for tile, side in enumerate(details["side"][number]):
            corner = details["left"][number][tile] + tile * len(pixels), details["top"][number][tile]
            box = Rectangle((corner[0] - 0.5, corner[1] - 0.5), side, side, fill=False, edgecolor="red", linewidth=1)
            panel.add_patch(box)
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{details['labels'][number]}: {details['eta'][number]:.2f}", fontsize=8)
    columns = {name: details[name] for name in ("labels", "eta", "side", "top", "left")}
    return figure, pd.DataFrame(columns)


def _calibration(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """Share of matching pairs against p(m), by row and condition."""
    rows, found = _details(table, scale, log), values(table, scale, log)
    figure, axes = _grid(2)
    lines = []
    for panel, condition in zip(axes[0], CONDITIONS, strict=True):
        panel.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for row, details in rows.items():
            part = details[condition]
            error = np.mean([metrics[f"ece_{condition}"] for metrics in found[row].values()])
            panel.plot(part["confidence"], part["frequency"], marker="o", markersize=4, label=f"{row}: ECE {error:.3f}")
            lines += [[row, condition, *point] for point in zip(*part.values(), strict=True)]
        panel.set(xlabel="p(m)", ylabel="share of matches")
        panel.set_title(condition, fontsize=9)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    return figure, pd.DataFrame(lines, columns=["row", "condition", "confidence", "frequency", "weight"])


def _steps(table: Table, scale: str, log: RunLog) -> tuple[Figure, pd.DataFrame]:
    """KNN accuracy and corrupted average precision against training steps, with the 95 % interval over seeds."""
    found, metrics = values(table, scale, log), ("knn_clean", "knn_corrupt", "knn_corrupt_same", "ap_corrupt")
    lines = []
    for row, seeds in found.items():
        method, steps = row.split(", ")
        for metric in metrics:
            lines.append([method, int(steps.split()[0]), metric, *interval([m[metric] for m in seeds.values()])])
    frame = pd.DataFrame(lines, columns=["method", "steps", "metric", "mean", "half_width"])
    figure, axes = _grid(len(metrics))
    for panel, metric in zip(axes[0], metrics, strict=True):
        for method, part in frame[frame.metric == metric].groupby("method", sort=False):
            half = np.where(np.isfinite(part.half_width), part.half_width, 0)
            panel.errorbar(part.steps, part["mean"], half, marker="o", capsize=3, label=method)
        ticks = sorted(frame.steps.unique())
        panel.set(xscale="log", xlabel="training steps")
        panel.set_xticks(ticks, [f"{count:,}" for count in ticks], fontsize=7)
        panel.minorticks_off()
        panel.set_title(metric.replace("_", " "), fontsize=9)
        panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure, frame


Draw = Callable[[Table, str, RunLog], tuple[Figure, pd.DataFrame]]
DRAW: dict[str, Draw] = {
    "figure-1": _mixture,
    "figure-3": _ellipses,
    "figure-4": _centroids,
    "figure-5": _bins,
    "figure-8": _ellipses,
    "figure-sweep": _sweep,
    "figure-strip": _strip,
    "figure-calibration": _calibration,
    "appendix-steps": _steps,
}
