"""One class per data set: its training set, its two networks, and the paper's evaluation on it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from rebias.data.biased import NUM_CLASSES, BiasedDigits, biased_mnist, biased_sklearn_digits
from rebias.data.dataset import BiasedDataset, Dataset, Reading
from rebias.data.toy import ToyPoints
from rebias.evaluate import (
    dependence,
    group_accuracy,
    group_report,
    group_summary,
    predict,
    top1_accuracy,
    unbiased_accuracy_clusters,
)
from rebias.independence import median_sigma
from rebias.methods import Method
from rebias.models import MLP, BagNet18, Network, ResNet3D, ResNet18, SimpleConvNet
from rebias.settings import Settings

if TYPE_CHECKING:
    from rebias.data.action import VideoFiles
    from rebias.data.images import ImageFiles

Result = tuple[dict[str, float], dict]
TWINS = ("lff", "jtt")  # their second network is another f


class Task(ABC):
    """Base class of tasks: `train`, `tests` (for the run record), `f()`, `g()` and `evaluate(method)`.

    Args:
        settings: settings of the run.
        seed: seed of colours, weights and order.
        data_root: folder that holds the data sets.
        fabric: device and ranks.
        reading: how files are read.
    """

    train: Dataset
    tests: tuple[Dataset, ...]
    memory_format = torch.channels_last

    paper_sizes: dict[int, int] = {}
    """sizes of the paper's sets if known, by position: 0 for training, 1 .. for `tests`"""

    def __init__(
        self,
        settings: Settings,
        seed: int,
        data_root: Path,
        fabric: Fabric,
        reading: Reading = Reading(),  # noqa: B008  frozen
    ):
        self.settings, self.seed, self.data_root = settings, seed, data_root
        self.fabric, self.reading = fabric, reading
        self.load()

    @property
    def caveats(self) -> list[str]:
        """Why figures of this task cannot be compared with the paper's: skipped files, smaller sets."""
        sets = (self.train, *self.tests)
        skipped = sum(len(getattr(data, "skipped", ())) for data in sets)
        found = [f"{skipped} files skipped"] if skipped else []
        for position, full in self.paper_sizes.items():
            if position == 0 and self.settings.train_images:
                continue  # the settings ask for it
            size = len(sets[position]) // getattr(sets[position], "views", 1)
            if size != full:
                found.append(f"{size:,} of the paper's {full:,} in {sets[position].name}")
        return found

    @abstractmethod
    def load(self) -> None:
        """Open the data sets."""

    @abstractmethod
    def f(self) -> Network:
        """A new target network."""

    @abstractmethod
    def g(self) -> Network:
        """A new biased network."""

    @abstractmethod
    def evaluate(self, method: Method) -> Result:
        """Metrics of a trained method, and details for the run record."""

    def networks(self) -> tuple[Network, list[Network]]:
        """New f and gs; f's weights depend on the seed alone, whatever else the method trains."""
        method, make_g = self.settings.method, self.f if self.settings.method in TWINS else self.g
        torch.manual_seed(self.seed)
        f = self.g() if method == "biased" else self.f()
        gs = []
        for number in range(self.settings.n_g_nets):
            torch.manual_seed((self.seed << 8) + number + 1)
            gs.append(make_g())
        return f, gs

    @abstractmethod
    def accuracies(self, method: Method) -> dict[str, float]:
        """Biased and unbiased accuracy in percent, computed cheaply."""

    def point(self, method: Method) -> dict[str, float]:
        """What the training curve holds for an epoch besides the losses."""
        return {}


class SmallTask(Task):
    """Sets in memory with a bias label per sample: toy, digits, MNIST."""

    n_biases: int
    train: BiasedDataset
    unbiased: BiasedDataset
    biased: BiasedDataset | None = None
    groups: BiasedDataset

    def accuracies(self, method: Method) -> dict[str, float]:
        return self._accuracies(method)[0]

    def point(self, method: Method) -> dict[str, float]:
        """Accuracies, HSIC, bandwidth and feature norm on the unbiased test set, cross-entropy by training group."""
        metrics, (_, features) = self._accuracies(method)
        point = {name: metrics[name] for name in ("unbiased_accuracy", "biased_accuracy")}
        if "g0" in method.modules and self.settings.method not in TWINS:
            point["hsic"] = dependence(features, self._features(method, "g0"))
        point["sigma_f"] = median_sigma(features[:1000], include_diagonal=False).item()
        point["feature_norm"] = features.norm(dim=1).mean().item()
        return point | self._training_cross_entropy(method)

    def evaluate(self, method: Method) -> Result:
        """Percentages over the test sets, HSIC between f and g if there is a g, and the group matrix."""
        metrics, (_, features) = self._accuracies(method)
        if "g0" in method.modules and self.settings.method not in TWINS:
            metrics["hsic"] = dependence(features, self._features(method, "g0"))
        logits, _ = predict(method.modules["f"], self.groups, self.fabric)
        predictions, labels, bias = logits.argmax(1), self.groups.labels.cpu(), self.groups.bias.cpu()
        metrics |= group_summary(predictions, labels, bias, self.n_biases)
        matrix, _ = group_accuracy(predictions, labels, bias, self.n_biases, self.n_biases)
        return metrics, {"group_matrix": [[round(cell, 4) for cell in row] for row in matrix.tolist()]}

    def _accuracies(self, method: Method) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
        logits, features = predict(method.modules["f"], self.unbiased, self.fabric)
        labels, bias = self.unbiased.labels.cpu(), self.unbiased.bias.cpu()
        metrics = {"unbiased_accuracy": top1_accuracy(logits, labels)}
        if self.biased is None:
            own = labels == bias
            metrics["biased_accuracy"] = top1_accuracy(logits[own], labels[own])
        else:
            biased_logits, _ = predict(method.modules["f"], self.biased, self.fabric)
            metrics["biased_accuracy"] = top1_accuracy(biased_logits, self.biased.labels.cpu())
        return metrics, (logits, logits if self.settings.feature == "logits" else features)

    def _features(self, method: Method, name: str) -> Tensor:
        logits, features = predict(method.modules[name], self.unbiased, self.fabric)
        return logits if self.settings.feature == "logits" else features

    def _training_cross_entropy(self, method: Method) -> dict[str, float]:
        logits, _ = predict(method.modules["f"], self.train, self.fabric)
        losses = F.cross_entropy(logits, self.train.labels.cpu(), reduction="none")
        aligned = (self.train.labels == self.train.bias).cpu()
        means = {"aligned_cross_entropy": losses[aligned].mean(), "conflicting_cross_entropy": losses[~aligned].mean()}
        return {name: mean.item() for name, mean in means.items() if not math.isnan(mean)}


class Toy(SmallTask):
    """Section 3.2: perceptrons on (B, S) and on B alone."""

    n_biases = 3

    def load(self) -> None:
        self.train = ToyPoints(900, True, self.seed).to(self.fabric.device)
        self.unbiased = self.groups = ToyPoints(9000, False, (1 << 20) + self.seed).to(self.fabric.device)
        self.tests = (self.unbiased,)

    def f(self) -> Network:
        return MLP()

    def g(self) -> Network:
        return MLP(columns=(0,))

    def evaluate(self, method: Method) -> Result:
        """As for the digits, with f's decisions on a grid over the nine squares (figure A1)."""
        metrics, details = super().evaluate(method)
        side = torch.linspace(-1.5, 1.5, 61)
        grid = torch.cartesian_prod(side, side).to(self.fabric.device)
        with torch.no_grad():
            decisions = method.modules["f"].eval()(grid)[0].argmax(1).view(61, 61)
        return metrics, details | {"decisions": ["".join(map(str, row)) for row in decisions.tolist()]}


class Digits(SmallTask):
    """scikit-learn's digits; every test digit in all ten colours; its class's colour is the biased test."""

    n_biases = NUM_CLASSES

    def load(self) -> None:
        s = self.settings
        self.train = biased_sklearn_digits(True, s.rho, s.n_confusing, self.seed).to(self.fabric.device)
        self.unbiased = biased_sklearn_digits(False, 1.0).in_all_colours().to(self.fabric.device)
        self.groups, self.tests = self.unbiased, (self.unbiased,)

    def f(self) -> Network:
        s = self.settings
        return SimpleConvNet(NUM_CLASSES, s.f_kernel, s.f_widths, s.f_strides)

    def g(self) -> Network:
        return SimpleConvNet(NUM_CLASSES, 1, self.settings.g_widths)


class Mnist(Digits):
    """Biased MNIST: the paper's test sets (rho 1, 0.1 and 0), drawn once with a fixed seed, and all ten colours."""

    paper_sizes = {0: 60_000, 1: 10_000}

    def load(self) -> None:
        s, device = self.settings, self.fabric.device

        def test(rho: float) -> BiasedDigits:
            return biased_mnist(self.data_root, False, rho, seed=0, side=s.side).to(device)

        self.train = biased_mnist(
            self.data_root, True, s.rho, s.n_confusing, self.seed, side=s.side, n_images=s.train_images or None
        ).to(device)
        self.biased, self.unbiased, self.rho0 = test(1.0), test(0.1), test(0.0)
        self.groups = self.biased.in_all_colours()
        self.tests = (self.biased, self.unbiased, self.rho0)

    def evaluate(self, method: Method) -> Result:
        metrics, details = super().evaluate(method)
        logits, _ = predict(method.modules["f"], self.rho0, self.fabric)
        return metrics | {"rho0_accuracy": top1_accuracy(logits, self.rho0.labels.cpu())}, details


class ImageNet9(Task):
    """9-class ImageNet: validation accuracy, mean over cells of class and texture, ImageNet-A and, if there, -C."""

    paper_sizes = {1: 2100}

    def load(self) -> None:
        from rebias.data import imagenet9

        where = {"device": self.fabric.device, "reading": self.reading}
        self.train = imagenet9.train_set(self.data_root, self.settings.stylised, seed=self.seed, **where)
        self.validation, self.clusters = imagenet9.validation_set(self.data_root, **where)
        self.hard = imagenet9.image_folder(self.data_root / "imagenet-a", "ImageNet-A, nine classes", **where)
        self.corrupted = imagenet9.corrupted_sets(self.data_root, **where)
        self.tests = (self.validation, self.hard, *self.corrupted.values())

    def f(self) -> Network:
        small = self.settings.networks == "small"
        return SimpleConvNet(9, 3, (4, 8), (4, 4)) if small else ResNet18(9)

    def g(self) -> Network:
        small = self.settings.networks == "small"
        return SimpleConvNet(9, 3, (4,), (4,)) if small else BagNet18(9)

    def accuracies(self, method: Method) -> dict[str, float]:
        return self._validated(method)[0]

    def _validated(self, method: Method) -> tuple[dict[str, float], Tensor]:
        logits, _ = predict(method.modules["f"], self.validation, self.fabric, batch_size=128)
        predictions, labels = logits.argmax(1), self.validation.labels
        metrics = {"biased_accuracy": top1_accuracy(logits, labels)}
        metrics["unbiased_accuracy"] = 100 * unbiased_accuracy_clusters(predictions, labels, self.clusters)
        return metrics, predictions

    def evaluate(self, method: Method) -> Result:
        f, labels = method.modules["f"], self.validation.labels
        metrics, predictions = self._validated(method)
        metrics["imagenet_a_accuracy"] = self._accuracy(f, self.hard)
        if self.corrupted:
            each = {name: self._accuracy(f, data) for name, data in self.corrupted.items()}
            metrics["imagenet_c_accuracy"] = sum(each.values()) / len(each)
        cells, counts = group_accuracy(predictions, labels, self.clusters[0], 9, 9)
        matrix = [[None if math.isnan(cell) else round(cell, 4) for cell in row] for row in cells.tolist()]
        return metrics, {"cluster_matrix": matrix, "cluster_counts": counts.tolist()}

    def _accuracy(self, f: nn.Module, data: Dataset) -> float:
        return top1_accuracy(predict(f, data, self.fabric, batch_size=128)[0], data.labels)


class Grouped(Task):
    """Images with bias labels, the user's own or released ones, for ResNet-18 and BagNet-18: accuracy by group."""

    train: ImageFiles
    test: ImageFiles

    def load(self) -> None:
        from rebias.data import grouped

        layouts: dict[str, tuple[str, Callable[..., ImageFiles]]] = {
            "csv": ("images.csv", grouped.csv_set),
            "waterbirds": ("waterbird_complete95_forest2water2", grouped.waterbirds),
            "celeba": ("celeba", grouped.celeba),
            "bffhq": ("bffhq", grouped.bffhq),
        }
        folder, open_set = layouts[self.settings.dataset]
        where: dict[str, Any] = {"device": self.fabric.device, "reading": self.reading}
        place = self.data_root / folder
        self.train = open_set(place, "train", augment=True, seed=self.seed, **where)
        self.test = open_set(place, "test", **where)
        self.tests = (self.test,)
        self.classes = int(max(self.train.labels.max(), self.test.labels.max())) + 1

    def f(self) -> Network:
        small = self.settings.networks == "small"
        return SimpleConvNet(self.classes, 3, (4, 8), (4, 4)) if small else ResNet18(self.classes)

    def g(self) -> Network:
        small = self.settings.networks == "small"
        return SimpleConvNet(self.classes, 3, (4,), (4,)) if small else BagNet18(self.classes)

    def accuracies(self, method: Method) -> dict[str, float]:
        return self.evaluate(method)[0]

    def evaluate(self, method: Method) -> Result:
        logits, _ = predict(method.modules["f"], self.test, self.fabric, batch_size=128)
        return group_report(logits.argmax(1), self.test.labels, cast(Tensor, self.test.bias))


class Action(Task):
    """Kinetics-10 for training and the biased test, Mimetics-10 for the unbiased one."""

    memory_format = torch.channels_last_3d
    tests: tuple[VideoFiles, VideoFiles]
    paper_sizes = {2: 136}

    def load(self) -> None:
        from rebias.data import action

        where = {"device": self.fabric.device, "reading": self.reading}
        self.train = action.kinetics10(self.data_root, True, seed=self.seed, **where)
        self.tests = (action.kinetics10(self.data_root, False, **where), action.mimetics10(self.data_root, **where))

    def f(self) -> Network:
        return self._network("33333")

    def g(self) -> Network:
        return self._network("11111")

    def _network(self, temporal_kernels: str) -> Network:
        return ResNet3D(10, temporal_kernels, width=2 if self.settings.networks == "small" else 32)

    def evaluate(self, method: Method) -> Result:
        return self.accuracies(method), {}

    def accuracies(self, method: Method) -> dict[str, float]:
        metrics = {}
        for name, data in zip(("biased_accuracy", "unbiased_accuracy"), self.tests, strict=True):
            logits, _ = predict(method.modules["f"], data, self.fabric, batch_size=16)
            metrics[name] = top1_accuracy(*data.sum_views(logits))
        return metrics


TASKS: dict[str, type[Task]] = {
    "toy": Toy,
    "digits": Digits,
    "mnist": Mnist,
    "imagenet9": ImageNet9,
    "kinetics10": Action,
    **dict.fromkeys(("csv", "waterbirds", "celeba", "bffhq"), Grouped),
}
