"""Transfer to object detection (Table 10 and appendix C): torchvision's detectors on a backbone trained here."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD

from cutmix_robustness.data.sources import index_batches
from cutmix_robustness.data.voc import CLASSES, TEST, TRAIN, VocImages, mean_average_precision
from cutmix_robustness.draws import generator_for
from cutmix_robustness.networks import Classifier, resnet_imagenet
from cutmix_robustness.networks.resnet import ImageNetResNet
from cutmix_robustness.settings import Settings
from cutmix_robustness.train import load_checkpoint, load_network
from shared_utils.files import whole_file
from shared_utils.runlog import Outcome
from shared_utils.seeding import seed_everything


class SsdBackbone(nn.Module):
    """ResNet-50 up to layer3 with four more layers: maps of side 38, 19, 10, 5, 3 and 1 at 300 x 300.

    The first is layer2, in place of SSD300's conv4_3.

    Args:
        resnet: trained classifier.
    """

    def __init__(self, resnet: ImageNetResNet):
        super().__init__()
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1)
        self.layer2, self.layer3 = resnet.layer2, resnet.layer3
        self.out_channels = [512, 1024, 512, 256, 256, 256]
        self.extra = nn.ModuleList(
            _halve(a, b, stride) for a, b, stride in ((1024, 512, 2), (512, 256, 2), (256, 256, 1), (256, 256, 1))
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(N, 3, 300, 300) to six feature maps."""
        maps = [self.layer2(self.stem(images))]
        maps.append(self.layer3(maps[-1]))
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        return OrderedDict((str(number), each) for number, each in enumerate(maps))


def _halve(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    padding = 1 if stride == 2 else 0
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels // 2, 1), nn.ReLU(inplace=True),
        nn.Conv2d(out_channels // 2, out_channels, 3, stride, padding), nn.ReLU(inplace=True),
    )  # fmt: skip


def build_detector(kind: str, resnet: ImageNetResNet, min_size: int = 600, **options: Any) -> nn.Module:
    """A torchvision detector for VOC's 20 classes.

    Args:
        kind: "faster-rcnn" (feature pyramid on layers 1 to 4) or "ssd" (300 x 300).
        resnet: ResNet of this package for ImageNet.
        min_size: shorter side of Faster R-CNN's images, in pixels.
        options: further arguments of torchvision's FasterRCNN.
    """
    if kind == "ssd":
        anchors = DefaultBoxGenerator(
            [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
            steps=[8, 16, 32, 64, 100, 300],
        )  # fmt: skip
        return SSD(SsdBackbone(resnet), anchors, (300, 300), len(CLASSES) + 1)
    layers = {f"layer{number}": str(number - 1) for number in range(1, 5)}
    backbone = BackboneWithFPN(resnet, layers, [256, 512, 1024, 2048], 256)
    return FasterRCNN(backbone, len(CLASSES) + 1, min_size=min_size, max_size=1000, **options)


def train_and_measure(settings: Settings, seed: int, data_root: Path, fabric: Fabric, checkpoint: Path) -> Outcome:
    """Train a detector for `settings.steps` steps, resuming from the checkpoint if there is one, and measure its mAP.

    Raises:
        FileNotFoundError: VOC or the backbone's checkpoint is missing.
    """
    train, test = VocImages(data_root, TRAIN, settings.detector, seed), VocImages(data_root, TEST)
    seed_everything(seed)
    resnet = resnet_imagenet(settings.network)
    path = data_root / settings.initial_weights
    load_network(Classifier(resnet, (0.0,) * 3, (1.0,) * 3), load_checkpoint(path)["network"], str(path))
    detector = build_detector(settings.detector, resnet, settings.detector_side)
    fit_detector(detector, settings, train, seed, fabric, checkpoint)
    score = measure(detector, test, fabric)
    return Outcome({"voc07_map": score}, dataset={"train": train.record(), "test": test.record()})


def fit_detector(
    detector: nn.Module,
    settings: Settings,
    data: VocImages,
    seed: int,
    fabric: Fabric,
    checkpoint: Path,
    every: int = 1000,
) -> None:
    """SGD with momentum; batch norm keeps the backbone's statistics; the checkpoint is written at regular intervals."""
    detector.to(fabric.device)
    optimizer = torch.optim.SGD(detector.parameters(), settings.lr, 0.9, weight_decay=settings.weight_decay)
    run, step = {"seed": seed, "settings": repr(settings)}, 0
    if checkpoint.exists():
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if content["run"] != run:
            raise ValueError(f"{checkpoint}: checkpoint of another run; move it away")
        detector.load_state_dict(content["detector"])
        optimizer.load_state_dict(content["optimizer"])
        step = content["step"]
    wrapped, optimizer = fabric.setup(detector, optimizer)
    per_epoch = len(data) // settings.batch_size
    while step < settings.steps:
        epoch, start = divmod(step, per_epoch)
        data.epoch = epoch
        batches = index_batches(len(data), settings.batch_size, seed, epoch)[start:][: settings.steps - step]
        share = [batch[fabric.global_rank :: fabric.world_size].tolist() for batch in batches]
        for images, targets in DataLoader(data, batch_sampler=share, num_workers=_workers(), collate_fn=_lists):
            _training_mode(detector)
            # the detector samples anchors with torch's generator: seeded by the step, a resumed run draws the same
            torch.manual_seed(generator_for(seed, step).initial_seed())
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.1 ** sum(step >= milestone for milestone in settings.milestones)
            images = [image.to(fabric.device) for image in images]
            targets = [{name: target[name].to(fabric.device) for name in ("boxes", "labels")} for target in targets]
            loss = sum(wrapped(images, targets).values())
            if not torch.isfinite(loss):
                raise RuntimeError(f"step {step}: the loss is NaN or infinite")
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if fabric.global_rank == 0 and (step % every == 0 or step == settings.steps):
                content = {"run": run, "step": step, "detector": detector.state_dict()}
                with whole_file(checkpoint) as temporary:
                    torch.save(content | {"optimizer": optimizer.state_dict()}, temporary)


def _training_mode(detector: nn.Module) -> None:
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _lists(samples: list) -> tuple[list[Tensor], list[dict]]:
    return [image for image, _ in samples], [target for _, target in samples]


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def measure(detector: nn.Module, data: VocImages, fabric: Fabric) -> float:
    """Mean average precision in % on a VOC part; every process computes it on all of the part."""
    detector.eval()
    found, true = [], []
    for images, targets in DataLoader(data, batch_size=4, num_workers=_workers(), collate_fn=_lists):
        with torch.no_grad():
            for output in detector([image.to(fabric.device) for image in images]):
                found.append({name: value.cpu().numpy() for name, value in output.items()})
        true += [{name: np.asarray(value) for name, value in target.items()} for target in targets]
    return mean_average_precision(found, true)
