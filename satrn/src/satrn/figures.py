"""The paper's figures from the run log alone: sizes, feed-forwards, rotation, readings and attention, aspect ratios."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from satrn.decoding import Recognition
from satrn.evaluate import comparable
from shared_utils import report
from shared_utils.folders import project_folder
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

SCALES = ("paper", "embedded", "rendered", "icdar2003")
BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "tab:gray"


def draw_all(tables: Sequence[Table], folder: Path, scales: Sequence[str] = SCALES) -> list[Path]:
    """Draw the figure of every table that has one and runs to show, at the first scale that was measured.

    Args:
        tables: to draw.
        folder: with <scale>.jsonl; figures go to <folder>/figures.
        scales: to look at, in this order.

    Returns:
        The files written.
    """
    written = []
    for table in tables:
        for name, draw in DRAW.get(table.id, {}).items():
            found = {scale: details(table, scale, folder) for scale in scales if scale in table.scales}
            measured = [scale for scale, records in found.items() if records]
            if not measured and table.id not in PUBLISHED:
                continue
            figure = draw(table, found[measured[0]], measured[0]) if measured else draw(table, {}, "paper")
            if figure is None:
                continue
            path = folder / "figures" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=90, metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def details(table: Table, scale: str, folder: Path) -> dict[str, list[dict]]:
    """A table's recorded runs by row, one per seed."""
    found = report.measured(table, scale, RunLog(folder / f"{scale}.jsonl"))
    return {row: list(seeds.values()) for row, seeds in found.items()}


def _rotation(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Accuracy by angle of the 2-D model and its 1-D control; and the gain on rotated and on straight words."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(2, 1))
    for key, label, colour in (
        ("accuracy_by_angle", "SATRN (2-D)", BLUE),
        ("control_accuracy_by_angle", "1-D control (height averaged)", ORANGE),
    ):
        curves = [
            record["details"][key] for records in found.values() for record in records if key in record["details"]
        ]
        angles = [*map(int, curves[0]), 360] if curves else []
        for number, curve in enumerate(curves):
            values = [*curve.values(), curve["0"]]
            left.plot(angles, values, "o-", color=colour, alpha=0.6, ms=3, label=None if number else label)
    left.set(xlabel="angle of the word (degrees)", ylabel="words read (%)", ylim=(0, 100), xticks=range(0, 361, 60))
    left.legend(fontsize=8, loc="lower right")
    left.set_title("Trained on all angles, one line per seed", fontsize=10)
    for place, records in enumerate(found.values()):
        gains = [record["metrics"]["gain"] for record in records]
        mean, half = report.interval(gains)
        right.bar(place, mean, color=(BLUE, GREY, GREEN)[place % 3], alpha=0.7, width=0.6)
        right.errorbar(place, mean, half if np.isfinite(half) else 0, color="black", capsize=4)
        right.plot([place] * len(gains), gains, "k.", ms=4)
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(range(len(found)), [row.replace(" words", "\nwords") for row in found], fontsize=8)
    right.set_ylabel("gain of 2-D over 1-D (points)")
    right.set_title("Trained and tested alike", fontsize=10)
    figure.suptitle(f"Two-dimensional attention against the 1-D control at equal steps (scale {scale})", fontsize=11)
    return figure


def _learning(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Words read by steps of training, 2-D and control, a panel per length of the words; a dot per seed."""
    lengths = list(dict.fromkeys(row.split(",")[0] for row in found))
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(4.5 * len(lengths), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        runs = [records for row, records in found.items() if row.startswith(length)]
        steps = [records[0]["settings"]["steps"] for records in runs]
        for metric, label, colour in (
            ("accuracy", "SATRN (2-D)", BLUE),
            ("control_accuracy", "1-D control (height averaged)", ORANGE),
        ):
            values = [[record["metrics"][metric] for record in records] for records in runs]
            axis.plot(steps, [np.mean(each) for each in values], "-", color=colour, label=label)
            for x, each in zip(steps, values, strict=True):
                axis.plot([x] * len(each), each, ".", color=colour)
        axis.set(xscale="log", xlabel="steps of training, the same for both", ylim=(0, 100), title=length)
        axis.set_xticks(steps, [f"{each:,}" for each in steps])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("words read (%)")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Rotated words: who learns faster (scale {scale})", fontsize=11)
    return figure


def _readings(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure | None:
    """Words of the first row (two seeds), what was read, and where the decoder looked for each character."""
    first_row = next(iter(found.values()))
    words = [word for record in first_row[:2] for word in record["details"]["sheet"]]
    if not words:
        return None
    longest = max(len(word["maps"]) for word in words)
    half = -(-len(words) // 2)
    figure, axes = plt.subplots(
        half, 2 * (1 + longest), figsize=(1.05 * 2 * (1 + longest), 1.3 * half), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, word in enumerate(words):
        line = axes[number % half, (number // half) * (1 + longest) :]
        image = _pixels(word["image"], word["size"])
        line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        right = word["text"] == word["label"]
        text = f"{word['text']} ({word['confidence']:.2f})" + ("" if right else f"\nis {word['label']}")
        line[0].set_title(text.replace("$", r"\$"), fontsize=8, color="black" if right else "red")
        for axis, content, character in zip(line[1:], word["maps"], word["text"], strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            extent = (-0.5, word["size"][1] - 0.5, word["size"][0] - 0.5, -0.5)
            axis.imshow(_pixels(content, word["map_size"]), cmap="inferno", alpha=0.6, extent=extent)
            axis.set_title(character.replace("$", r"\$"), fontsize=8)
    figure.suptitle(
        f"Words, readings (confidence), and the decoder's attention per character (scale {scale})", fontsize=9
    )
    return figure


def _real_readings(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Real words of the first row's first seed, evenly spaced over the set, with their readings."""
    row, records = next(iter(found.items()))
    words = records[0]["details"]["sheet"]
    figure, axes = plt.subplots(-(-len(words) // 4), 4, figsize=(9, 0.17 * len(words) + 0.6), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, word in zip(axes.flat, words, strict=False):
        axis.imshow(_pixels(word["image"], word["size"]), cmap="gray", vmin=0, vmax=255)
        right = comparable(word["text"]) == comparable(word["label"])
        text = word["text"] + ("" if right else f"  (is {word['label']})")
        axis.set_title(text.replace("$", r"\$"), fontsize=9, color="black" if right else "red")
    figure.suptitle(f"Real words, evenly spaced over the set, and what {row} read (scale {scale})", fontsize=10)
    return figure


def _pixels(content: str, size: Sequence[int]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(content), dtype=np.uint8).reshape(size)


def _sizes(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Figures 5 and 8: published accuracy (digitised) against parameters and FLOPs, with our exact counts."""
    lines = _published(table.id)
    groups = list(dict.fromkeys(line["model"] for line in lines))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, column, metric, label in (
        (axes[0], "params_M", "parameters_m", "parameters (million)"),
        (axes[1], "flops_B", "flops_b", "FLOPs (billion)"),
    ):
        for group, colour in zip(groups, (BLUE, ORANGE, GREEN), strict=False):
            points = [line for line in lines if line["model"] == group]
            x, y = ([float(p[c]) for p in points] for c in (column, "accuracy_all_8539"))
            axis.plot(x, y, "o--", color=colour, label=f"{group}, published")
            ours = [found[p["row"]][0]["metrics"][metric] if p["row"] in found else np.nan for p in points]
            axis.plot(ours, y, "x", color=colour, ms=9, label=f"{group}, our count")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 8,539 words (%), published")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{table.title} (crosses: our counts at the published accuracy)", fontsize=10)
    return figure


def _prior_art(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Table 1: published accuracy of SATRN and of earlier methods on the seven sets."""
    sets = ("IIIT5K", "SVT", "IC03", "IC13", "IC15", "SVTP", "CT80")
    colours = {"1D": GREY, "STN-1D": ORANGE, "2D": BLUE}
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for line in _published("table-1"):
        points = [(i, float(line[name])) for i, name in enumerate(sets) if line[name]]
        ours = line["method"] == "SATRN"
        style: dict[str, Any] = (
            {"marker": "*", "ms": 13, "zorder": 3} if ours else {"marker": "o", "ms": 5, "alpha": 0.7}
        )
        axis.plot(*zip(*points, strict=True), ls="", color="tab:red" if ours else colours[line["feature_map"]], **style)
    for label, colour in (*colours.items(), ("SATRN (2D)", "tab:red")):
        axis.plot([], [], "o", color=colour, label=label)
    axis.set_xticks(range(len(sets)), sets)
    axis.set(ylabel="accuracy (%), published", title="Table 1 as published: SATRN and twelve earlier methods")
    axis.legend(title="feature map", fontsize=8)
    return figure


def _aspect(table: Table, found: dict[str, list[dict]], scale: str) -> plt.Figure:
    """Figure 7's groups: share of upright and of vertical words by r."""
    records = next(iter(found.values()))
    figure, axes = plt.subplots(1, len(records), figsize=(3 * len(records), 3.2), layout="constrained", sharey=True)
    for axis, record in zip(np.atleast_1d(axes), records, strict=True):
        groups = record["details"]["ratio_groups"]
        for shift, name, colour in ((-0.2, "upright", BLUE), (0.2, "vertical", ORANGE)):
            counts = np.array(list(groups[name].values()))
            axis.bar(np.arange(3) + shift, 100 * counts / counts.sum(), 0.4, color=colour, label=name)
        axis.set_xticks(range(3), list(groups["upright"]), fontsize=8)
        medians = f"median r {groups['median_upright']:.2f} / {groups['median_vertical']:.2f}"
        axis.set_title(f"seed {record['seed']}: {medians}", fontsize=9)
    np.atleast_1d(axes)[0].set_ylabel("words (%)")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.suptitle(f"A2DPE's ratio r = |alpha| / |beta| (scale {scale})", fontsize=10)
    return figure


def _published(name: str) -> list[dict]:
    """Lines of a figure's published values, stored next to its table file."""
    with open(project_folder(__file__) / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


Draw = Callable[[Table, dict[str, list[dict]], str], plt.Figure | None]
PUBLISHED = ("table-1",)  # drawn only from the published figures
DRAW: dict[str, dict[str, Draw]] = {
    "table-1": {"table-1": _prior_art},
    "figure-5-costs": {"figure-5-costs": _sizes},
    "figure-7": {"figure-7": _aspect},
    "figure-8-costs": {"figure-8-costs": _sizes},
    "learning-curves": {"learning-curves": _learning},
    "rotation": {"rotation": _rotation, "readings": _readings},
    "figure-9": {"figure-9": _readings},
    "real-words": {"real-words": _real_readings},
}


def draw_attention(images: Tensor, recognition: Recognition, path: Path) -> None:
    """Images uint8 [N, C, H, W] with their readings and the attention map of every character, as a PNG.

    Raises:
        ValueError: a reading without attention.
    """
    if recognition.attention is None:
        raise ValueError("recognition: has no attention maps; read with attention=True")
    longest = max(1, max(map(len, recognition.texts)))
    figure, axes = plt.subplots(
        len(images), 1 + longest, figsize=(1.6 * (1 + longest), 1.2 * len(images)), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, image, text, maps in zip(axes, images, recognition.texts, recognition.attention.cpu(), strict=True):
        picture = image.permute(1, 2, 0).cpu().numpy().squeeze()
        extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
        line[0].imshow(picture, cmap="gray")
        line[0].set_title(text.replace("$", r"\$"), fontsize=8)
        for axis, weights, character in zip(line[1:], maps, text, strict=False):
            axis.imshow(picture, cmap="gray")
            axis.imshow(weights.numpy(), cmap="inferno", alpha=0.6, extent=extent)
            axis.set_title(character.replace("$", r"\$"), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
