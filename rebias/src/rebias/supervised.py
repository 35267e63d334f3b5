"""Methods that see the bias label of every training image: ReBias does without; an upper bound.

The balanced and the contrastive loss (Hong & Yang 2021) and DFR (Kirichenko et al. 2022), as their authors released
them.
"""

from __future__ import annotations

from typing import cast

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from rebias.data.dataset import BiasedDataset, Dataset
from rebias.evaluate import predict
from rebias.methods import Method, Parts, Vanilla
from rebias.models import Network
from rebias.objectives import balanced_cross_entropy, bias_contrastive
from rebias.settings import Settings

CLASSIFICATION_WEIGHT = 0.01  # added to the contrastive loss
LARGEST_RATIO = 10  # ratio of the largest to the smallest probability of being drawn


class Balanced(Method):
    """Cross-entropy with the prior p(label | bias) of the training set."""

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        (self.f,) = self.add("f", f)
        labels, self.bias = data.labels, cast(BiasedDataset, data).bias.to(fabric.device)
        counts = torch.zeros(int(self.bias.max()) + 1, f.fc.out_features, device=fabric.device)
        counts.index_put_((self.bias, labels.to(fabric.device)), torch.ones((), device=fabric.device), accumulate=True)
        self.prior = counts / counts.sum(1, keepdim=True).clamp_min(1)

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        bias = self.bias[index.to(self.bias.device, non_blocking=True)]
        loss = balanced_cross_entropy(self.f(images)[0], targets, self.prior[bias])
        self.descend("f", loss)
        return {"f_balanced_cross_entropy": loss.detach()}


class BiasContrastive(Method):
    """BiasCon: features of one class and different biases attract each other.

    Besides the batch, which is classified, a second one of half its size, in which rare biases are common, is drawn;
    two random views of it are contrasted.
    """

    views = v2.Compose([v2.RandomRotation(20), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)])

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric)
        if fabric.world_size > 1:
            raise ValueError(f"biascon draws its second batch on one process, got {fabric.world_size} processes")
        (self.f,) = self.add("f", f)
        self.data = cast(BiasedDataset, data)
        self.chances = rarity(self.data.labels, self.data.bias)

    def step(self, images: Tensor, targets: Tensor, index: Tensor) -> Parts:
        classification = F.cross_entropy(self.f(images)[0], targets)
        chosen = torch.multinomial(self.chances, len(images) // 2, replacement=True)
        (rare, labels), *_ = self.data.batches([chosen])
        views = torch.stack([self.views(image) for image in (rare.repeat(2, 1, 1, 1) + 1) / 2]) * 2 - 1
        features = self.f(views)[1]
        contrast = bias_contrastive(features, labels.repeat(2), self.data.bias[chosen].repeat(2))
        self.descend("f", CLASSIFICATION_WEIGHT * classification + contrast)
        return {"f_cross_entropy": classification.detach(), "f_contrast": contrast.detach()}


class DFR(Vanilla):
    """Deep feature reweighting: vanilla with its last layer refitted on groups of equal size."""

    def __init__(self, settings: Settings, fabric: Fabric, f: Network, gs: list[Network], data: Dataset):
        super().__init__(settings, fabric, f, gs, data)
        self.network, self.data = f, cast(BiasedDataset, data)

    def finish(self) -> None:
        _, features = predict(self.f, self.data, self.fabric)
        weight, offset = last_layer(features, self.data.labels.cpu(), self.data.bias.cpu())
        with torch.no_grad():
            self.network.fc.weight.copy_(weight)
            self.network.fc.bias.copy_(offset)


def rarity(labels: Tensor, bias: Tensor) -> Tensor:
    """(n,) relative odds of drawing each sample: 1 / p(bias | label), at most LARGEST_RATIO times the smallest."""
    counts = torch.zeros(int(labels.max()) + 1, int(bias.max()) + 1, device=labels.device)
    counts.index_put_((labels, bias), torch.ones((), device=labels.device), accumulate=True)
    chances = (counts.sum(1, keepdim=True) / counts)[labels, bias]
    return chances.clamp_max(LARGEST_RATIO * chances.min())


def last_layer(features: Tensor, labels: Tensor, bias: Tensor, c: float = 1.0, fits: int = 10) -> tuple[Tensor, Tensor]:
    """DFR's weight (C, d) and offset (C,): a mean of L1-penalised logistic regressions, each class against the rest.

    Each is fitted on a random subset in which every group has the size of the smallest. The released code
    chooses c by the worst group of a validation set; here it is the first of its options.

    Args:
        features: (n, d), of the training set.
        labels: (n,) int64.
        bias: (n,) int64; groups without a sample do not count.
        c: inverse weight of the penalty.
        fits: number of regressions.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1)
    group = labels * (int(bias.max()) + 1) + bias
    members = [(group == each).nonzero()[:, 0] for each in group.unique()]
    size, generator = min(map(len, members)), torch.Generator().manual_seed(0)
    weights, offsets = [], []
    for _ in range(fits):
        subset = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in members])
        classifier = OneVsRestClassifier(LogisticRegression(l1_ratio=1.0, C=c, solver="liblinear", random_state=0))
        classifier.fit(((features - mean) / scale)[subset].numpy(), labels[subset].numpy())
        weights.append(torch.cat([torch.from_numpy(each.coef_) for each in classifier.estimators_]))
        offsets.append(torch.cat([torch.from_numpy(each.intercept_) for each in classifier.estimators_]))
    weight = torch.stack(weights).mean(0).float() / scale
    return weight, torch.stack(offsets).mean(0).float() - weight @ mean
