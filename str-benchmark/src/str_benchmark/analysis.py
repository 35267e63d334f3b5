"""Analyses of all 24 (sections 4.3, 4.4): module means, gains in matched pairs, frontiers; and two models."""

from __future__ import annotations

import pandas as pd
from scipy import stats

from shared_utils.folders import project_folder
from str_benchmark.config import STAGES
from str_benchmark.data.names import each_word_once
from str_benchmark.frontier import non_dominated, upper_hull
from str_benchmark.metrics import mcnemar

PUBLISHED = project_folder(__file__) / "tables" / "published"
PAIRS = (
    ("trans", "None", "TPS"),
    ("feat", "VGG", "RCNN"),
    ("feat", "RCNN", "ResNet"),
    ("seq", "None", "BiLSTM"),
    ("pred", "CTC", "Attn"),
)


def published(table: str = "table-8") -> pd.DataFrame:
    """A table of the paper as a frame."""
    return pd.read_csv(PUBLISHED / f"{table}.csv")


def split_stages(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with one column per stage, from its column `combination`.

    Raises:
        ValueError: no such column, or a name that is not a combination.
    """
    if "combination" not in frame:
        raise ValueError(f"expected a column 'combination', got {', '.join(frame.columns)}")
    parts = frame["combination"].str.split(" ").str[0].str.split("-", expand=True)
    for number, (stage, choices) in enumerate(STAGES.items()):
        if parts.shape[1] != len(STAGES) or not parts[number].isin(choices).all():
            raise ValueError(
                f"combination: expected names such as TPS-ResNet-BiLSTM-Attn, got {frame.combination[0]!r}"
            )
        frame = frame.assign(**{stage: parts[number]})
    return frame


def module_means(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean of a metric over the combinations that contain each module: columns stage, module, mean, n."""
    frame = split_stages(frame)
    rows = []
    for stage, choices in STAGES.items():
        for choice in choices:
            values = frame.loc[frame[stage] == choice, metric]
            rows.append((stage, choice, values.mean(), len(values)))
    return pd.DataFrame(rows, columns=["stage", "module", "mean", "n"])


def matched_gains(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Gain of a module over another with all other stages equal.

    Returns:
        columns stage, module, over, mean, lowest, highest, pairs, p_value (exact two-sided sign test).
    """
    frame = split_stages(frame)
    rows = []
    for stage, old, new in PAIRS:
        others = [name for name in STAGES if name != stage]
        a, b = (frame[frame[stage] == choice].set_index(others)[metric] for choice in (old, new))
        gain = (b - a).dropna()
        p = stats.binomtest(int((gain > 0).sum()), len(gain)).pvalue
        rows.append((stage, new, old, gain.mean(), gain.min(), gain.max(), len(gain), p))
    return pd.DataFrame(rows, columns=["stage", "module", "over", "mean", "lowest", "highest", "pairs", "p_value"])


def frontier(frame: pd.DataFrame, cost: str, accuracy: str) -> pd.DataFrame:
    """Models on the upper hull and non-dominated models: combination, cost, accuracy, on_hull.

    ValueError if the frame lacks a column.
    """
    for name in ("combination", cost, accuracy):
        if name not in frame:
            raise ValueError(f"expected a column {name!r}, got {', '.join(frame.columns)}")
    hull = set(upper_hull(frame[cost], frame[accuracy]))
    kept = non_dominated(frame[cost], frame[accuracy])
    chosen = frame.iloc[kept][["combination", cost, accuracy]].reset_index(drop=True)
    return chosen.assign(on_hull=[index in hull for index in kept])


def compare_words(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """McNemar's exact test of two models from their per-word results (`eval --words`).

    Returns:
        a row per set, and one named "all words" where each word counts once: set, n, first, second (accuracies in %),
        only_first, only_second (words that one of them reads), p_value (two-sided, not corrected for several sets).

    Raises:
        ValueError: columns are missing, or words or labels differ between the two.
    """
    for frame in (first, second):
        missing = {"set", "word", "label", "correct"} - set(frame.columns)
        if missing:
            raise ValueError(f"expected the CSV of `eval --words`, it lacks the column {', '.join(sorted(missing))}")
    a, b = (frame.set_index(["set", "word"]).sort_index() for frame in (first, second))
    if not a.index.equals(b.index) or not a.label.equals(b.label):
        other = a.index.symmetric_difference(b.index)
        shown = (
            f"{len(other)} words are only in one file, such as {' '.join(other[0])}" if len(other) else "other labels"
        )
        raise ValueError(f"the two models were not evaluated on the same words: {shown}")
    names = list(dict.fromkeys(first["set"]))
    groups = {name: [name] for name in names} | {"all words": each_word_once(names)}
    rows = []
    for name, parts in groups.items():
        hits = [frame.loc[parts].correct.to_numpy(dtype=bool) for frame in (a, b)]
        test = mcnemar(*hits)
        accuracies = [100 * each.mean() for each in hits]
        rows.append((name, len(hits[0]), *accuracies, test["only_a"], test["only_b"], test["p_value"]))
    return pd.DataFrame(rows, columns=["set", "n", "first", "second", "only_first", "only_second", "p_value"])


def recomputed_page() -> str:
    """Markdown: what follows from the published figures alone, and the figures that it compares from other papers."""
    frame = published()
    parts = [
        "## Recomputed from the published figures",
        "Nothing here was measured by us: these are consequences of the paper's own table 8, in the files of "
        "tables/published.",
        "Gain in total accuracy of a module with all other stages equal (every gain is positive):",
        matched_gains(frame, "total_8539").to_markdown(index=False, floatfmt=".2g"),
        "Upper convex hull in time (T1 to T5), and the non-dominated models:",
        frontier(frame, "time_ms", "total_8539").to_markdown(index=False),
        "The same in millions of parameters (P1 to P5):",
        frontier(frame, "params_M", "total_8539").to_markdown(index=False),
        "Mean of all 24 by share of the data (table 10):",
        published("table-10").drop(columns="combination").mean().round(2).to_frame("mean").T.to_markdown(index=False),
        "Table 1, upper block: accuracies reported by the original papers, on mixed data and subsets:",
        _as_printed("table-1-reported"),
        "Table 3, with the reported rows:",
        _as_printed("table-3"),
    ]
    return "\n\n".join(parts) + "\n"


def _as_printed(table: str) -> str:
    """A published table as Markdown; cells that the paper does not print are empty."""
    return pd.read_csv(PUBLISHED / f"{table}.csv", dtype=str).fillna("").to_markdown(index=False, disable_numparse=True)
