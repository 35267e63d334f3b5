"""A recognizer made ready for reading: batch norm folded into convolutions, weights in the layout of the device."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from str_benchmark.models.recognizer import Recognizer
from str_benchmark.models.winograd import WinogradConv2d

ENGINES = ("torch", "onnxruntime")


def fold_batch_norm(model: Recognizer) -> Recognizer:
    """A copy in eval mode with each batch norm folded into the convolution before it: equal up to rounding.

    The gated convolutions of RCNN keep theirs, as one convolution serves several batch norms there.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, convolution), (following, norm) in itertools.pairwise(children):
            belongs = isinstance(module, nn.Sequential) or following == name.replace("conv", "bn")
            if belongs and isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, following, nn.Identity())
    return model


def for_inference(model: Recognizer, engine: str = "torch") -> Recognizer:
    """A form for reading; texts are the same, logits are equal up to rounding.

    Args:
        model: a recognizer.
        engine: "torch": folded, channels_last, on a CPU with Winograd convolutions, on the model's device;
            "onnxruntime": see `models.export.OnnxRecognizer`.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "onnxruntime":
        from str_benchmark.models.export import OnnxRecognizer

        return OnnxRecognizer(model)
    device = model.device
    model = fold_batch_norm(model).to(memory_format=torch.channels_last)
    if device.type == "cpu":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if WinogradConv2d.fits(child):
                    setattr(module, name, WinogradConv2d(child))
    return model
