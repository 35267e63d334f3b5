"""The papers' figures from the run logs alone, and two sheets that show what the methods do to images."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from shared_utils import report
from shared_utils.folders import project_folder
from shared_utils.report import interval, values
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("paper", "twowave", "embedded")
COLOURS = {"Baseline": "tab:gray", "Mixup": "tab:green", "Cutout": "tab:orange", "CutMix": "tab:blue"}
TENTHS = np.arange(11) / 10
PANELS = {  # of figure 5: key in a run's details, published panel, axis
    "center_occlusion": ("centre occlusion", "side of the hole / side of the image", "top-1 error (%)"),
    "boundary_occlusion": ("boundary occlusion", "side of the rest / side of the image", "top-1 error (%)"),
    "in_between_mixup": ("Mixup in-between", "weight of B", "neither class (%)"),
    "in_between_cutmix": ("CutMix in-between", "side of the box of B / side", "neither class (%)"),
}


def draw_all(tables: list[Table], results: Path) -> None:
    """Draw every figure at the scale closest to the paper's that was measured, and the two sheets."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    by_id = {table.id: table for table in tables}
    for name, draw in DRAW.items():
        table = by_id[name]
        measured = [scale for scale in SCALES if scale in table.scales and _details(table, scale, results)]
        if measured or any(row.published for row in table.rows):
            _save(draw(table, measured[0] if measured else None, results), results / "figures" / f"{name}.png")
    _save(draw_methods(), results / "figures" / "table-2.png")
    _save(draw_corruptions(), results / "figures" / "corruptions.png", dpi=56)


def _save(figure: plt.Figure, path: Path, dpi: int = 90) -> None:
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def _details(table: Table, scale: str, results: Path) -> dict[str, list[dict]]:
    """Details of the recorded runs of a table's present settings, by row."""
    found = report.measured(table, scale, RunLog(results / f"{scale}.jsonl"))
    return {row: [record["details"] for record in seeds.values()] for row, seeds in found.items()}


def _means(table: Table, scale: str, results: Path, metric: str) -> dict[str, tuple[float, float]]:
    """Mean and half width of the 95 % interval of a metric, by row."""
    found = values(table, scale, RunLog(results / f"{scale}.jsonl"))
    return {row: interval([each[metric] for each in seeds.values()]) for row, seeds in found.items()}


def _error_curves(table: Table, scale: str | None, results: Path) -> plt.Figure:
    """Figure 2: test error over the epochs, mean and range of the seeds."""
    figure, panel = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    found = _details(table, scale, results) if scale else {}
    for row, seeds in found.items():
        epochs = [int(epoch) for epoch in seeds[0]["test_errors"]]
        errors = np.array([list(each["test_errors"].values()) for each in seeds])
        panel.plot(epochs, errors.mean(0), color=COLOURS[row], label=f"{row}, {len(seeds)} seeds")
        panel.fill_between(epochs, errors.min(0), errors.max(0), color=COLOURS[row], alpha=0.2, lw=0)
    panel.set(xlabel="epoch", ylabel="test error (%)", title=_where("Test error over training", scale))
    panel.legend()
    return figure


def _where(title: str, scale: str | None) -> str:
    return f"{title} ({'TwoWave' if scale in ('embedded', 'twowave') else scale or 'not measured'})"


def _alpha_and_layer(table: Table, scale: str | None, results: Path) -> plt.Figure:
    """Figure 3: error against alpha and against the layer, published and ours."""
    found = _means(table, scale, results, "top1_error") if scale else {}
    panels: dict[str, dict[float, str]] = {
        "alpha": {float(row.name.removeprefix("alpha ")): row.name for row in table.rows if "alpha" in row.name},
        "layer": {int(row.name.removeprefix("layer ")): row.name for row in table.rows if "layer" in row.name},
    }
    panels["alpha"][1.0], panels["layer"][0] = "CutMix", "CutMix"
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), layout="constrained", squeeze=False)
    for column, (name, rows) in enumerate(panels.items()):
        x = sorted(rows)
        position = range(len(x))
        published = [table.row(rows[each]).published["top1_error"] for each in x]
        for line, title in enumerate(("published, CIFAR-100", _where("ours", scale))):
            panel = axes[line][column]
            panel.set(title=title, xlabel=name if name == "alpha" else "layer (0: image)", ylabel="top-1 error (%)")
            panel.set_xticks(position, [f"{each:g}" for each in x])
        axes[0][column].plot(position, published, "o-", color="tab:blue", label="CutMix")
        axes[0][column].axhline(16.45, color="tab:gray", ls="--", label="baseline")
        there = [(at, *found[rows[each]]) for at, each in zip(position, x, strict=True) if rows[each] in found]
        if there:
            axes[1][column].errorbar(*zip(*there, strict=True), fmt="o-", color="tab:blue", capsize=3)
        if "Baseline" in found:
            axes[1][column].axhline(found["Baseline"][0], color="tab:gray", ls="--")
    axes[0][0].legend(fontsize=8)
    return figure


def _probe_curves(table: Table, scale: str | None, results: Path) -> plt.Figure:
    """Figure 5: occluded and in-between images: published curves above, ours below."""
    with open(project_folder(__file__) / "tables" / "figure-5.csv", newline="") as file:
        published = list(csv.DictReader(file))
    found = _details(table, scale, results) if scale else {}
    lines = [line for line, there in (("published", table.id == "figure-5"), ("ours", found)) if there]
    figure, axes = plt.subplots(len(lines), 4, figsize=(14, 3.3 * len(lines)), layout="constrained", squeeze=False)
    for line, panels in zip(lines, axes, strict=True):
        for (key, (name, xlabel, ylabel)), panel in zip(PANELS.items(), panels, strict=True):
            for method, colour in COLOURS.items():
                if line == "ours" and method not in found:
                    continue
                if line == "published":
                    points = [
                        (float(each["hole_size_px_or_combination_ratio"]), float(each["top1_err"]))
                        for each in published
                        if each["panel"] == name and each["method"] == method
                    ]
                    x, y = np.array(points).T
                    x = x / 224 if "occlusion" in name else x
                else:
                    x, y = TENTHS, np.mean([each[key] for each in found[method]], 0)
                panel.plot(x, y, color=colour, label=method, marker=".", ms=4)
            panel.set(xlabel=xlabel, ylabel=ylabel)
            panel.set_title(f"{name}, {'published' if line == 'published' else _where('ours', scale)}", fontsize=9)
    axes[0][0].legend(fontsize=8)
    return figure


def _confidence_bars(table: Table, scale: str | None, results: Path) -> plt.Figure:
    """Figure R1: mean confidence of each method without and with label smoothing."""
    found = _means(table, scale, results, "mean_confidence") if scale else {}
    pairs = list(zip(table.rows[::2], table.rows[1::2], strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    place = np.arange(len(pairs))
    for side, label in enumerate(("without LS", "with LS")):
        rows = [pair[side] for pair in pairs]
        axes[0].bar(place + 0.4 * side, [row.published["mean_confidence"] for row in rows], 0.4, label=label)
        mean, half = np.array([found.get(row.name, (np.nan, np.nan)) for row in rows]).T
        axes[1].bar(place + 0.4 * side, mean, 0.4, yerr=half, capsize=3, label=label)
    for panel, title in zip(axes, ("published, CIFAR-100", _where("ours", scale)), strict=True):
        panel.set_xticks(place + 0.2, [without.name for without, _ in pairs], rotation=20)
        panel.set(title=title, ylim=(40, 100))
    axes[0].set_ylabel("mean confidence (%)")
    axes[0].legend(fontsize=8, loc="lower left")
    return figure


DRAW: dict[str, Callable[[Table, str | None, Path], plt.Figure]] = {
    "figure-2": _error_curves,
    "figure-3": _alpha_and_layer,
    "figure-5": _probe_curves,
    "figure-R1": _confidence_bars,
    "robustness": _probe_curves,
}


def photographs(side: int = 224) -> Tensor:
    """Two pictures that matplotlib ships, (2, 3, side, side) uint8."""
    import torch
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    found = []
    for name, box in (("grace_hopper.jpg", (40, 20, 472, 452)), ("Minduka_Present_Blue_Pack.png", None)):
        with get_sample_data(name, asfileobj=True) as file:  # type: ignore[union-attr]  # an array only for .npy
            picture = Image.open(file).convert("RGBA")
            page = Image.new("RGBA", picture.size, "white")
            page.alpha_composite(picture)
            found.append(np.array(page.convert("RGB").crop(box or (0, 0, *picture.size)).resize((side, side))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def _picture(image: Tensor) -> np.ndarray:
    """(3, H, W) tensor in matplotlib's layout."""
    return image.permute(1, 2, 0).numpy()


def draw_methods() -> plt.Figure:
    """The pair A, B under Mixup, Cutout and CutMix, and one CutMix batch of TwoWave with its label weights."""
    import torch

    from cutmix_robustness.cutmix import CutMix, cutmix_box
    from cutmix_robustness.data.twowave import twowave
    from cutmix_robustness.draws import generator_for
    from cutmix_robustness.dropout import Cutout

    images = photographs().float() / 255
    a, b = images
    y1, x1, y2, x2 = cutmix_box(224, 224, torch.tensor([0.6]), torch.tensor([[140.0, 150.0]]))[0].tolist()
    cutmix = a.clone()
    cutmix[:, y1:y2, x1:x2] = b[:, y1:y2, x1:x2]
    lam = 1 - (y2 - y1) * (x2 - x1) / 224**2
    cutout = Cutout(112, (0.5,) * 3, generator_for(3))(a[None])[0]
    shown = [("A", a), ("B", b), ("Mixup: A 0.5, B 0.5", (a + b) / 2), ("Cutout: A 1", cutout)]
    shown.append((f"CutMix: A {lam:.2f}, B {1 - lam:.2f}", cutmix))
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.15))
    for (title, image), panel in zip(shown, top.subplots(1, 5), strict=True):
        panel.imshow(_picture(image))
        panel.set_title(title, fontsize=9)
        panel.axis("off")
    batch = twowave(8, seed=0).images
    mixed = CutMix(mode="sample", generator=generator_for(5))(batch, torch.arange(8))
    bottom.suptitle("A batch of TwoWave (above) and after CutMix with a box per sample (below)", fontsize=10)
    panels = bottom.subplots(2, 8)
    for number in range(8):
        panels[0][number].imshow(_picture(batch[number]))
        panels[0][number].set_title(f"{number}", fontsize=9)
        panels[1][number].imshow(_picture(mixed.images[number]))
        top_y, left_x, bottom_y, right_x = mixed.boxes[number].tolist()
        edge = plt.Rectangle((left_x - 0.5, top_y - 0.5), right_x - left_x, bottom_y - top_y, fill=False, ec="w", lw=2)
        panels[1][number].add_patch(edge)
        weight = mixed.lam[number].item()
        panels[1][number].set_title(f"{number}: {weight:.2f}, {mixed.perm[number]}: {1 - weight:.2f}", fontsize=9)
    for panel in panels.flat:
        panel.axis("off")
    return figure


def draw_corruptions() -> plt.Figure:
    """One photograph under all 19 corruptions at severity 3 of the ImageNet table."""
    from cutmix_robustness.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
    from cutmix_robustness.draws import generator_for

    image = photographs()[:1]
    shown = [("original", image)]
    for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
        shown.append((name.replace("_", " "), corrupt(image, name, 3, "imagenet", generator=generator_for(name))))
    figure, axes = plt.subplots(4, 5, figsize=(10, 8.6), layout="constrained")
    for (title, picture), panel in zip(shown, axes.flat, strict=True):
        panel.imshow(_picture(picture[0]))
        panel.set_title(title, fontsize=10)
        panel.axis("off")
    return figure
