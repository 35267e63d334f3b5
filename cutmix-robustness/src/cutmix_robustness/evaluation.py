"""One model, every column: clean, occluded, attacked, corrupted, in between, out of distribution, and localization.

Everything is computed in float32 (confidences in float64) on a model in evaluation mode, except that suites
which need only the predicted class run in bfloat16 on CUDA. With several processes each takes its share of the batches,
and every image counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from cutmix_robustness.attacks import autoattack, fgsm_step, input_gradient, pgd
from cutmix_robustness.corruption_error import mean_corruption_error
from cutmix_robustness.corruptions import CORRUPTIONS
from cutmix_robustness.data.benchmark import Benchmark
from cutmix_robustness.data.sources import Batches, stratified
from cutmix_robustness.draws import generator_for
from cutmix_robustness.localization import box_accuracy, cam_box, class_activation_map
from cutmix_robustness.occlusion import in_between, occlude
from cutmix_robustness.settings import SUITES
from cutmix_robustness.uncertainty import (
    calibration,
    mahalanobis_scores,
    odin_scores,
    ood_metrics,
    ood_scores,
    temperature,
)

TENTHS = [tenth / 10 for tenth in range(11)]


@dataclass
class Evaluation:
    """What a suite measured: single numbers, and curves or matrices for the figures."""

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)


def collect(
    source: Batches, measure: Callable[[Tensor, Tensor, int], dict[str, Tensor]], fabric: Fabric
) -> dict[str, Tensor]:
    """Map batches and concatenate the results, in the order of the source, over all processes.

    Args:
        source: source of uint8 images.
        measure: images (B, 3, H, W) in [0, 1], labels (B,) and the batch's number to tensors of leading dimension B.
        fabric: processes.

    Returns:
        The same names, (N, ...) on the CPU.
    """
    parts = {}
    for number, images, labels in source.batches(fabric.global_rank, fabric.world_size):
        images, labels = images.to(fabric.device), labels.to(fabric.device)  # your own tensors may lie elsewhere
        images = (images.float() / 255).contiguous(memory_format=torch.channels_last)
        parts[number] = {name: value.detach().cpu() for name, value in measure(images, labels, number).items()}
    if fabric.world_size > 1:
        everyone: list[dict] = [{} for _ in range(fabric.world_size)]
        dist.all_gather_object(everyone, parts)
        parts = {number: part for share in everyone for number, part in share.items()}
    ordered = [parts[number] for number in sorted(parts)]
    return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}


def logits_of(model: nn.Module, source: Batches, fabric: Fabric) -> tuple[Tensor, Tensor]:
    """(N, K) logits and (N,) labels of a source, on the CPU."""
    with torch.no_grad():
        found = collect(source, lambda images, labels, _: {"logits": model(images), "labels": labels}, fabric)
    return found["logits"], found["labels"]


def top1_error(model: nn.Module, source: Batches, fabric: Fabric) -> float:
    """Error in %; leaves the model in training mode."""
    logits, labels = logits_of(model.eval(), source, fabric)
    model.train()
    return _error(logits.argmax(1) == labels)


def _error(right: Tensor) -> float:
    return 100 - 100 * right.double().mean().item()


class Evaluator:
    """The suites, on one model and one benchmark.

    Args:
        model: any module, images in [0, 1] to logits.
        benchmark: test set, corruptions, unknown inputs, boxes.
        fabric: device and processes.
        severities: severities of the corruptions.
        probe_images: number of test images, drawn by the seed with class shares kept, for occlusion, PGD,
            corruptions and pairs; 0, or more than there are: all.
        seed: seed of probes, pairs, random starts and generated corruptions.
        fast: bfloat16 if only the predicted class counts (occlusion, corruptions, pairs); None: on CUDA.

    Raises:
        ValueError: logits that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        benchmark: Benchmark,
        fabric: Fabric,
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        probe_images: int = 0,
        seed: int = 0,
        fast: bool | None = None,
    ):
        self.fast = fabric.device.type == "cuda" if fast is None else fast
        self.model, self.benchmark, self.fabric = model.eval(), benchmark, fabric
        self.severities, self.seed = severities, seed
        test = benchmark.test
        drawn = 0 < probe_images < len(test)
        self.probes = test.select(stratified(test.labels, probe_images, seed)) if drawn else test
        self.logits, self.labels = logits_of(model, test, fabric)
        if not self.logits.isfinite().all():
            raise ValueError("the model's logits hold NaN or infinity")

    def run(self, suites: Sequence[str]) -> Evaluation:
        """Metrics and details of the suites, in the given order. ValueError for an unknown one."""
        unknown = [name for name in suites if name not in SUITES]
        if isinstance(suites, str) or unknown:
            raise ValueError(f"suites must be a list of {', '.join(SUITES)}, got {suites!r}")
        total = Evaluation()
        for name in suites:
            part = getattr(self, name)()
            total.metrics |= part.metrics
            total.details |= part.details
        return total

    def clean(self) -> Evaluation:
        """Top-1 and, from six classes on, top-5 error."""
        error = _error(self.logits.argmax(1) == self.labels)
        metrics = {"top1_error": error, "top1_accuracy": 100 - error}
        if self.logits.shape[1] > 5:
            metrics["top5_error"] = _error((self.logits.topk(5).indices == self.labels[:, None]).any(1))
        return Evaluation(metrics)

    def calibration(self) -> Evaluation:
        """Calibration errors, NLL, Brier score and mean confidence."""
        return Evaluation(calibration(self.logits, self.labels))

    def temperature(self) -> Evaluation:
        """Temperature fitted on half of the test set, and the calibration error on the other half before and after."""
        order = torch.randperm(len(self.labels), generator=generator_for(self.seed, "temperature"))
        fit, judged = order.split(math.ceil(len(order) / 2))
        t = temperature(self.logits[fit], self.labels[fit])
        before, after = (calibration(self.logits[judged] / each, self.labels[judged])["ece"] for each in (1.0, t))
        return Evaluation({"temperature": t, "ece_before_scaling": before, "ece_after_scaling": after})

    def occlusion(self) -> Evaluation:
        """Error with a centred hole and with its complement, at eleven sizes (figure 5a)."""
        side = self._side()
        sizes = [round(tenth * side) for tenth in TENTHS]
        mean = torch.tensor(self.benchmark.mean)
        metrics: dict[str, float] = {}
        details: dict[str, object] = {}
        for where in ("center", "boundary"):

            def measure(images: Tensor, labels: Tensor, _: int, where: str = where) -> dict[str, Tensor]:
                right = [self.model(occlude(images, size, where, mean)).argmax(1) == labels for size in sizes]
                return {"right": torch.stack(right, 1)}

            errors = self._curve(self.probes, measure)
            metrics[f"{where}_occlusion_error"] = errors[5]
            metrics[f"{where}_occlusion_area"] = float(np.trapezoid(errors, dx=0.1))
            details[f"{where}_occlusion"] = errors
        return Evaluation(metrics, details)

    def _side(self) -> int:
        _, images, _ = next(iter(self.benchmark.test.batches()))
        return min(images.shape[2:])

    def _curve(self, source: Batches, measure: Callable) -> list[float]:
        with torch.no_grad(), self._autocast():
            right = collect(source, measure, self.fabric)["right"]
        return [round(100 - 100 * value, 3) for value in right.double().mean(0).tolist()]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.fabric.device.type, torch.bfloat16, enabled=self.fast)

    def fgsm(self) -> Evaluation:
        """Accuracy under FGSM, 8/255, and the share of images whose gradient is zero (a sign of masking)."""

        def measure(images: Tensor, labels: Tensor, _: int) -> dict[str, Tensor]:
            gradient = input_gradient(self.model, images, labels)
            with torch.no_grad():
                right = self.model(fgsm_step(images, gradient)).argmax(1) == labels
            return {"right": right, "flat": gradient.flatten(1).abs().amax(1) == 0}

        found = collect(self.benchmark.test, measure, self.fabric)
        error = _error(found["right"])
        zero = 100 * found["flat"].double().mean().item()
        return Evaluation({"fgsm_accuracy": 100 - error, "fgsm_error": error, "zero_gradients": zero})

    def pgd(self) -> Evaluation:
        """Accuracy under ten steps of PGD, 8/255, from a random start."""

        def measure(images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
            attacked = pgd(self.model, images, labels, generator=generator_for(self.seed, number, 4))
            with torch.no_grad():
                return {"right": self.model(attacked).argmax(1) == labels}

        return Evaluation({"pgd_accuracy": 100 - _error(collect(self.probes, measure, self.fabric)["right"])})

    def autoattack(self) -> Evaluation:
        """Accuracy under AutoAttack, 8/255."""

        def measure(images: Tensor, labels: Tensor, _: int) -> dict[str, Tensor]:
            attacked = autoattack(self.model, images, labels, self.benchmark.num_classes, self.seed)
            with torch.no_grad():
                return {"right": self.model(attacked).argmax(1) == labels}

        return Evaluation({"autoattack_accuracy": 100 - _error(collect(self.probes, measure, self.fabric)["right"])})

    def corruption(self) -> Evaluation:
        """Errors under the 15 corruptions, their mean, rise over clean and group means; on ImageNet (relative) mCE."""
        errors = np.array([[self._corrupted_error(name, each) for each in self.severities] for name in CORRUPTIONS])
        spread = np.repeat(errors.mean(1, keepdims=True), 5, 1)  # (15, 5): the mean over the severities measured
        summary = mean_corruption_error(spread)
        metrics = {"corruption_error": summary.pop("mean")}
        metrics |= {f"{group}_error": value for group, value in summary.items()}
        right = self.logits.argmax(1) == self.labels
        clean = _error(right if self.probes.index is None else right[self.probes.index])
        metrics["corruption_rise"] = metrics["corruption_error"] - clean
        if self.benchmark.corruption_scale == "imagenet":
            relative = mean_corruption_error(spread / 100, "alexnet")
            metrics["mce"] = 100 * relative.pop("mean")
            metrics |= {f"{group}_ce": 100 * value for group, value in relative.items()}
            over_clean = mean_corruption_error(spread / 100, "alexnet", clean_error=clean / 100)
            metrics["relative_mce"] = 100 * over_clean["mean"]
        return Evaluation(metrics, {"corruption_errors": errors.round(3).tolist()})

    def _corrupted_error(self, name: str, severity: int) -> float:
        source = self.benchmark.corrupted(self.probes, name, severity, self.seed)
        with self._autocast():
            logits, labels = logits_of(self.model, source, self.fabric)
        return _error(logits.argmax(1) == labels)

    def ood(self) -> Evaluation:
        """Out-of-distribution detection by the maximum softmax probability: per set, and the mean (Tables 12, A2).

        Also the mean AUROC of two later scores, the energy and the largest logit.
        """
        known = ood_scores(self.logits)
        found: dict[str, dict[str, float]] = {}
        others: dict[str, list[float]] = {score: [] for score in known if score != "msp"}
        for name, source in self._unknown().items():
            unknown = ood_scores(logits_of(self.model, source, self.fabric)[0])
            found[name] = ood_metrics(known["msp"], unknown["msp"])
            for score, aurocs in others.items():
                aurocs.append(ood_metrics(known[score], unknown[score])["auroc"])
        metrics: dict[str, float] = {}
        for key in ("auroc", "tnr95", "detection_accuracy"):
            for name, values in found.items():
                metrics[f"{name}_{key}"] = 100 * values[key]
            metrics[f"ood_{key}"] = 100 * float(np.mean([values[key] for values in found.values()]))
        metrics["ood_detection_error"] = 100 - metrics["ood_detection_accuracy"]
        metrics |= {f"ood_auroc_{score}": 100 * float(np.mean(aurocs)) for score, aurocs in others.items()}
        return Evaluation(metrics)

    def odin(self) -> Evaluation:
        """Mean AUROC of ODIN's score over the out-of-distribution sets."""

        def measure(images: Tensor, _labels: Tensor, _number: int) -> dict[str, Tensor]:
            return {"score": odin_scores(self.model, images)}

        return self._mean_auroc("odin", lambda source: collect(source, measure, self.fabric)["score"].numpy())

    def mahalanobis(self) -> Evaluation:
        """Mean AUROC of the Mahalanobis distance between inputs of the last linear layer."""
        if self.benchmark.train is self.benchmark.test:
            raise ValueError("the suite mahalanobis needs training images; this benchmark has test images only")
        train, labels = self._features(self.benchmark.train)
        return self._mean_auroc(
            "mahalanobis", lambda source: mahalanobis_scores(train, labels, self._features(source)[0])
        )

    def _features(self, source: Batches) -> tuple[np.ndarray, np.ndarray]:
        """The inputs of the last linear layer, (N, D), and the labels (N,)."""
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("the suite mahalanobis needs a model with a torch.nn.Linear layer")
        entered: list[Tensor] = []
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].flatten(1)))

        def measure(images: Tensor, labels: Tensor, _: int) -> dict[str, Tensor]:
            self.model(images)
            return {"features": entered.pop(), "labels": labels}

        with hook, torch.no_grad():
            found = collect(source, measure, self.fabric)
        return found["features"].double().numpy(), found["labels"].numpy()

    def _unknown(self) -> Mapping[str, Batches]:
        sets = self.benchmark.unknown()
        if not sets:
            raise ValueError(
                f"{self.benchmark.test.name} has no out-of-distribution inputs; leave out ood, odin, mahalanobis"
            )
        return sets

    def _mean_auroc(self, score: str, scores: Callable[[Batches], np.ndarray]) -> Evaluation:
        known = scores(self.benchmark.test)
        aurocs = [ood_metrics(known, scores(source))["auroc"] for source in self._unknown().values()]
        return Evaluation({f"ood_auroc_{score}": 100 * float(np.mean(aurocs))})

    def in_between(self) -> Evaluation:
        """Images between random pairs: how often neither class is predicted, and their top-1 error (figure 5b)."""
        pairs = self.probes.select(torch.randperm(len(self.probes), generator=generator_for(self.seed, 5)))
        metrics: dict[str, float] = {}
        details: dict[str, object] = {}
        for kind in ("mixup", "cutmix"):

            def measure(images: Tensor, labels: Tensor, _: int, kind: str = kind) -> dict[str, Tensor]:
                other, other_labels = images.roll(1, 0), labels.roll(1)
                right = []
                for ratio in TENTHS:
                    predicted = self.model(in_between(images, other, ratio, kind)).argmax(1)
                    right.append((predicted == labels) | (predicted == other_labels))
                return {"right": torch.stack(right, 1), "distinct": labels != other_labels}

            with torch.no_grad(), self._autocast():
                found = collect(pairs, measure, self.fabric)
            right, distinct = found["right"].double(), found["distinct"]
            neither = (100 - 100 * right.mean(0)).tolist()
            metrics[f"neither_{kind}"] = neither[5]
            metrics[f"neither_{kind}_distinct"] = _error(right[distinct, 5]) if distinct.any() else 0.0
            details[f"in_between_{kind}"] = [round(value, 3) for value in neither]
        return Evaluation(metrics, details)

    def localization(self) -> Evaluation:
        """Boxes around the class activation map of the predicted class (Table 9)."""

        def measure(images: Tensor, labels: Tensor, _: int) -> dict[str, Tensor]:
            model: Any = self.model  # like all networks here, it has features and fc
            network = model.network
            features = network.features((images - model.mean) / model.std)
            predicted = network.fc(features.mean((2, 3))).argmax(1)
            cam = class_activation_map(features, network.fc.weight, predicted)
            cam = F.interpolate(cam[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
            boxes = [cam_box(each) for each in cam.cpu().numpy()]
            return {"box": torch.tensor(boxes), "right": predicted == labels}

        if self.benchmark.boxes is None:
            raise ValueError(f"{self.benchmark.test.name} has no boxes, which the suite localization needs")
        with torch.no_grad():
            found = collect(self.benchmark.test, measure, self.fabric)
        return Evaluation(box_accuracy(found["box"].numpy(), found["right"].numpy(), self.benchmark.boxes))


def evaluate(
    models: Mapping[str, nn.Module],
    suites: Sequence[str],
    benchmark: Benchmark,
    fabric: Fabric | None = None,
    **options: Any,
) -> pd.DataFrame:
    """One row per model with every column of the suites.

    Args:
        models: name to any module (images in [0, 1] to logits), on the fabric's device; they are put into evaluation
            mode.
        suites: some of `SUITES`; localization needs a `Classifier`.
        benchmark: from `benchmark_of` (tensors), `folder_benchmark` or `open_benchmark`.
        fabric: device and processes; None: one process on the CPU.
        options: further arguments of `Evaluator`.
    """
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    rows = {name: Evaluator(model, benchmark, fabric, **options).run(suites).metrics for name, model in models.items()}
    return pd.DataFrame.from_dict(rows, orient="index")
