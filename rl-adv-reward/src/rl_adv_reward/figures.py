"""The figures, drawn from the run log alone, and pictures of an attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from rl_adv_reward.evaluation import unpack
from shared_utils.report import interval, measured, values
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

SCALES = ("paper", "atari-short", "embedded")
AMPLIFIED = 5  # factor by which perturbations are enlarged in pictures


def draw_all(tables: list[Table], results: Path) -> None:
    """Draw every figure at the scale closest to the paper's that was measured."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    for table in tables:
        for scale in SCALES if table.id in DRAW else ():
            log = RunLog(results / f"{scale}.jsonl")
            if values(table, scale, log):
                figure = DRAW[table.id](table, scale, log)
                figure.savefig(results / "figures" / f"{table.id}.png", dpi=90, metadata={"Software": None})
                plt.close(figure)
                break


def details(table: Table, scale: str, log: RunLog) -> dict[str, list[dict]]:
    """Details of a table's recorded runs by row, one entry per seed; includes rows that another table runs."""
    found = measured(table, scale, log)
    return {row: [record["details"] for record in seeds.values()] for row, seeds in found.items()}


def _curves(table: Table, scale: str, log: RunLog) -> plt.Figure:
    """Figure 1: adversarial reward during the attack's training; mean over seeds, shaded from lowest to highest."""
    figure, panel = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for row, seeds in details(table, scale, log).items():
        curves = [each["curve"] for each in seeds if "curve" in each]
        if not curves:
            continue
        iterations = [point["iteration"] for point in curves[0]]
        rates = np.array([[point["adv_rate"] for point in curve] for curve in curves])
        line = panel.plot(iterations, rates.mean(0), marker=".", label=row)[0]
        panel.fill_between(iterations, rates.min(0), rates.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set(xlabel="iteration of the attack's training", ylabel="adversarial reward per 1000 steps")
    panel.set_title(f"{table.title} (scale {scale})", fontsize=10)
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    return figure


def _sweep(table: Table, scale: str, log: RunLog) -> plt.Figure:
    """Figure 2: adversarial reward and the victim's return against eps, with the 95 % interval over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    found = values(table, scale, log)
    for attack in ("ATN", "PGD towards the script"):
        rows = [row for row in table.rows_at(scale) if row.name.startswith(f"{attack},") and row.name in found]
        eps = [255 * table.settings(row, scale)["eps"] for row in rows]
        for panel, metric in zip(axes, ("adv_rate", "victim_return"), strict=True):
            spread = [interval([m[metric] for m in found[row.name].values()]) for row in rows]
            half = [h if np.isfinite(h) else 0 for _, h in spread]
            panel.errorbar(eps, [mean for mean, _ in spread], half, marker="o", markersize=4, capsize=2, label=attack)
    for panel, label in zip(
        axes, ("adversarial reward per 1000 steps", "victim's own return per episode"), strict=True
    ):
        panel.set(xlabel="eps (1/255)", ylabel=label)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{table.title} (scale {scale})", fontsize=10)
    return figure


def _landings(table: Table, scale: str, log: RunLog) -> plt.Figure:
    """Figure 3: distribution of landings along the enemy's line, from its top; all seeds together."""
    found = details(table, scale, log)
    figure, axes = plt.subplots(
        len(found), 1, figsize=(6.5, 1.15 * len(found) + 0.6), sharex=True, layout="constrained"
    )
    for panel, (row, seeds) in zip(np.atleast_1d(axes), found.items(), strict=True):
        counts = np.sum([each["landings"] for each in seeds], axis=0)
        bins = len(counts)
        panel.bar((np.arange(bins) + 0.5) / bins, counts / max(1, counts.sum()), width=0.9 / bins)
        panel.set_title(f"{row} ({counts.sum():,} landings)", fontsize=8, loc="left")
        panel.set(xlim=(0, 1), ylabel="share")
        for third in (1 / 3, 2 / 3):
            panel.axvline(third, color="gray", linewidth=0.8, linestyle="--")
    np.atleast_1d(axes)[-1].set_xlabel("position on the enemy's line, from its top")
    figure.suptitle(f"{table.title} (scale {scale})", fontsize=10)
    return figure


def _frames(table: Table, scale: str, log: RunLog) -> plt.Figure:
    """Figure 4: one line of pictures per attack, first seed."""
    found = {row: seeds[0]["frames"] for row, seeds in details(table, scale, log).items()}
    pictures = {row: {name: unpack(frames) for name, frames in parts.items()} for row, parts in found.items()}
    steps = [0, 3] if min(len(p["clean"]) for p in pictures.values()) > 3 else [0]
    figure, axes = plt.subplots(
        len(pictures), 3 * len(steps), figsize=(5.4 * len(steps), 1.9 * len(pictures) + 0.4), layout="constrained"
    )
    for line, (row, parts) in zip(np.atleast_2d(axes), pictures.items(), strict=True):
        for number, step in enumerate(steps):
            clean, attacked = parts["clean"][step], parts["attacked"][step]
            shown = (
                ("clean", clean),
                (f"perturbation x {AMPLIFIED}", amplified(clean, attacked)),
                ("attacked", attacked),
            )
            for panel, (label, picture) in zip(line[3 * number : 3 * number + 3], shown, strict=True):
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                panel.set_title(label, fontsize=8)
                panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(row.replace(": ", "\n"), fontsize=8)
    figure.suptitle(f"{table.title} (scale {scale})", fontsize=10)
    return figure


def amplified(clean: np.ndarray, attacked: np.ndarray) -> np.ndarray:
    """The difference of two uint8 frames around middle grey, enlarged AMPLIFIED times."""
    return np.clip(128 + AMPLIFIED * (attacked.astype(int) - clean.astype(int)), 0, 255).astype(np.uint8)


DRAW: dict[str, Callable[[Table, str, RunLog], plt.Figure]] = {
    "figure-1": _curves,
    "figure-2": _sweep,
    "figure-3": _landings,
    "figure-4": _frames,
}


def draw_play(path: Path, frames: dict[str, np.ndarray]) -> None:
    """Write clean frame, perturbation and attacked frame side by side: a GIF over all steps, or a PNG of eight of them.

    Args:
        path: .gif or .png.
        frames: "clean" and "attacked", (T, H, W) uint8 each.

    Raises:
        ValueError: another file ending.
    """
    if path.suffix not in (".gif", ".png"):
        raise ValueError(f"output must end in .gif or .png, got {path.name}")
    factor = max(1, 160 // frames["clean"].shape[1])
    triples = [np.hstack([c, amplified(c, a), a]) for c, a in zip(frames["clean"], frames["attacked"], strict=True)]
    images = [Image.fromarray(triple.repeat(factor, 0).repeat(factor, 1)) for triple in triples]
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0)
    else:
        chosen = np.linspace(0, len(images) - 1, min(8, len(images))).astype(int)
        Image.fromarray(np.vstack([np.asarray(images[i]) for i in chosen])).save(path)
