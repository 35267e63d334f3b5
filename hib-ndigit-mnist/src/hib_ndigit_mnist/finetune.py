"""Train a hedged embedding on a user's own images, and measure it as the URL benchmark does (arXiv 2307.03810).

A step is a pure function of the weights, the seed and its number, so a killed run resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hib_ndigit_mnist.backbones import HedgedModel
from hib_ndigit_mnist.checkpoint import deferred_interrupt, load_file, save_file
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.metrics import accuracy_rejection_area, ood_auroc, r_auroc, recall_at_1
from hib_ndigit_mnist.photos import (
    Drawn,
    SeededBatches,
    check_dataset_labels,
    evaluation_transform,
    read_item,
    step_seed,
    training_transform,
)
from hib_ndigit_mnist.settings import BackboneTraining
from hib_ndigit_mnist.train import learning_rate, make_fabric
from shared_utils.logging import get_logger, progress

logger = get_logger("hib-ndigit-mnist")

EMBED_BATCH = 64


def train_on(
    data: Dataset,
    labels: Tensor | Sequence[int],
    settings: BackboneTraining,
    seed: int = 0,
    *,
    pretrained: bool = True,
    workers: int = 0,
    device: str = "auto",
    precision: str = "auto",
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
) -> HedgedModel:
    """Train backbone and head together on any data set; the same call gives the same model, interrupted or not.

    Args:
        data: map-style; data[i] is (image, label), with a Pillow image, a tensor (C, H, W) or an array (H, W, C), uint8
            or in [0, 1].
        labels: (n,) integers, the label of every image; each class needs two images.
        settings: backbone, head, loss and schedule.
        seed: seed of the head's weights and of all random numbers.
        pretrained: start from the library's weights for the backbone.
        workers: processes that read images.
        device: auto (CUDA if available), cpu or cuda.
        precision: auto (bf16-mixed on CUDA), 32-true, bf16-mixed or 16-mixed; head and loss stay float32.
        checkpoint: file to resume from and to save to; remove it when the model is safe.
        checkpoint_every: steps between saves.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        ValueError: a class with a single image, labels that differ from the data's, an image of another shape or range,
            several processes, a checkpoint of another run.
        RuntimeError: the backbone's weights cannot be downloaded, or the loss is no longer finite.
        BrokenFile: an image that cannot be read.
        KeyboardInterrupt: after the state was saved, if there is a checkpoint file.
    """
    labels = check_dataset_labels(labels, data)
    fabric = make_fabric(device, precision)
    if fabric.world_size > 1:
        raise ValueError(f"expected one process, got {fabric.world_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HedgedModel(settings, pretrained)
    fabric.to_device(model)
    groups = [
        {"params": [*model.backbone.parameters(), *model.head.parameters()]},
        {"params": list(model.loss.parameters())},
    ]
    optimizer: Any = fabric.setup_optimizers(torch.optim.Adam(groups))
    identity = {"settings": asdict(settings), "seed": seed, "labels": labels.tolist()}
    start = 0
    if checkpoint and checkpoint.exists():
        state = load_file(checkpoint)
        if state.get("identity") != identity:
            raise ValueError(f"{checkpoint}: checkpoint of another run; choose another --output, or move it away")
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save(step: int) -> None:
        if checkpoint:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_file(checkpoint, {"identity": identity, "step": step} | states)

    images = Drawn(data, labels, training_transform(settings.image_size, settings.augment))
    batches = SeededBatches(labels, settings.batch, seed, start, settings.steps)
    loader = fabric.setup_dataloaders(DataLoader(images, batch_sampler=batches, num_workers=workers))
    model.train()
    cuda = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), deferred_interrupt() as interrupted, progress() as bar:
        task = bar.add_task(f"train {settings.backbone}", total=settings.steps, completed=start)
        for step, (x, y) in enumerate(loader, start):
            for group, factor in zip(optimizer.param_groups, (1.0, settings.match_lr), strict=True):
                group["lr"] = learning_rate(settings, step) * factor
            torch.manual_seed(step_seed(seed, step))  # for dropout
            with fabric.autocast():
                embedding = model(x)
            out = model.loss(embedding, y)
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(out.loss)
            optimizer.step()
            bar.update(task, completed=step + 1)
            if (step + 1) % checkpoint_every == 0 or interrupted():
                _check_finite(out.loss, step + 1)
                save(step + 1)
            if interrupted():
                raise KeyboardInterrupt
    if start < settings.steps:
        _check_finite(out.loss, settings.steps)
        logger.info("loss %.4f after %d steps", float(out.loss.detach()), settings.steps)
    return model.cpu().eval()


def _check_finite(loss: Tensor, step: int) -> None:
    if not loss.isfinite():
        raise RuntimeError(f"the loss is {float(loss.detach())} after {step} steps; try a smaller lr")


class _Plain(Dataset):
    def __init__(self, data: Dataset, size: int):
        self.data, self.transform = data, evaluation_transform(size)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # map-style

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_item(self.data, index)[0])


@torch.no_grad()
def embed_images(
    model: HedgedModel, data: Dataset, workers: int = 0, device: str = "auto", precision: str = "auto"
) -> GaussianMixtureEmbedding:
    """Embed all images of a data set in eval mode: (n, C, D) float32 on the CPU; the model is moved to the CPU, too."""
    fabric = make_fabric(device, precision)
    fabric.to_device(model.eval())
    loader = DataLoader(_Plain(data, model.settings.image_size), EMBED_BATCH, num_workers=workers)
    cuda = [fabric.device] if fabric.device.type == "cuda" else []
    with fabric.autocast(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)  # for passes with dropout
        parts = [model(x).to("cpu") for x in _tracked(fabric.setup_dataloaders(loader))]
    model.cpu()
    mu = torch.cat([part.mu for part in parts])
    return GaussianMixtureEmbedding(mu, None if parts[0].is_point else torch.cat([p.logvar for p in parts]))


def _tracked(loader: Any) -> Iterator[Tensor]:
    with progress() as bar:
        yield from bar.track(loader, description="embed")


def score(
    model: HedgedModel,
    embedding: GaussianMixtureEmbedding,
    labels: Tensor,
    outside: GaussianMixtureEmbedding | None = None,
) -> dict[str, float]:
    """R@1 (cosine of means) and scores of the uncertainty: R-AUROC, area under accuracy-rejection, OOD AUROC.

    A point embedding has no uncertainty: it is scored only by R@1.
    """
    right = recall_at_1(embedding.mean(), labels)
    found = {"r1": float(right.double().mean()), "images": len(labels)}
    if embedding.is_point:
        return found
    uncertainty = model.uncertainty(embedding)
    found |= {"uncertainty": float(uncertainty.mean()), "r_auroc": r_auroc(uncertainty, right)}
    found["rejection_area"] = accuracy_rejection_area(uncertainty, right)
    if outside is not None:
        found["ood_auroc"] = ood_auroc(uncertainty, model.uncertainty(outside))
    return found
