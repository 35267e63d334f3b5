"""Figures F1 to F5 from the run log and the published CSVs next to the table files, and a preview of digits users."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fl_linkability.catalogue import PROJECT
from shared_utils import report
from shared_utils.runlog import RunLog
from shared_utils.tables import Table

SCALES = ("paper", "embedded", "mnist")
COLOURS = {
    "none": "black", "noise": "tab:red", "bkg-repl": "tab:green", "rand-aug": "tab:orange", "mm-aug": "tab:blue",
    "PIPA": "tab:purple", "OpenImages": "tab:cyan", "Blog": "tab:olive", "Yelp": "tab:pink",
}  # fmt: skip


# Colours of the frontier, by part of a row's name; the most specific come first.
FAMILIES = {
    "DP": "tab:purple", "sum of": "tab:cyan", "noise": "tab:red", "clip": "tab:gray", "mm-aug": "tab:blue",
    "bkg-repl": "tab:green", "decoys": "tab:olive", "calibrated": "tab:brown", "random": "tab:orange",
    "pretraining": "tab:pink", "jitter": "darkcyan", "none": "black",
}  # fmt: skip
FRONTIER = ("T5", "T6", "T6b")
# Rows of figure-12 with their label below the point.
BELOW = ("none, 3 local epochs", "mm-aug, M = 40, a = 2", "rand-aug, a = 0.5", "rand-aug, a = 2")


def draw_all(tables: list[Table], results: Path) -> None:
    """Draw every figure at the measured scale closest to the paper's."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    for table in tables:
        if table.id not in DRAW:
            continue
        for scale in SCALES:
            found = measured(table, scale, results)
            if found:
                if table.id == FRONTIER[0]:
                    for more in (each for each in tables if each.id in FRONTIER[1:]):
                        found = measured(more, scale, results) | found
                figure = DRAW[table.id](scale, found)
                figure.savefig(results / "figures" / f"{table.id}.png", dpi=90, metadata={"Software": None})
                plt.close(figure)
                break


def measured(table: Table, scale: str, results: Path) -> dict[str, list[dict]]:
    """A table's recorded runs by row, one per seed."""
    found = report.measured(table, scale, RunLog(results / f"{scale}.jsonl"))
    return {row: list(seeds.values()) for row, seeds in found.items()}


def _mean(records: list[dict], metric: str) -> float:
    return float(np.mean([record["metrics"][metric] for record in records]))


def _spread(records: list[dict], metric: str) -> float:
    return float(np.std([record["metrics"][metric] for record in records], ddof=1)) if len(records) > 1 else 0.0


def _trade_off(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """F1: utility relative to no mitigation against the attack; ours left, the paper's points right."""
    figure, axes = plt.subplot_mosaic(
        [["ours", "ours", "PIPA", "OpenImages"], ["ours", "ours", "Blog", "Yelp"]],
        figsize=(11, 5), layout="constrained",
    )  # fmt: skip
    by_set: dict[str, dict[str, list[dict]]] = defaultdict(dict)
    for row, records in found.items():
        dataset, name = row.split(", ", 1)
        by_set[dataset][name] = records
    for marker, (dataset, rows) in zip("osD^v", by_set.items(), strict=False):
        base = _mean(rows["none"], "user_accuracy")
        for name, records in rows.items():
            kind, _, label = name.partition(", ")
            y = _mean(records, "user_accuracy") / base
            x = _mean(records, "times_chance_ap")
            axes["ours"].errorbar(
                x, 1 / y if dataset == "Yelp" else y, xerr=_spread(records, "times_chance_ap"),
                color=COLOURS[kind], marker=marker, capsize=2,
            )  # fmt: skip
            if len(by_set) == 1:
                place = (0, -14 if name in BELOW else 7)
                axes["ours"].annotate(label, (x, y), fontsize=8, xytext=place, textcoords="offset points", ha="center")
    axes["ours"].set_title(f"ours, {', '.join(by_set)} (scale {scale}, mean and sd)", fontsize=10)
    axes["ours"].set_ylabel("utility relative to no mitigation")
    for line in _published("figure-12"):
        point = float(line["adversary_AP_times_chance"]), float(line["utility_relative"])
        axes[line["dataset"]].plot(*point, "o", color=COLOURS[line["strategy"]], markersize=4)
    for name, panel in axes.items():
        panel.set_xscale("log")
        panel.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        if name != "ours":
            panel.set_title(f"published, {name}", fontsize=10)
            panel.set_xlim(0.3, 250)
    axes["ours"].set_xlim(1.3, 100)
    for kind in ("none", "noise", "bkg-repl", "rand-aug", "mm-aug"):
        axes["ours"].plot([], [], "o", color=COLOURS[kind], label=kind)
    axes["ours"].legend(fontsize=9, loc="lower right")
    figure.supxlabel("re-identification, times chance (AP)", fontsize=10)
    return figure


def _frontier(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """F1: accuracy against top-1 of each mitigation, numbered; hollow where it does not hide from this adversary.

    Secure aggregation: the best match of a sum is among its senders.
    """
    figure, panel = plt.subplots(figsize=(9.5, 5), layout="constrained")
    taken: list[tuple[float, float]] = []
    sums = [records for row, records in found.items() if row.startswith("sum of")]
    if sums:
        points = [(_mean(records, "hit"), _mean(records, "population_accuracy")) for records in sums]
        label = "sums of 2 to 4 (secure aggregation)"
        panel.plot(*np.array(points).T, "s", color="tab:cyan", label=label, markersize=5)
    numbered = [row for row in found if not row.startswith(("sum", "single"))]
    for number, row in enumerate(sorted(numbered, key=lambda row: _mean(found[row], "top1")), 1):
        x, y = _mean(found[row], "top1"), _mean(found[row], "population_accuracy")
        colour = next(FAMILIES[part] for part in FAMILIES if part in row)
        fill = "none" if "central" in row or "anonymous devices only" in row else "full"
        label = f"{number}  {row.replace(', C = 0.5', '')}"
        if "local DP" in row:
            label += f" ({_mean(found[row], 'epsilon'):,.0f} in the run)"
        panel.plot(x, y, "o", color=colour, fillstyle=fill, label=label)
        close = any(abs(np.log(x / other)) < 0.12 and abs(y - level) < 6 for other, level in taken)
        taken.append((x, y))
        place = (9, -3) if close else (0, 6)
        panel.annotate(f"{number}", (x, y), fontsize=8, xytext=place, textcoords="offset points", ha="center")
    panel.axvline(100 / _mean(found["none"], "known_users"), color="grey", linestyle=":", label="chance")
    panel.set(xscale="log", xlim=(2, 110), xlabel="re-identification, top-1 (%)", ylabel="accuracy, population (%)")
    panel.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    panel.set_title(f"An adversary who mitigates as well, centroid attack (scale {scale})", fontsize=10)
    return figure


def _stages(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """F2: known updates of one part of training against probes of another."""
    records = next(iter(found.values()))
    matrix = np.mean([record["details"]["matrix"] for record in records], axis=0)
    bounds = records[0]["details"]["rounds"]
    names = [f"{a}-{b - 1}" for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    figure, panel = plt.subplots(figsize=(4.8, 3.9), layout="constrained")
    image = panel.imshow(matrix, vmin=0, cmap="viridis")
    for (y, x), value in np.ndenumerate(matrix):
        panel.text(
            x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > matrix.max() / 2 else "white"
        )
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set_yticks(range(len(names)), names)
    panel.set(xlabel="rounds of the probes", ylabel="rounds of the known updates")
    panel.set_title(f"Re-identification by training stage, times chance (scale {scale})", fontsize=9)
    figure.colorbar(image, label="times chance (AP)")
    return figure


def _users(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """F3: times chance by the number of users, with its bound and the floor."""
    rows = list(found.values())
    users = [_mean(records, "known_users") for records in rows]
    figure, panel = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    panel.plot(users, users, "k:", label="bound: number of users")
    panel.errorbar(
        users, [_mean(r, "times_chance_ap") for r in rows], [_spread(r, "times_chance_ap") for r in rows],
        marker="o", capsize=2, label="K-NN on updates",
    )  # fmt: skip
    panel.plot(
        users, [_mean(r, "floor_q99") for r in rows], "s--", color="tab:red", label="floor: permuted devices, 99 %"
    )
    panel.set(xscale="log", yscale="log", xlabel="users U", ylabel="times chance (AP)")
    panel.set_xticks(users, [f"{u:.0f}" for u in users])
    panel.minorticks_off()
    panel.set_title(f"Re-identification by number of users (scale {scale})", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def _layers(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
    """F4: AP by layer; ours and the paper's MobileNet on photos."""
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", width_ratios=[1, 2.2])
    names = [row.split(", ")[1] for row in found]
    ours.bar(
        names, [_mean(r, "mAP_macro") for r in found.values()],
        yerr=[_spread(r, "mAP_macro") for r in found.values()], color="tab:blue", capsize=3,
    )  # fmt: skip
    ours.set(ylabel="re-identification AP (%)", ylim=(0, 105))
    ours.set_title(f"ours, digits users, K-NN (scale {scale})", fontsize=9)
    lines = _published("figure-7")
    for kind, marker in (("conv", "o-"), ("depthwise conv", "s--"), ("FC", "D")):
        part = [(int(x["depth"]), float(x["reid_AP_percent"])) for x in lines if x["layer_type"] == kind]
        paper.plot(*np.array(part).T, marker, label=kind, markersize=4)
    paper.set(xlabel="depth in MobileNet", ylim=(0, 105))
    paper.set_title("published, photos (Figure 7), MLP", fontsize=9)
    paper.legend(fontsize=8)
    for panel in (ours, paper):
        panel.grid(alpha=0.3)
    return figure


def _by_count(name: str, column: str, label: str) -> Callable:
    """F5: AP against prior examples or known updates; ours and the paper's."""

    def draw(scale: str, found: dict[str, list[dict]]) -> plt.Figure:
        figure, panel = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
        counts = [int(row.split(", ")[1].split()[0]) if row.split(", ")[1][0].isdigit() else 20 for row in found]
        rows = list(found.values())
        panel.errorbar(
            counts, [_mean(r, "mAP_macro") for r in rows], [_spread(r, "mAP_macro") for r in rows],
            color="black", marker="o", capsize=2, linewidth=2, label=f"ours, digits users (scale {scale})",
        )  # fmt: skip
        lines = defaultdict(list)
        for line in _published(name):
            if line.get("prior_distribution", "random") == "random":
                lines[line["dataset"]].append((int(line[column]), float(line["reid_AP_percent"])))
        for dataset, points in lines.items():
            panel.plot(*np.array(points).T, "s--", color=COLOURS[dataset], markersize=3, label=f"published, {dataset}")
        panel.set(xlabel=label, ylabel="re-identification AP (%)", ylim=(0, 103))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure

    return draw


DRAW: dict[str, Callable[[str, dict[str, list[dict]]], plt.Figure]] = {
    "figure-12": _trade_off,
    "figure-8": _stages,
    "F3": _users,
    "T5": _frontier,
    "table-5": _layers,
    "figure-5": _by_count("figure-5", "prior_examples_per_user", "prior examples of a user"),
    "figure-6": _by_count("figure-6", "training_updates_per_user", "known updates of a user (ours: all are about 20)"),
}


def draw_preview(path: Path) -> None:
    """Eight digits users: six images of the prior device and six of the anonymous one in each row."""
    from fl_linkability.data.styled import make_digits_users

    users = make_digits_users(seed=0, n_users=8).users
    figure, axes = plt.subplots(8, 12, figsize=(7, 5), layout="constrained")
    for user, line in enumerate(axes):
        images = [users.of_device(2 * user + half)[0][:6] for half in (0, 1)]
        for panel, image in zip(line, [image for half in images for image in half], strict=True):
            panel.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            panel.axis("off")
    figure.suptitle("Digits users, one per row: prior device (left six), anonymous device (right six)", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _published(name: str) -> list[dict]:
    """A figure's published values, stored next to its table file."""
    path = PROJECT / "tables" / f"{name}.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
