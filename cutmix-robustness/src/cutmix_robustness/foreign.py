"""Models from anywhere, for images in [0, 1]: torchvision, timm, released checkpoints, TorchScript, ONNX, code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cutmix_robustness.networks import Classifier, pyramidnet, resnet_cifar, resnet_imagenet
from cutmix_robustness.train import load_network

FORMS = "torchvision:<name>, timm:<name>, package.module:function, or a file .pt, .pth, .tar, .torchscript or .onnx"


def load_model(
    where: str,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: Path | str | None = None,
) -> nn.Module:
    """A model in evaluation mode, images (N, 3, H, W) in [0, 1] to logits (N, num_classes).

    Args:
        where: torchvision:<name> or timm:<name> (pretrained unless `weights` are given);
            package.module:function (called without arguments, returns a module for images in [0, 1], to which no
            normalisation is added); a TorchScript or ONNX file; a checkpoint in the layout that the authors of CutMix
            released (`arch`, `depth` and `alpha` are read from its tensors).
        num_classes: K.
        mean: mean of the normalisation that is put before all other models.
        std: its standard deviation.
        weights: state dict for a named architecture, alone or under "state_dict", "model" or "network".

    Raises:
        ValueError: an unknown form or name, or weights of another network.
        FileNotFoundError: no such file.
    """
    weights = None if weights is None else Path(weights)
    source, _, name = where.partition(":")
    if weights and source not in ("torchvision", "timm"):
        raise ValueError(f"weights: expected none for {where}, which brings its own, got {weights}")
    if source == "torchvision":
        return _filled(Classifier(_torchvision(name, num_classes, weights is None), mean, std), weights)
    if source == "timm":
        import timm

        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}")
        network = timm.create_model(name, pretrained=weights is None, num_classes=num_classes)
        return _filled(Classifier(network, mean, std), weights)
    if name and "/" not in where:
        return _from_code(source, name)
    path = Path(where)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: file not found; a model is {FORMS}")
    if path.suffix == ".onnx":
        return Classifier(OnnxNetwork(path), mean, std).eval()
    content = _read(path)
    network = content if isinstance(content, nn.Module) else released(state_dict_of(content, str(path)), str(path))
    return Classifier(network, mean, std).eval()


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}")
    if pretrained:
        return models.get_model(name, weights="DEFAULT")
    return models.get_model(name, weights=None, num_classes=num_classes)


def _filled(model: Classifier, weights: Path | None) -> nn.Module:
    if weights is not None:
        load_network(model, state_dict_of(_read(weights), str(weights)), str(weights))
    return model.eval()


def _from_code(module: str, function: str) -> nn.Module:
    try:
        build: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{module}:{function} cannot be imported ({error}); a model is {FORMS}") from error
    model = build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{function} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def _read(path: Path) -> Any:
    """A TorchScript module, or the contents of a checkpoint; pickled code is not run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as not_weights:
        try:
            return torch.jit.load(path, map_location="cpu")
        except RuntimeError:
            reason = str(not_weights).splitlines()[0]
            raise ValueError(f"{path}: is neither weights nor TorchScript ({reason})") from not_weights


def state_dict_of(content: Any, where: str) -> dict[str, Tensor]:
    """Names to tensors, from a bare state dict or one under its usual keys; a leading `module.` is dropped.

    Raises:
        ValueError: there are no tensors.
    """
    for key in ("state_dict", "model", "network"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where}: has no state dict, neither at the top nor under state_dict, model or network")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def released(weights: dict[str, Tensor], where: str) -> nn.Module:
    """The network of these released weights: PyramidNet or ResNet for CIFAR, ResNet-50 or -101 for ImageNet.

    Depth, widening and classes are read from the shapes.

    Raises:
        ValueError: weights of another network.
    """
    if "fc.weight" not in weights or "conv1.weight" not in weights:
        raise ValueError(f"{where}: unknown network (no conv1 and fc); name it and pass this file to --weights")
    classes = len(weights["fc.weight"])
    blocks = {name.rsplit(".", 2)[0] for name in weights if name.startswith("layer")}
    blocks = {name for name in blocks if name.count(".") == 1}  # without those of shortcuts
    per_layer = [sum(name.startswith(f"layer{number}.") for name in blocks) for number in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in weights
    if "bn_final.weight" in weights:
        depth = sum(per_layer) * (3 if bottleneck else 2) + 2
        alpha = len(weights["bn_final.weight"]) // (4 if bottleneck else 1) - 16
        network: nn.Module = pyramidnet(depth, alpha, classes, bottleneck)
    elif per_layer[3]:
        network = resnet_imagenet({16: "resnet50", 33: "resnet101"}.get(sum(per_layer), "resnet50"), classes)
    else:
        network = resnet_cifar(sum(per_layer) * (3 if bottleneck else 2) + 2, classes, bottleneck)
    load_network(Classifier(network, (0.0,) * 3, (1.0,) * 3), weights, where)
    return network


class OnnxNetwork(nn.Module):
    """An ONNX file run by onnxruntime on the CPU; it has no gradients, so FGSM, PGD and ODIN do not work."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, K)."""
        if x.requires_grad:
            raise ValueError("an ONNX model has no gradients: leave out fgsm, pgd and odin")
        (logits,) = self.session.run(None, {self.input: np.ascontiguousarray(x.cpu().numpy())})[:1]
        return torch.from_numpy(logits).to(x.device)
