"""The paper's metrics: biased and unbiased accuracy, groups of label and bias, cells of class and texture cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rebias.independence import hsic, median_sigma

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from rebias.data.dataset import Dataset


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, fabric: Fabric, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Run a network over a whole set in eval mode; under DDP the ranks share it and all get everything.

    Args:
        model: `forward(x) -> (logits, features)`; its mode is restored.
        data: a set of this package.
        fabric: its ranks share the work.
        batch_size: images per step and rank.

    Returns:
        logits (n, C) and features (n, d), float32 on the CPU, in the set's order, each sample once.
    """
    mode = model.training
    model.eval()
    mine = torch.arange(fabric.global_rank, len(data), fabric.world_size)
    logits, features = [], []
    for images, _ in data.batches(mine.split(batch_size)):
        with fabric.autocast():
            batch_logits, batch_features = model(images)
        logits.append(batch_logits.float())
        features.append(batch_features.flatten(1).float())
    model.train(mode)
    return _in_order(torch.cat(logits), len(data), fabric), _in_order(torch.cat(features), len(data), fabric)


def _in_order(local: Tensor, total: int, fabric: Fabric) -> Tensor:
    """Rank r holds rows r, r + world, ...; padded to one length, gathered, interleaved, padding cut."""
    if fabric.world_size == 1:
        return local.cpu()
    padded = local.new_zeros(-(-total // fabric.world_size), local.shape[1])
    padded[: len(local)] = local
    gathered = cast(Tensor, fabric.all_gather(padded))  # (world, padded length, d)
    return gathered.transpose(0, 1).flatten(0, 1)[:total].cpu()


def group_accuracy(
    predictions: Tensor, labels: Tensor, bias: Tensor, n_labels: int, n_bias: int
) -> tuple[Tensor, Tensor]:
    """Accuracy in every group of label and bias (figure 3 of the paper).

    Args:
        predictions: (n,) integer classes.
        labels: (n,) integer classes.
        bias: (n,) integer bias labels.
        n_labels: number of classes.
        n_bias: number of bias labels.

    Returns:
        accuracy (n_labels, n_bias) float64 in [0, 1], NaN for empty groups, and counts (n_labels, n_bias) int64.

    Raises:
        ValueError: different lengths, labels that are no integers, or values outside the given numbers.
    """
    if not predictions.shape == labels.shape == bias.shape or labels.ndim != 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in (predictions, labels, bias))
        raise ValueError(f"predictions, labels and bias must all be (n,), got {shapes}")
    for name, values, size in (("labels", labels, n_labels), ("bias", bias, n_bias)):
        if values.is_floating_point():
            raise ValueError(f"{name} must be integers, got {values.dtype}")
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise ValueError(f"{name} must lie in 0 .. {size - 1}, got {int(values.min())} .. {int(values.max())}")
    group = labels.long() * n_bias + bias.long()
    counts = torch.bincount(group, minlength=n_labels * n_bias)
    correct = torch.bincount(group, weights=(predictions == labels).double(), minlength=n_labels * n_bias)
    return (correct / counts).reshape(n_labels, n_bias), counts.reshape(n_labels, n_bias)


def unbiased_accuracy_clusters(
    predictions: Tensor, labels: Tensor, clusters: Tensor, min_count: int = 10, n_labels: int = 9, n_clusters: int = 9
) -> float:
    """Unbiased accuracy on ImageNet (section 4.3): mean over cells of class and texture cluster, then over clusterings.

    Args:
        predictions: (n,) classes.
        labels: (n,) classes.
        clusters: (R, n) cluster of every image in each of R clusterings.
        min_count: cells with fewer images are left out.
        n_labels: number of classes.
        n_clusters: clusters per clustering.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: shapes, or a clustering without a cell that is large enough.
    """
    if clusters.ndim != 2 or clusters.shape[1] != len(labels):
        raise ValueError(f"clusters must be (R, {len(labels)}), got {tuple(clusters.shape)}")
    means = []
    for number, each in enumerate(clusters):
        accuracy, counts = group_accuracy(predictions, labels, each, n_labels, n_clusters)
        cells = accuracy[counts >= min_count]
        if not len(cells):
            raise ValueError(f"clustering {number} has no cell of {min_count} images or more")
        means.append(cells.mean())
    return torch.stack(means).mean().item()


def read_predictions(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, labels and bias, each (n,) int64, from a CSV file with columns of these names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, or values that are not 0, 1, 2 ..
    """
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    table, names = pd.read_csv(path), ("prediction", "label", "bias")
    if not set(names) <= set(table.columns):
        raise ValueError(f"{path}: needs the columns {', '.join(names)}, has {', '.join(map(str, table.columns))}")
    for name in names:
        if not len(table) or not pd.api.types.is_integer_dtype(table[name]) or table[name].min() < 0:
            raise ValueError(f"{path}: {name} must hold 0, 1, 2 .., one value a line")
    prediction, label, bias = (torch.from_numpy(table[name].to_numpy(copy=True)).long() for name in names)
    return prediction, label, bias


def group_report(predictions: Tensor, labels: Tensor, bias: Tensor) -> tuple[dict[str, float], dict]:
    """Percentages over all samples, as the mean over groups, and in the worst one; accuracy and size of each group.

    The mean over groups is usually called unbiased accuracy; empty groups do not count.

    Raises:
        ValueError: no sample, or as `group_accuracy`.
    """
    if not len(labels):
        raise ValueError("there is no sample to report on")
    n_labels, n_bias = int(labels.max()) + 1, int(bias.max()) + 1
    accuracy, counts = group_accuracy(predictions, labels, bias, n_labels, n_bias)
    filled = accuracy[counts > 0]
    metrics = {
        "accuracy": 100 * (predictions == labels).double().mean().item(),
        "group_mean_accuracy": 100 * filled.mean().item(),
        "worst_group_accuracy": 100 * filled.min().item(),
    }
    matrix = [[round(cell, 4) if count else None for cell, count in zip(*row, strict=True)]
              for row in zip(accuracy.tolist(), counts.tolist(), strict=True)]  # fmt: skip
    return metrics, {"group_matrix": matrix, "group_counts": counts.tolist()}


def group_summary(predictions: Tensor, labels: Tensor, bias: Tensor, n: int) -> dict[str, float]:
    """Percentages over the groups of n labels and n biases: their mean, the worst, aligned and conflicting ones."""
    accuracy, counts = group_accuracy(predictions, labels, bias, n, n)
    filled = counts > 0
    own = torch.eye(n, dtype=torch.bool)
    return {
        "group_mean_accuracy": 100 * accuracy[filled].mean().item(),
        "worst_group_accuracy": 100 * accuracy[filled].min().item(),
        "aligned_accuracy": 100 * accuracy[filled & own].mean().item(),
        "conflicting_accuracy": 100 * accuracy[filled & ~own].mean().item(),
    }


def top1_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percentage of rows whose largest logit (the first, on ties) is the label's. ValueError for an empty set."""
    if not len(labels):
        raise ValueError("accuracy of an empty set")
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def dependence(f_features: Tensor, g_features: Tensor, n_samples: int = 1000) -> float:
    """Unbiased HSIC of (n, d) features with median bandwidths, on a fixed subset: features' norms do not count."""
    chosen = torch.randperm(len(f_features), generator=torch.Generator().manual_seed(0))[:n_samples]
    f, g = f_features[chosen].double(), g_features[chosen].double()
    return hsic(f, g, median_sigma(f, include_diagonal=False), median_sigma(g, include_diagonal=False)).item()
